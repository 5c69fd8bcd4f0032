"""What an export reads: a checkpoint, and the settings of the run that saved it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.config import Config


@dataclass(frozen=True)
class ExportSource:
    folder: Path  # of the checkpoint
    config: Config  # of the run
    state: dict[str, Any]  # of state.json
    sharded: ShardedCheckpoint
    kind: str  # of the weights to export: weights | ema

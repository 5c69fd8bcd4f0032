"""A checkpoint written by one process from full tensors: of weights from elsewhere, or of another checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.checkpoint.store import CheckpointStore


def save_full_tensors(
    store: CheckpointStore,
    step: int,
    shapes: Mapping[str, torch.Size],
    kinds: Sequence[str],
    value_of: Callable[[str, str], Tensor],
    state: dict[str, Any],
    on_written: Callable[[int], None] = lambda size: None,
) -> Path:
    """Writes checkpoint `step` of `store` atomically, one tensor at a time, and returns its folder.

    shapes      of all parameters, full
    kinds       what is saved of each: "weights", and of a training "exp_avg", "exp_avg_sq", "ema"
    value_of    (kind, name) -> the full tensor
    state       of state.json: JSON values
    on_written  called with the bytes of each tensor
    """
    raise NotImplementedError

"""What a run folder remembers of its checkpoints outside of their folder, so that a lost folder is noticed.

RUN/history.json   {"start": the last run.start that began the run or took it back to an earlier checkpoint,
                    "saved": [names of the checkpoints that the run had after its last save]}
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from megasora.errors import MegaSoraError
from megasora.files import read_regular_file, write_text_atomic
from megasora.jsonl import parse_json

HISTORY = "history.json"
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class History:
    start: str = ""  # empty: the run began by default
    saved: list[str] = dataclasses.field(default_factory=list)  # oldest first


def read_history(run_dir: Path) -> History:
    """The history of a run folder, empty for a new one. Raises MegaSoraError if the file is damaged."""
    path = run_dir / HISTORY
    try:
        values = parse_json(read_regular_file(path, MAX_BYTES))
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
        history = History(**values)
        if not (isinstance(history.start, str) and all(isinstance(name, str) for name in history.saved)):
            raise ValueError("start and saved are texts")
        return history
    except FileNotFoundError:
        return History()
    except (OSError, ValueError, TypeError) as error:
        raise MegaSoraError(
            f"{path} cannot be read: {error}; if {run_dir} has all its checkpoints, remove this file and start again, "
            "else restore them first, or choose another run.dir"
        ) from None


def write_history(run_dir: Path, history: History) -> None:
    write_text_atomic(run_dir / HISTORY, json.dumps(dataclasses.asdict(history)) + "\n")

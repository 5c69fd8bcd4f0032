"""The error of a checkpoint that cannot be loaded although its save was completed."""

from __future__ import annotations

from pathlib import Path

from megasora.errors import MegaSoraError


class DamagedCheckpoint(MegaSoraError):
    """A file of a checkpoint is missing, unreadable, or not what was saved; the checkpoint before it may be whole.

    `problem`: the file and what is wrong with it, without the remedy.
    """

    def __init__(self, file: Path, problem: str):
        self.problem = f"{file} {problem}"
        super().__init__(f"{self.problem}; use an earlier checkpoint")

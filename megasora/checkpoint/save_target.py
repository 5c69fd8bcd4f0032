"""Where a save goes: to the run folder (SharedTarget), or to the disks of the nodes (node_target.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from megasora.checkpoint.ranks import Ranks, on_main
from megasora.checkpoint.sharded import RankFile
from megasora.checkpoint.store import CheckpointStore

OnWritten = Callable[[int], None]


class SaveTarget(Protocol):
    """What `CheckpointSaver` does with one place. All ranks call `begin`, `commit` and `discard`, at the same point."""

    def begin(self, step: int, state: dict[str, Any], file: RankFile) -> None:
        """Before a rank writes. `state`: that of the main process counts. Raises on all ranks, and nothing is left."""

    def write(self, step: int, file: RankFile, values: Iterable[Tensor], on_written: OnWritten) -> Any:
        """Writes what this rank saves, in a thread of it. What it returns goes to `commit`."""

    def commit(self, step: int, state: dict[str, Any], written: Any) -> Callable[[], object] | None:
        """After all ranks have written: what a thread of this rank has to do, so that the save becomes visible."""

    def discard(self, step: int) -> None:
        """After an error of any rank: removes what was written."""


class SharedTarget:
    """The checkpoints in the run folder, which all ranks see; the main process commits."""

    def __init__(self, store: CheckpointStore, ranks: Ranks):
        self.store, self.ranks = store, ranks
        self.total_bytes: int | None = None  # of the files of all ranks

    def begin(self, step: int, state: dict[str, Any], file: RankFile) -> None:
        if self.total_bytes is None:
            self.total_bytes = int(self.ranks.all_reduce_sum(torch.tensor(file.size, dtype=torch.float64)))
        on_main(self.ranks, lambda: self.store.begin(step, self.total_bytes))

    def write(self, step: int, file: RankFile, values: Iterable[Tensor], on_written: OnWritten) -> Any:
        return file.name, file.write(self.store.staging_dir(step), values, on_written)

    def commit(self, step: int, state: dict[str, Any], written: Any) -> Callable[[], object] | None:
        files = self.ranks.gather_objects(written)
        return None if files is None else lambda: self.store.commit(step, state, dict(files))

    def discard(self, step: int) -> None:
        if self.ranks.rank == 0:
            shutil.rmtree(self.store.staging_dir(step), ignore_errors=True)

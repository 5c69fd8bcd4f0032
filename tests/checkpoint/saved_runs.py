"""Checkpoints of a few bytes, and ranks that are threads, for the tests of this folder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megasora.checkpoint.loader import CheckpointLoader
from megasora.checkpoint.saver import CheckpointSaver
from megasora.checkpoint.store import CheckpointStore, Retention
from megasora.fragment import Fragment
from megasora.placement import Placement

SHAPE = torch.Size((3,))


class ThreadRank:
    """A rank that is a thread, and a node of its own; `slots` (one a rank) and `barrier` are shared. It has the
    collectives of World."""

    def __init__(self, rank: int, slots: list, barrier: threading.Barrier):
        self.rank, self.slots, self.meeting = rank, slots, barrier

    def barrier(self) -> None:
        self.meeting.wait()

    def exchange(self, value: object) -> list:
        """The value of each rank."""
        self.slots[self.rank] = value
        self.barrier()
        values = list(self.slots)
        self.barrier()
        return values

    def share_on_node(self, make: Callable[[], Any]) -> Any:
        return make()

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        return sum(self.exchange(values))

    def gather_objects(self, value: object) -> list | None:
        values = self.exchange(value)
        return values if self.rank == 0 else None

    def broadcast_object(self, value: object) -> Any:
        return self.exchange(value)[0]


class OneRank(ThreadRank):
    """The only one."""

    def __init__(self):
        super().__init__(0, [None], threading.Barrier(1))


def on_ranks(size: int, function: Callable[[ThreadRank], Any]) -> list:
    """What `function` returned or raised on each of `size` ranks."""
    slots, barrier = [None] * size, threading.Barrier(size, timeout=20)
    results: list = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadRank(rank, slots, barrier))
        except Exception as error:
            results[rank] = error
            if isinstance(error, threading.BrokenBarrierError):
                return

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def build_saver(store: CheckpointStore, ranks: Any = None, shape: torch.Size = SHAPE) -> CheckpointSaver:
    """The saver of a rank that holds one parameter, `weight`, of which rank 0 saves all."""
    values = {"weights": torch.zeros(shape.numel())}
    fragment = Fragment("weight", shape, Placement(), 0, 1, 0, values)
    ranks = ranks or OneRank()
    return CheckpointSaver(store, [fragment], lambda _: (0, 1) if ranks.rank == 0 else (1, 1 << 30), ranks)


def build_loader(store: CheckpointStore, ranks: Any = None, shape: torch.Size = SHAPE) -> CheckpointLoader:
    """The loader of such a rank."""
    saver = build_saver(store, ranks, shape)
    return CheckpointLoader(store, saver.fragments, saver.ranks)


def weights(saver: CheckpointSaver | CheckpointLoader) -> list[float]:
    return saver.fragments[0].values["weights"].tolist()


def save(saver: CheckpointSaver, *steps: int) -> Path:
    """Saves checkpoints whose weights are all the step; returns the last one."""
    for step in steps:
        saver.fragments[0].values["weights"].fill_(step)
        saver.save(step, {"task": {"position": 8 * step}})
    return saver.store.path(steps[-1])


def store_of(run_dir: Path, keep: int = 9) -> CheckpointStore:
    run_dir.mkdir(exist_ok=True)
    return CheckpointStore(run_dir / "checkpoints", Retention(keep))


def flip(file: Path, offset: int = -1, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << bit
    file.write_bytes(data)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())

"""The processes of a run: rank, size and device of this one, collectives over all of them, and their start and end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist

from megasora.errors import MegaSoraError
from megasora.parallel.launcher import Launcher
from megasora.parallel.rendezvous import Rendezvous

T = TypeVar("T")
BACKSTOP_SECONDS = 60.0  # of a collective, beyond the watchdog's time: the watchdog ends a hang first


@dataclass(frozen=True)
class World:
    """All processes of a run, as one of them sees them. Every method is a collective: all processes must call it."""

    rank: int
    size: int
    local_rank: int  # on this machine
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def node(self) -> int:
        """The same number for all processes of a machine: the rank of its first one. Launchers number the processes of
        a machine consecutively."""
        return self.rank - self.local_rank

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all processes, in a new tensor on `device`."""
        sums = values.to(self.device, copy=True)
        dist.all_reduce(sums)
        return sums

    def gather_objects(self, value: object) -> list | None:
        """The value of each process, by rank, on the main process; None on the others. `value` must be picklable."""
        values: list | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values

    def broadcast_object(self, value: object) -> object:
        """The main process's value, on all processes. `value` must be picklable."""
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    @cached_property
    def node_group(self) -> dist.ProcessGroup | None:
        """The processes of this machine, for objects on the CPU; None for one that is alone. Made when it is needed."""
        if self.local_size == 1:
            return None
        if self.local_size == self.size and self.device.type == "cpu":
            return dist.group.WORLD
        ranks = list(range(self.node, self.node + self.local_size))
        return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)  # others need not take part

    def share_on_node(self, make: Callable[[], T]) -> T:
        """What `make()` returned on the first process of this machine, on all of its processes; the others do not call
        it. It must not raise, and its result must be picklable."""
        if self.node_group is None:
            return make()
        values = [make() if self.local_rank == 0 else None]
        dist.broadcast_object_list(values, self.node, self.node_group, device=torch.device("cpu"))
        return values[0]

    def gather_on_node(self, value: T) -> list[T] | None:
        """The value of each process of this machine, by rank, on its first one; None on the others."""
        if self.node_group is None:
            return [value]
        values: list | None = [None] * self.local_size if self.local_rank == 0 else None
        dist.gather_object(value, values, self.node, self.node_group)
        return values

    def barrier(self) -> None:
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


@contextmanager
def init_distributed(device: str, launcher: Launcher, rendezvous: Rendezvous) -> Iterator[World]:
    """Initialises the default process group of the launch, and destroys it on exit. `device`: auto, cuda or cpu.

    Raises MegaSoraError if this process has no GPU, or as of `Rendezvous.join`.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if launcher.local_rank >= torch.cuda.device_count():
            raise MegaSoraError(
                f"run.device=cuda: process {launcher.local_rank} of this machine has no GPU, "
                f"{torch.cuda.device_count()} found; start fewer processes or use run.device=cpu"
            )
        torch.cuda.set_device(launcher.local_rank)
    store = rendezvous.join()
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=store, rank=launcher.rank, world_size=launcher.size,
        timeout=timedelta(seconds=rendezvous.hang_seconds + BACKSTOP_SECONDS),
    )  # fmt: skip
    try:
        own_device = torch.device("cuda", launcher.local_rank) if device == "cuda" else torch.device("cpu")
        yield World(launcher.rank, launcher.size, launcher.local_rank, launcher.local_size, own_device)
    finally:
        dist.destroy_process_group()

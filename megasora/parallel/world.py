"""The processes of a run: rank, size and device of this one, collectives over all of them, and their start and end."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megasora.errors import MegaSoraError


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

    def barrier(self) -> None:
        dist.barrier()


def world_size() -> int:
    """The number of processes that the launcher started, from its environment; needs no process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def init_distributed(device: str) -> Iterator[World]:
    """Initialises the default process group from torchrun's environment, or one of a single process without torchrun;
    destroys it on exit. `device`: auto, cuda or cpu. Raises MegaSoraError if this process has no GPU."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_launcher()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise MegaSoraError(
                f"run.device=cuda: process {local_rank} of this machine has no GPU, {torch.cuda.device_count()} found; "
                "start fewer processes or use run.device=cpu"
            )
        torch.cuda.set_device(local_rank)
    backend = "nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        own_device = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, local_size, own_device)
    finally:
        dist.destroy_process_group()


def die_with_launcher() -> None:
    """Asks the Linux kernel to kill this process as soon as its launcher has ended; does nothing on other systems.

    When torchrun is killed, its processes are not: they would continue to train, and write into the run folder at the
    same time as those of the next launch.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    pr_set_pdeathsig, launcher = 1, os.getppid()
    prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != launcher:  # it ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)

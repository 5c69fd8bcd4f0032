"""The processes of a run: who am I, how many are we, and the few sums we need of each other."""

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
    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in a new tensor."""
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def gather(self, value: object) -> list | None:
        """Any picklable value of each process, on the main one; None elsewhere."""
        found: list | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, found)
        return found

    def from_main(self, value: object) -> object:
        """The main process's value, everywhere."""
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def barrier(self) -> None:
        dist.barrier()


def world_size() -> int:
    """Processes that the launcher started; readable before anything is initialised."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Joins the process group that torchrun described, or one of a single process; leaves it at the end."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
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
        place = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, local_size, place)
    finally:
        dist.destroy_process_group()


def end_with_launcher() -> None:
    """From now on the kernel kills this process as soon as the one that started it is gone (Linux).

    A torchrun that is killed takes nothing with it: its processes would train on, and write into the run folder beside
    those of the next launch.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    pr_set_pdeathsig, launcher = 1, os.getppid()
    prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != launcher:  # gone in between
        os.kill(os.getpid(), signal.SIGKILL)

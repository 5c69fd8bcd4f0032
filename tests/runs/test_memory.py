"""A resume needs no more memory than training: the largest resident size of each rank until its first step."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import train_arguments

from megasora.config import load
from megasora.testing.spawn import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
WIDER = ["model.width=256", "model.depth=4", "model.heads=4", "run.dtype=float32"]  # 8 M weights
MIB = 1 << 20
M_MMAP_THRESHOLD = -3  # of mallopt in glibc
READ_BUFFERS = 16  # MiB: of blocks of 4 MiB, in some threads


def resident_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


class Memory(NamedTuple):
    """Of one rank; MiB of its largest resident size beyond that before the start."""

    weights: int  # of this rank
    until_started: float  # weights and optimizer states exist, a checkpoint is loaded
    until_saved: float  # after the first step


def train_and_measure(arguments: list[str]) -> Memory:
    """Trains on each rank."""
    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.world import World
    from megasora.tasks.dit import DiTTask
    from megasora.trainer import Trainer

    config = load(arguments[0], arguments[1:])
    rank, size = dist.get_rank(), dist.get_world_size()
    world, peaks = World(rank, size, rank, size, torch.device("cpu")), []

    def heartbeat(activity: str) -> None:
        if activity.startswith("the save") and len(peaks) == 1:
            peaks.append(resident_mib("VmHWM") - before)

    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)  # what is freed is no longer resident
    before = resident_mib("VmRSS")
    task = DiTTask(config, world, build_mesh(config.parallel, "cpu"))
    trainer = Trainer(config, world, task, heartbeat=heartbeat)
    peaks.append(resident_mib("VmHWM") - before)
    trainer.run()
    weights = sum(p.numel() for p in task.engine.parameters.values())
    return Memory(weights, *peaks)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, shards, tiny) -> list[str]:
    run = tmp_path_factory.mktemp("memory") / "run"
    return [*train_arguments(run, shards, tiny), *WIDER, "validation.every=9", "validation.clips=1"]


@pytest.fixture(scope="module")
def fresh(arguments) -> Memory:
    """Of a first step on one process, which saves a checkpoint."""
    return run_ranks(train_and_measure, 1, [*arguments, "run.steps=1"])[0]


def check(resumed: Memory, fresh: Memory) -> None:
    tensor = 4 * fresh.weights / MIB  # MiB of one fp32 number for each weight of this rank
    assert fresh.until_saved > 5 * tensor  # weights, two moments, EMA, gradients
    assert resumed.until_saved < fresh.until_saved + READ_BUFFERS
    assert resumed.until_started < fresh.until_started + READ_BUFFERS
    assert READ_BUFFERS < tensor  # a copy of one kind of values would be seen


def test_a_resume_needs_no_more_memory_than_training(arguments, fresh):
    check(run_ranks(train_and_measure, 1, [*arguments, "run.steps=2"])[0], fresh)


def test_neither_does_a_resume_in_another_layout(arguments, fresh, tmp_path):
    tensor = [*arguments, "run.steps=3", "parallel.tensor=2"]
    resumed = run_ranks(train_and_measure, 2, tensor)
    fresh = run_ranks(train_and_measure, 2, [*tensor, "run.steps=1", f"run.dir={tmp_path / 'run'}"])
    for pair in zip(resumed, fresh, strict=True):
        check(*pair)

"""Finds ranks that are slower than the others: a throttled GPU, a busy machine, a slow disk.

In a step all ranks wait for the slowest, so their step times are equal. Compared is the time that a rank needs for
itself: until it has its data, and for the forward passes. It travels in the all-reduce that every step makes anyway:
each rank adds a vector with its own time in its own slot.

    RUN/slow_ranks.jsonl   one line for each change of the set of slow ranks

Ranks that share packs (tensor, context and pipeline axes) exchange data within the forward pass, so they are slow
together, and are named together.
"""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megasora.errors import first_of
from megasora.jsonl import JsonlWriter
from megasora.parallel.world import World

SLOW_RANKS = "slow_ranks.jsonl"
OWN_PHASES = ("data", "forward")  # without collectives, or with those of ranks that share packs
WINDOW = 9  # steps; odd, so that a median is the time of one step
SUSTAINED = 8  # steps in which the medians must find the same ranks
SLOW_RATIO, RECOVERED_RATIO = 1.5, 1.25  # own median / median of the others
MIN_SHARE = 0.1  # of the step time that a slow rank costs
MAX_NAMED = 8


def build_slow_ranks(run_dir: Path, world: World) -> SlowRanks:
    """That of this rank; all ranks must call it."""
    return SlowRanks(run_dir, world.rank, world.size, world.gather_objects(platform.node()))


class SlowRanks:
    """One per rank. `hosts`: the machine of each rank, on the main process; None on the others.

    `change`: a line for people if the newest step has changed which ranks are slow, else None; on the main process.
    """

    def __init__(self, run_dir: Path, rank: int, size: int, hosts: Sequence[str] | None):
        self.run_dir, self.rank, self.size, self.hosts = run_dir, rank, size, hosts
        self.change: str | None = None
        self.own_seconds = self.step_seconds = 0.0
        self.window: deque[np.ndarray] = deque(maxlen=WINDOW)  # seconds of each rank, by step
        self.slow: list[int] = []
        self.found: list[int] = []  # in the last `steps` steps; they count as slow after SUSTAINED of them
        self.steps = 0

    def record(self, times: dict[str, float]) -> dict[str, float]:
        """Keeps what it needs of this rank's times of a step, as `Laps.seconds` returns them; returns them."""
        self.own_seconds = sum(times.get(phase, 0.0) for phase in OWN_PHASES)
        self.step_seconds = times["step"]
        return times

    def slots(self) -> Tensor:
        """[size] fp64: this rank's own seconds of the last recorded step in its slot; to be summed over all ranks."""
        slots = torch.zeros(self.size, dtype=torch.float64)
        slots[self.rank] = self.own_seconds
        return slots

    def update(self, step: int, seconds: Sequence[float]) -> None:
        """Takes the sum of all slots of step `step`, and sets `change`."""
        self.change = None
        if self.hosts is None or self.size == 1 or not all(seconds):
            return
        self.window.append(np.asarray(seconds))
        if len(self.window) < WINDOW:
            return
        own = np.median(np.stack(self.window), axis=0)
        others = medians_of_others(own)
        was_slow = np.isin(np.arange(self.size), self.slow)
        is_slow = own > others * np.where(was_slow, RECOVERED_RATIO, SLOW_RATIO)
        is_slow &= own - others > MIN_SHARE * self.step_seconds
        slow = np.flatnonzero(is_slow).tolist()
        self.steps = self.steps + 1 if slow == self.found else 1
        self.found = slow
        if slow == self.slow or self.steps < SUSTAINED:
            return
        self.slow = slow
        self.write_line(step, own, others)
        self.change = self.describe(own, others) if slow else "no process is slower than the others any more"

    def write_line(self, step: int, own: np.ndarray, others: np.ndarray) -> None:
        writer = JsonlWriter(self.run_dir / SLOW_RANKS)
        writer.write({
            "time": round(time.time(), 3), "step": step, "ranks": self.slow,
            "hosts": [self.hosts[r] for r in self.slow],
            "seconds": [round(float(own[r]), 5) for r in self.slow],
            "others": [round(float(others[r]), 5) for r in self.slow],
        })  # fmt: skip
        writer.close()

    def describe(self, own: np.ndarray, others: np.ndarray) -> str:
        slowest = max(self.slow, key=lambda rank: own[rank] / others[rank])
        ratio = own[slowest] / others[slowest] if others[slowest] else float("inf")
        names = first_of([f"{rank} on {self.hosts[rank]}" for rank in self.slow], MAX_NAMED)
        return (
            f"slow: process {names}: {ratio:.1f}x slower than the others, {own[slowest]:.3g} s of its own per "
            f"step against {others[slowest]:.3g} s (medians of {WINDOW} steps)"
        )


def medians_of_others(values: np.ndarray) -> np.ndarray:
    """[n]: for each element the median of all others; n > 1."""
    order, n = np.argsort(values, kind="stable"), len(values)
    ranked = values[order]
    position = np.empty(n, dtype=np.int64)
    position[order] = np.arange(n)
    low, high = (n - 2) // 2, (n - 1) // 2  # of the n - 1 others, in order
    return (ranked[low + (position <= low)] + ranked[high + (position <= high)]) / 2

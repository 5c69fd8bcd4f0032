"""Time on a GPU, and the limits that it is held against, measured in the same run.

A pass is timed between two events on the GPU. Before the first, its level-2 cache is overwritten, so that inputs come
from memory, and the GPU is given something to wait for, so that all launches of the pass are queued when it begins:
what is timed is the GPU's work, not Python's. Several ways to compute one thing take turns (A B C A B C ...), after
turns that are not counted; medians are reported.

    copy      GB/s that a copy from memory to memory moves, reading and writing, 2 x 1 GiB
    matmul    TFLOP/s of an 8,192 x 8,192 x 8,192 product of normal numbers in bf16
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
import triton

Result = TypeVar("Result")

WAIT_CYCLES = 3_000_000  # about 2 ms, in which a few hundred launches are queued
COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192
LEAST_TURNS, MOST_TURNS = 3, 20
TURNS_S = 0.2  # that the turns of one way take, if not fewer than the least


class Clock:
    """Times passes on the current GPU."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self.overwritten = torch.empty(max(4 * cache, 1 << 26), dtype=torch.int8, device="cuda")
        self.events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)

    def time(self, name: str, function: Callable[[], Result]) -> Result:
        """What `function` gives; its time is among those that `take` has under `name`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT_CYCLES)
        self.overwritten.zero_()
        start.record()
        result = function()
        end.record()
        self.events[name].append((start, end))
        return result

    def take(self) -> dict[str, float]:
        """Milliseconds of each pass since the last call; of a name, the sum."""
        torch.cuda.synchronize()
        ms = {name: sum(a.elapsed_time(b) for a, b in pairs) for name, pairs in self.events.items()}
        self.events.clear()
        return ms

    def drop(self) -> None:
        """After a pass that failed: what it timed, and the memory that it had."""
        self.events.clear()
        torch.cuda.empty_cache()


@dataclass
class Timed:
    """One way."""

    ms: dict[str, list[float]] = field(default_factory=dict)  # of each pass, all turns
    error: str | None = None  # why there are none

    @property
    def medians(self) -> dict[str, float]:
        return {name: float(np.median(times)) for name, times in self.ms.items()}


Way = Callable[[Clock], None]  # one turn: calls `clock.time` for each pass


def take_turns(ways: Mapping[str, Way], clock: Clock, warm_up: int = 2) -> dict[str, Timed]:
    """Times every way. One that fails, for want of memory or anything else, says so in `error` and is left out."""
    timed = {name: Timed() for name in ways}
    longest = 0.0

    def turn(name: str) -> dict[str, float] | None:
        try:
            ways[name](clock)
            return clock.take()
        except Exception as error:  # of a compiler, a library, the GPU's memory: the others go on
            timed[name] = Timed(error=named(error))
        clock.drop()
        return None

    for name in ways:
        for _ in range(warm_up):
            ms = turn(name)
            if ms is None:
                break
        if ms is not None:
            longest = max(longest, sum(ms.values()))
    turns = int(np.clip(1e3 * TURNS_S / max(longest, 1e-3), LEAST_TURNS, MOST_TURNS))
    for _ in range(turns):
        for name in ways:
            if timed[name].error is None and (ms := turn(name)) is not None:
                for key, value in ms.items():
                    timed[name].ms.setdefault(key, []).append(value)
    return timed


def named(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Deadline:
    """When to stop starting things."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() > self.end


def measure_limits(clock: Clock) -> dict[str, float]:
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    ways = {
        "copy": lambda clock: clock.time("copy", lambda: target.copy_(source)),
        "matmul": lambda clock: clock.time("matmul", lambda: torch.mm(a, b)),
    }
    timed = take_turns(ways, clock)
    copy_ms, matmul_ms = (timed[name].medians[name] for name in ways)
    return {"copy_gb_s": 2 * COPY_BYTES / copy_ms / 1e6, "matmul_tflop_s": 2 * MATMUL_SIZE**3 / matmul_ms / 1e9}


def gpu_surroundings() -> dict[str, object]:
    """What GPU, and what runs on it."""
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }

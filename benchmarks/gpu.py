"""Times work on a GPU, and measures the GPU's limits in the same run.

A pass is timed between two CUDA events. Before the first, the L2 cache is overwritten, so that inputs come from memory,
and the GPU sleeps, so that all launches of the pass are queued when it begins: the time is that of the GPU, not of
Python. Trials of several variants alternate (A B C A B C ...), after warm-up trials; medians are reported.

    copy      GB/s of a copy in GPU memory, counting reads and writes: 2 x 1 GiB
    matmul    TFLOP/s of an 8,192 x 8,192 x 8,192 product in bf16 of normally distributed values
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

WAIT_CYCLES = 3_000_000  # about 2 ms, enough to queue a few hundred launches
COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192
MIN_TRIALS, MAX_TRIALS = 3, 20
TRIALS_SECONDS = 0.2  # target for all trials of a variant, within these limits


class CudaTimer:
    """Times passes on the current GPU with CUDA events."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self.overwritten = torch.empty(max(4 * cache, 1 << 26), dtype=torch.int8, device="cuda")
        self.events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)

    def time(self, name: str, function: Callable[[], Result]) -> Result:
        """Returns the result of `function`, and records its time under `name`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT_CYCLES)
        self.overwritten.zero_()
        start.record()
        result = function()
        end.record()
        self.events[name].append((start, end))
        return result

    def pop_times(self) -> dict[str, float]:
        """Milliseconds recorded since the last call, by name; times of the same name are summed."""
        torch.cuda.synchronize()
        ms = {name: sum(a.elapsed_time(b) for a, b in pairs) for name, pairs in self.events.items()}
        self.events.clear()
        return ms

    def discard(self) -> None:
        """After a failed pass: discards its times and frees its cached memory."""
        self.events.clear()
        torch.cuda.empty_cache()


@dataclass
class TrialTimes:
    """The times of one variant."""

    ms: dict[str, list[float]] = field(default_factory=dict)  # of each pass, one per trial
    error: str | None = None  # why it failed

    @property
    def medians(self) -> dict[str, float]:
        return {name: float(np.median(times)) for name, times in self.ms.items()}


Trial = Callable[[CudaTimer], None]  # one trial: calls `timer.time` for each pass


def run_trials(variants: Mapping[str, Trial], timer: CudaTimer, warm_up: int = 2) -> dict[str, TrialTimes]:
    """Times all variants, with alternating trials. A variant that fails gets an `error` and no further trials."""
    timed = {name: TrialTimes() for name in variants}
    longest = 0.0

    def run(name: str) -> dict[str, float] | None:
        try:
            variants[name](timer)
            return timer.pop_times()
        except Exception as error:  # e.g. of a compiler or a library, or out of memory: the other variants continue
            timed[name] = TrialTimes(error=describe_error(error))
        timer.discard()
        return None

    for name in variants:
        for _ in range(warm_up):
            ms = run(name)
            if ms is None:
                break
        if ms is not None:
            longest = max(longest, sum(ms.values()))
    num_trials = int(np.clip(1e3 * TRIALS_SECONDS / max(longest, 1e-3), MIN_TRIALS, MAX_TRIALS))
    for _ in range(num_trials):
        for name in variants:
            if timed[name].error is None and (ms := run(name)) is not None:
                for key, value in ms.items():
                    timed[name].ms.setdefault(key, []).append(value)
    return timed


def describe_error(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Deadline:
    """A point in time after which no new measurement is started."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() > self.end


def measure_limits(timer: CudaTimer) -> dict[str, float]:
    """Bandwidth of a copy in GB/s and speed of a matrix product in TFLOP/s; see above."""
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    variants = {
        "copy": lambda timer: timer.time("copy", lambda: target.copy_(source)),
        "matmul": lambda timer: timer.time("matmul", lambda: torch.mm(a, b)),
    }
    timed = run_trials(variants, timer)
    copy_ms, matmul_ms = (timed[name].medians[name] for name in variants)
    return {"copy_gb_s": 2 * COPY_BYTES / copy_ms / 1e6, "matmul_tflop_s": 2 * MATMUL_SIZE**3 / matmul_ms / 1e9}


def gpu_environment() -> dict[str, object]:
    """The GPU and the versions of CUDA and Triton."""
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

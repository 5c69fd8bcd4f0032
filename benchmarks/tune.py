"""Searches launch configurations of our kernels on this GPU: python -m benchmarks.kernels --tune

Each table of a kernel file (LaunchConfig by architecture, see kernels/launch.py) is tuned on one operation at two
widths, one field after the other: the best value of a field is used for the next. Prints a table line for each
configuration that is faster than the current one by more than timings vary. It has to be added to the file by hand:
nothing is tuned at run time, so that all ranks use the same configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from unittest import mock

import torch
from rich.console import Console

from benchmarks.gpu import CudaTimer, run_trials
from megasora.kernels import (
    adaln_triton,
    adamw,
    gated_add,
    merge_partial_attention,
    qk_norm_rope3d,
    rms_norm,
    rope3d,
)
from megasora.kernels.launch import LaunchConfig, architecture, launch_config
from megasora.testing.operations import OPERATIONS, Problem, Size, backward, forward

FILES: dict[str, ModuleType] = {  # operation that the tables of a file are tuned on: the file
    "gated_residual_adaln": adaln_triton,
    "gated_add": gated_add,
    "rope3d": rope3d,
    "qk_norm_rope3d, per_head": qk_norm_rope3d,
    "rms_norm": rms_norm,
    "merge_partial_attention": merge_partial_attention,
    "adamw_step": adamw,
}
CANDIDATES = {  # values of each field of a LaunchConfig, in the order of the search
    "tile_elements": (1024, 2048, 3072, 4096, 8192),
    "elements_per_thread": (8, 16, 32),
    "num_stages": (1, 2, 3, 4),
}
TOKENS, WIDTHS = 65_536, (1536, 5120)
MAX_TIME_RATIO = 0.98  # a faster configuration is printed if it takes at most this fraction of the current time


def tables(module: ModuleType) -> Iterator[str]:
    """Names of the launch tables of a kernel file."""
    for name, value in vars(module).items():
        if isinstance(value, dict) and value and all(isinstance(config, LaunchConfig) for config in value.values()):
            yield name


def tune(timer: CudaTimer, console: Console) -> None:
    gpu = torch.device("cuda")
    for operation, module in FILES.items():
        problems = [OPERATIONS[operation](Size(TOKENS, width), torch.bfloat16, gpu) for width in WIDTHS]
        for table in tables(module):
            current = launch_config(getattr(module, table), gpu)
            best, times = search(partial(scores, timer, problems, module, table), current)
            line = f"{module.__name__.rpartition('.')[2]}.{table}: {times:.2f} of the time of {current}"
            console.print(line if times < MAX_TIME_RATIO else f"{line}; unchanged", highlight=False)
            if times < MAX_TIME_RATIO:
                console.print(f'    "{architecture(gpu)}": {best},', highlight=False)


def search(score: Callable[[list[LaunchConfig]], list[float]], current: LaunchConfig) -> tuple[LaunchConfig, float]:
    """The best configuration, and its time over that of `current`. `score`: mean times, inf for failures."""
    best, ratio = current, 1.0
    for name, values in CANDIDATES.items():
        configs = [best, *(best._replace(**{name: v}) for v in values if v != getattr(best, name))]
        times = score(configs)
        first = min(range(len(configs)), key=times.__getitem__)
        best, ratio = configs[first], ratio * times[first] / times[0]
    return best, ratio


def scores(
    timer: CudaTimer, problems: list[Problem], module: ModuleType, table: str, configs: list[LaunchConfig]
) -> list[float]:
    """For each configuration the geometric mean over the problems of the ms of both passes; inf if one fails."""
    logs = [0.0] * len(configs)
    for problem in problems:
        variants = {str(i): build_trial(module, table, config, problem) for i, config in enumerate(configs)}
        timed = run_trials(variants, timer)
        for i in range(len(configs)):
            times = timed[str(i)]
            logs[i] += math.inf if times.error is not None else math.log(sum(times.medians.values()))
    return [math.exp(total / len(problems)) for total in logs]


def build_trial(module: ModuleType, table: str, config: LaunchConfig, problem: Problem) -> Callable[[CudaTimer], None]:
    def trial(timer: CudaTimer) -> None:
        with mock.patch.object(module, table, {"any": config}):
            outputs = timer.time("forward", lambda: forward(problem.triton, problem.inputs))
            backward_pass = backward(problem.inputs, outputs)
            if backward_pass is not None:
                timer.time("backward", backward_pass)

    return trial

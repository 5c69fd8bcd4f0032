"""Other cuts of our kernels on this GPU: python -m benchmarks.kernels --tune

Each table of a kernel file (a LaunchConfig by chip, see kernels/launch.py) is tried on its operation at two widths, one field
after the other: the best of each is kept for the next. What is printed is a line for the file, to be read and put there
by hand; nothing is chosen at run time, so that all ranks cut alike. A line appears where the best is faster than what
stands there by more than timings differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from unittest import mock

import torch
from rich.console import Console

from benchmarks.gpu import Clock, take_turns
from megasora.kernels import (
    adaln,
    gated_add,
    merge_partial_attention,
    qk_norm_rope3d,
    rms_norm,
    rope3d,
)
from megasora.kernels.launch import LaunchConfig, architecture, launch_config
from megasora.testing.operations import OPERATIONS, Problem, Size, backward, forward

FILES: dict[str, ModuleType] = {  # operation that a file's tables are tried on
    "gated_residual_adaln": adaln,
    "gated_add": gated_add,
    "rope3d": rope3d,
    "qk_norm_rope3d, per_head": qk_norm_rope3d,
    "rms_norm": rms_norm,
    "merge_partial_attention": merge_partial_attention,
}
CANDIDATES = {  # of each field of a LaunchConfig, in the order in which they are tried
    "tile_elements": (1024, 2048, 4096, 8192),
    "elements_per_thread": (8, 16, 32),
    "num_stages": (1, 2, 3, 4),
}
TOKENS, WIDTHS = 65_536, (1536, 5120)
WORTH = 0.98  # of the time of what stands there


def tables(module: ModuleType) -> Iterator[str]:
    for name, value in vars(module).items():
        if isinstance(value, dict) and value and all(isinstance(launch, LaunchConfig) for launch in value.values()):
            yield name


def tune(clock: Clock, console: Console) -> None:
    gpu = torch.device("cuda")
    for operation, module in FILES.items():
        problems = [OPERATIONS[operation](Size(TOKENS, width), torch.bfloat16, gpu) for width in WIDTHS]
        for table in tables(module):
            standing = launch_config(getattr(module, table), gpu)
            best, times = search(partial(scores, clock, problems, module, table), standing)
            line = f"{module.__name__.rpartition('.')[2]}.{table}: {times:.2f} of the time of {standing}"
            console.print(line if times < WORTH else f"{line}; stays", highlight=False)
            if times < WORTH:
                console.print(f'    "{architecture(gpu)}": {best},', highlight=False)


def search(score: Callable[[list[LaunchConfig]], list[float]], standing: LaunchConfig) -> tuple[LaunchConfig, float]:
    """The best cut and its time over that of `standing`. `score`: mean times, inf for what does not run."""
    best, ratio = standing, 1.0
    for name, values in CANDIDATES.items():
        launches = [best, *(best._replace(**{name: v}) for v in values if v != getattr(best, name))]
        times = score(launches)
        first = min(range(len(launches)), key=times.__getitem__)
        best, ratio = launches[first], ratio * times[first] / times[0]
    return best, ratio


def scores(
    clock: Clock, problems: list[Problem], module: ModuleType, table: str, launches: list[LaunchConfig]
) -> list[float]:
    """Geometric mean over the problems of both passes' ms with each cut; inf where one does not run."""
    logs = [0.0] * len(launches)
    for problem in problems:
        ways = {str(i): turn_of(module, table, launch, problem) for i, launch in enumerate(launches)}
        timed = take_turns(ways, clock)
        for i in range(len(launches)):
            times = timed[str(i)]
            logs[i] += math.inf if times.error is not None else math.log(sum(times.medians.values()))
    return [math.exp(total / len(problems)) for total in logs]


def turn_of(module: ModuleType, table: str, launch: LaunchConfig, problem: Problem) -> Callable[[Clock], None]:
    def turn(clock: Clock) -> None:
        with mock.patch.object(module, table, {"any": launch}):
            outputs = clock.time("forward", lambda: forward(problem.triton, problem.inputs))
            backward_pass = backward(problem.inputs, outputs)
            if backward_pass is not None:
                clock.time("backward", backward_pass)

    return turn

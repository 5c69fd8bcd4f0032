"""How long a rank takes to draw its weights: python -m benchmarks.initial_weights [--out FILE]

    numbers     per second, uniform and normal, of megasora/random_numbers.py and of torch's generator, into one tensor
    ranks       the last rank of the presets draws all its weights, each into the same memory; beside it the time for
                whole tensors from torch's generator, at its rate above

Runs of the two generators alternate; the median counts. Compare by ratios. The presets are taken with text.name=bytes,
which needs no download.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.record import environment, write_record
from megasora.config import load
from megasora.model.init import DrawnWeights
from megasora.parallel.mesh import Axis, Mesh
from megasora.parallelize import build_local_model
from megasora.placement import WHOLE, Placement
from megasora.random_numbers import fill_normal, fill_uniform

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RANKS = (("dit_7b.yaml", 4), ("dit_30b.yaml", 8))  # (preset, size of the tensor axis)


@dataclass(frozen=True)
class Rate:
    numbers: str
    threads: int
    counter_per_s: float
    torch_per_s: float


@dataclass(frozen=True)
class Rank:
    preset: str
    tensor: int
    threads: int
    local: int  # weights of the rank
    whole: int  # weights of the full tensors of its parameters
    seconds: float
    torch_seconds: float  # whole / rate of torch's generator


class DrawnIntoOneBuffer(DrawnWeights):
    """Counts the weights; their tensors may be on the meta device."""

    @torch.no_grad()
    def fill(self, out: Tensor, name: str, placement: Placement = WHOLE, rank: int = 0, size: int = 1) -> None:
        counts["local"] += out.numel()
        counts["whole"] += placement.full_shape(out.shape, size).numel()
        buffer = buffers.setdefault(out.shape, torch.zeros(out.shape))
        start = time.perf_counter()
        super().fill(buffer, name, placement, rank, size)
        counts["seconds"] += time.perf_counter() - start


buffers: dict[torch.Size, Tensor] = {}
counts = {"local": 0, "whole": 0, "seconds": 0.0}


def measure_rates(count: int, threads: int, rounds: int) -> list[Rate]:
    torch.set_num_threads(threads)
    out, generator = torch.zeros(1, count), torch.Generator()
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "uniform": (lambda: fill_uniform(out, 1, 0, count, 1.0), lambda: out.uniform_(-1, 1, generator=generator)),
        "normal": (lambda: fill_normal(out, 1, 0, count, 1.0), lambda: out.normal_(generator=generator)),
    }
    rates = []
    for numbers, pair in calls.items():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for call, seconds in zip(pair, times, strict=True):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
        rates.append(Rate(numbers, threads, *(count / statistics.median(seconds) for seconds in times)))
    return rates


def measure_rank(preset: str, tensor: int, threads: int, torch_per_s: float) -> Rank:
    torch.set_num_threads(threads)
    config = load(
        CONFIGS / preset, [f"parallel.tensor={tensor}", "parallel.context=1", "text.name=bytes", "text.path="]
    )
    axes = {name: Axis(name, 1, 0, group=None) for name in Mesh.__dataclass_fields__}
    axes |= {name: Axis(name, tensor, tensor - 1, group=None) for name in ("tensor", "model")}
    buffers.clear()
    counts.update(local=0, whole=0, seconds=0.0)
    build_local_model(config, torch.device("meta"), Mesh(**axes), DrawnIntoOneBuffer(config.run.seed))
    local, whole, seconds = counts["local"], counts["whole"], counts["seconds"]
    return Rank(preset.removesuffix(".yaml"), tensor, threads, int(local), int(whole), seconds, whole / torch_per_s)


def table_of(title: str, rows: Sequence[object]) -> Table:
    table = Table(title=title)
    for column in asdict(rows[0]):
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{x:,.4g}" if isinstance(x, float) else f"{x}" for x in asdict(row).values()))
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1 << 26, help="numbers of the tensor")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--presets", nargs="*", default=[f"{preset}:{tensor}" for preset, tensor in RANKS])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    head, before = environment(), torch.get_num_threads()
    rates = [rate for threads in options.threads for rate in measure_rates(options.count, threads, options.rounds)]
    of_torch = {rate.threads: rate.torch_per_s for rate in rates if rate.numbers == "uniform"}
    ranks = [
        measure_rank(preset, int(tensor), threads, of_torch[threads])
        for preset, tensor in (text.split(":") for text in options.presets)
        for threads in options.threads
    ]
    torch.set_num_threads(before)
    console = Console()
    console.print(table_of("numbers per second", rates))
    if ranks:
        console.print(table_of("weights of one rank", ranks))
    if options.out is not None:
        body = {"rates": [asdict(rate) for rate in rates], "ranks": [asdict(rank) for rank in ranks]}
        write_record(options.out, head, body)


if __name__ == "__main__":
    main()

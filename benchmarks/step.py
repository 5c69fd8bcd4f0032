"""Time of a training step by the split of its pack: python -m benchmarks.step [--out benchmarks/results/step.json]

Heavy-tailed packs on a few processes, over gloo, are split by three variants: split_pack, MegaSora's; even, every
segment over all ranks, as in USP; contiguous, consecutive slots. Only the split differs: weights, pack, noise and the
exchanges of attention (a rank sends what others need, directly) are the same, and so must be loss and gradient norm.

A step is forward, backward and the sum of gradients over the ranks; the optimizer does not depend on the split. The
variants run round-robin (A B C A B C ...), after one round that is not counted; ratios are within a round.

    seconds         wall time of the slowest rank, from one barrier to the next
    CPU seconds     of the busiest rank's thread: its computation, without its waiting. If each rank has its own core,
                    it sets the pace. With more processes than cores, idle ranks leave their core to others: wall time
                    is then the sum of the work of all ranks, and hides imbalance
    bytes           that a rank passes to gloo for attention, forward and backward, counted as they are sent
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.context_balance import contiguous_split, even_split, heavy_tailed, max_over_mean
from benchmarks.record import environment, write_record
from megasora.batch import ContextSplit, VideoBatch
from megasora.build import patch_dim
from megasora.config import Config, load
from megasora.data.pack import Record, make_batch
from megasora.diffusion.flow import FlowMatching, velocity_error
from megasora.parallel.context_split import attention_work_per_rank, split_pack
from megasora.parallel.mesh import Mesh, build_mesh
from megasora.parallel.share import share_length, take_share
from megasora.parallelize import LocalModel, build_local_model
from megasora.testing.spawn import run_ranks

LAYOUTS = {  # name: processes, settings
    "context=4": (4, ["parallel.context=4"]),
    "tensor=2,context=2": (4, ["parallel.tensor=2", "parallel.context=2"]),
    "context=2": (2, ["parallel.context=2"]),
}
VARIANTS: dict[str, Callable[..., ContextSplit]] = {
    "split_pack": split_pack,
    "even": even_split,
    "contiguous": contiguous_split,
}
BASELINE = "split_pack"
SHORTEST, LONGEST = 16, 131_072  # tokens of a clip: the mix of context_balance.py, for smaller ranks
TOLERANCE = 1e-5  # relative difference of losses and gradient norms


def heavy_pack(config: Config, seed: int) -> VideoBatch:
    """Clips from a few tokens to most of the pack."""
    records = []
    for i, l in enumerate(heavy_tailed(config.data.tokens_per_pack, SHORTEST, LONGEST, seed).tolist()):
        draw = torch.Generator().manual_seed(i)
        patches_LP = torch.randn(l, patch_dim(config), generator=draw)
        words = torch.randint(0, 257, (8, 16), generator=draw)
        records.append(Record(i, patches_LP, (l, 1, 1), words, (64.0, 64.0, 4.0 * l, 8.0), "a caption"))
    return make_batch(records, config.data.tokens_per_pack)


@torch.no_grad()
def randomise(local: LocalModel, mesh: Mesh) -> None:
    """Fills in the same nonzero weights in every layout; blocks that are the identity would hide a difference."""
    for stage in local.stages.values():
        for name, parameter in stage.named_parameters():
            placement = local.placements[name]
            shape = placement.full_shape(parameter.shape, mesh.tensor.size)
            full = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
            parameter.copy_(placement.local(full, mesh.tensor.rank, mesh.tensor.size))


@dataclass(frozen=True)
class Step:
    """One step on one rank."""

    loss: float  # of the pack
    norm: float  # of the full gradient
    seconds: float  # the slowest rank's
    cpu_seconds: float
    bytes_sent: int


def run_steps(config: Config, splits: dict[str, ContextSplit], pack: VideoBatch, rounds: int) -> dict[str, list[Step]]:
    """On each rank: `rounds` steps with each split, round-robin, after one that is not counted."""
    mesh = build_mesh(config.parallel, "cpu")
    local = build_local_model(config, torch.device("cpu"), mesh)
    randomise(local, mesh)
    steps: dict[str, list[Step]] = {variant: [] for variant in splits}
    for round_number in range(rounds + 1):
        for variant, split in splits.items():
            share = take_share(pack, split, mesh.ring.rank, mesh.ulysses.rank, share_length(config))
            noised_share = FlowMatching(config.objective, config.run.seed).add_noise(share, 0)
            step = train_step(local, noised_share, mesh)
            if round_number > 0:
                steps[variant].append(step)
    return steps


def train_step(local: LocalModel, noised_share: tuple[VideoBatch, Tensor, Tensor], mesh: Mesh) -> Step:
    noised, target, weight = noised_share
    model, attention = local.stages[0], local.attention
    model.zero_grad()
    attention.pop_bytes_sent()
    dist.barrier()
    start, cpu_start = time.perf_counter(), time.thread_time()

    error = velocity_error(model(noised), target, weight)
    sums = torch.tensor([float(error.squared_error_sum.detach()), error.tokens], dtype=torch.float64)
    dist.all_reduce(sums, group=mesh.data_context.group)
    (error.squared_error_sum / sums[1].float()).backward()
    sum_gradients(local, mesh)

    cpu_seconds = time.thread_time() - cpu_start
    dist.barrier()
    slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    loss = float(sums[0] / sums[1])
    return Step(loss, gradient_norm(local, mesh), float(slowest), cpu_seconds, attention.pop_bytes_sent())


def sum_gradients(local: LocalModel, mesh: Mesh) -> None:
    """Over data x context in one all-reduce, then over the axes on which a parameter's gradient is partial."""
    named = dict(local.stages[0].named_parameters())
    flat = torch.cat([p.grad.flatten() for p in named.values()])
    dist.all_reduce(flat, group=mesh.data_context.group)
    for parameter, part in zip(named.values(), flat.split([p.numel() for p in named.values()]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))
    for name, parameter in named.items():
        for axis in local.placements[name].partial_axes:
            dist.all_reduce(parameter.grad, group=mesh.axis(axis).group)


def gradient_norm(local: LocalModel, mesh: Mesh) -> float:
    """Norm of the full gradient; a parameter that is replicated over the tensor axis counts once."""
    ranks, named = (mesh.pipeline.rank, mesh.tensor.rank), local.stages[0].named_parameters()
    primary = (p for name, p in named if local.placements[name].is_primary_replica(*ranks))
    square = sum((p.grad.double().square().sum() for p in primary), torch.zeros((), dtype=torch.float64))
    dist.all_reduce(square, group=mesh.model.group)
    return float(square.sqrt())


# ---- output


@dataclass(frozen=True)
class Result:
    """One pack, split by one variant, over all rounds."""

    variant: str
    seed: int
    lengths: list[int]  # of the pack's segments
    loss: float
    gradient_norm: float
    work_max_over_mean: float  # pairs of query and key
    seconds: list[float]  # of each round
    relative_seconds: list[float]  # seconds / those of split_pack, of each round
    cpu_seconds: list[list[float]]  # of each round and rank
    relative_cpu_seconds: list[float]  # CPU seconds of the busiest rank / those with split_pack, of each round
    bytes_sent: list[int]  # of each rank, in a step


def measure(config: Config, processes: int, seed: int, rounds: int) -> list[Result]:
    """One pack in one layout, split by every variant. RuntimeError if losses or gradient norms differ."""
    pack, p = heavy_pack(config, seed), config.parallel
    lengths = pack.cu_segments.diff().tolist()
    ring, slots = p.context // p.ulysses, p.ulysses * share_length(config)
    splits = {variant: split(lengths, ring, slots) for variant, split in VARIANTS.items()}
    ranks = run_ranks(run_steps, processes, config, splits, pack, rounds, timeout=3600)

    seconds = {variant: [step.seconds for step in ranks[0][variant]] for variant in splits}
    cpu = {variant: [[rank[variant][i].cpu_seconds for rank in ranks] for i in range(rounds)] for variant in splits}
    results = []
    for variant, split in splits.items():
        results.append(
            Result(
                variant=variant,
                seed=seed,
                lengths=lengths,
                loss=ranks[0][variant][0].loss,
                gradient_norm=ranks[0][variant][0].norm,
                work_max_over_mean=float(max_over_mean(attention_work_per_rank(split))),
                seconds=seconds[variant],
                relative_seconds=[a / b for a, b in zip(seconds[variant], seconds[BASELINE], strict=True)],
                cpu_seconds=cpu[variant],
                relative_cpu_seconds=[max(a) / max(b) for a, b in zip(cpu[variant], cpu[BASELINE], strict=True)],
                bytes_sent=[rank[variant][0].bytes_sent for rank in ranks],
            )
        )
    for result in results[1:]:
        for name in ("loss", "gradient_norm"):
            value, expected = getattr(result, name), getattr(results[0], name)
            if not abs(value - expected) <= TOLERANCE * abs(expected):
                raise RuntimeError(
                    f"{name} is {value} with the {result.variant} split, {expected} with {results[0].variant}"
                )
    return results


def median_and_range(values: list[float]) -> str:
    return f"{np.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def table_of(layout: str, processes: int, results: list[Result]) -> Table:
    """Medians over packs and rounds."""
    first = results[0]
    packs = [r for r in results if r.variant == BASELINE]
    table = Table(
        title=f"{layout}, {processes} processes: {len(packs)} packs, the first has {sum(first.lengths):,} tokens in "
        f"{len(first.lengths)} segments of {min(first.lengths)} to {max(first.lengths):,}; median (lowest - highest) "
        f"of {len(packs) * len(first.seconds)} rounds"
    )
    for name in (
        "", "work\nmax/mean", "seconds", "/ that of\nsplit_pack", "CPU seconds\nbusiest rank", "/ that of\nsplit_pack",
        "CPU\nmax/mean", "MB sent\nmean rank", "MB sent\nbusiest",
    ):  # fmt: skip
        table.add_column(name, justify="right" if name else "left")
    for variant in VARIANTS:
        rows = [r for r in results if r.variant == variant]
        cpu_seconds = [by_rank for r in rows for by_rank in r.cpu_seconds]
        table.add_row(
            variant,
            f"{max(r.work_max_over_mean for r in rows):.3f}",
            median_and_range([t for r in rows for t in r.seconds]),
            median_and_range([x for r in rows for x in r.relative_seconds]),
            median_and_range([max(by_rank) for by_rank in cpu_seconds]),
            median_and_range([x for r in rows for x in r.relative_cpu_seconds]),
            f"{np.median([max(by_rank) / np.mean(by_rank) for by_rank in cpu_seconds]):.2f}",
            f"{np.mean([np.mean(r.bytes_sent) for r in rows]) / 1e6:.1f}",
            f"{np.mean([max(r.bytes_sent) for r in rows]) / 1e6:.1f}",
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    parser.add_argument("--rounds", type=int, default=5, help="steps with each split")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a pack")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3, help="packs")
    options = parser.parse_args(arguments)

    head, console, cases = environment(), Console(width=156), []
    settings = [
        f"data.tokens_per_pack={options.tokens}", f"model.width={options.width}", "model.heads=4", "model.depth=2",
        "codec.channels=16", "run.dtype=float32",
    ]  # fmt: skip
    for layout, (processes, axes) in LAYOUTS.items():
        config = load(None, [*settings, *axes])
        results = []
        for seed in range(options.seeds):
            results += measure(config, processes, seed, options.rounds)
        console.print(table_of(layout, processes, results))
        cases.append({"layout": layout, "processes": processes, "results": [asdict(r) for r in results]})
    note = f"processes have one thread each and share {head['cores']} cores"
    console.print(note)
    if options.out:
        mix = {"lengths": "log-normal", "shortest": SHORTEST, "longest": LONGEST, "at_standard_deviations": 3}
        write_record(options.out, head, {"note": note, "mix": mix, "settings": settings, "cases": cases})
        console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

"""Balance and traffic of a pack over many ranks: python -m benchmarks.balance [--out benchmarks/results/balance.json]

Packs of a heavy-tailed mix of images and clips are split over the ranks of a context axis in four ways:

    plain ring        contiguous runs of slots; the keys and values of every rank visit every other rank
    ring, same clip   the same runs; a hop passes only tokens whose segment the receiver has too
    USP               every segment evenly over ring ranks of 8 Ulysses ranks each: even work, and every segment travels
                      all the way round
    split_pack         ours, on a ring of all ranks and on a ring of Ulysses groups of 8 like USP's

A rank sends in a step, for each layer, of width D, on u Ulysses ranks:

    forward    K and V in bf16 to each other rank with a piece of the segment      2 x 2 D / u bytes a token and hop
    backward   K and V again; fp32 dK and dV of what it got, back to the owner     2 x 2 D / u and 2 x 4 D / u
    Ulysses    q, k, v and out in bf16, there and back, forward and backward       8 x 2 D (u - 1) / u bytes a token

USP is granted what ours has: direct hops between ranks that know the segments. Beside the hops of a token stand the
least that any plan with even ranks can do with: of all ranks, a segment of l tokens needs l / T for its tokens and
l^2 / W for its work (T, W: sums over the pack). Links are not told apart. Times are of one thread, one call before them
is not counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import surroundings, write_record
from megasora.batch import ContextSplit
from megasora.parallel.context_split import attention_work, check_lengths, split_pack, sent_tokens, sum_by, tokens

WIDTH, LAYERS = 5120, 40  # Wan-14B
ULYSSES = 8
SHORTEST, LONGEST = 64, 1_000_000  # tokens of a clip
REPEATS = 20  # times that each plan is made


# ---- the ways to split


def contiguous_split(lengths: Sequence[int] | np.ndarray, ranks: int, tokens_per_rank: int) -> ContextSplit:
    """The pack as it comes, a run of `tokens_per_rank` slots a rank. Arguments and errors as of split_pack."""
    starts = np.concatenate([[0], np.cumsum(check_lengths(lengths, ranks, tokens_per_rank))])
    ends = np.unique(np.concatenate([starts, np.arange(0, starts[-1], tokens_per_rank)]))
    segment_Q = np.searchsorted(starts, ends[:-1], side="right") - 1
    first_Q, last_Q = ends[:-1] - starts[segment_Q], ends[1:] - starts[segment_Q]
    pieces_Q4 = np.stack([ends[:-1] // tokens_per_rank, segment_Q, first_Q, last_Q], axis=1)
    return ContextSplit(ranks, tokens_per_rank, torch.from_numpy(pieces_Q4))


def even_split(lengths: Sequence[int] | np.ndarray, ranks: int, tokens_per_rank: int) -> ContextSplit:
    """Every segment over all ranks; the tokens that do not divide are dealt out, one a rank, in turn."""
    lengths_G1 = check_lengths(lengths, ranks, tokens_per_rank)[:, None]
    extra_G1 = lengths_G1 % ranks
    turn_GR = (np.arange(ranks) - (np.cumsum(extra_G1, axis=0) - extra_G1)) % ranks
    length_GR = lengths_G1 // ranks + (turn_GR < extra_G1)
    last_GR = np.cumsum(length_GR, axis=1)
    rank_Q, segment_Q = np.nonzero(length_GR.T)
    last_Q = last_GR[segment_Q, rank_Q]
    pieces_Q4 = np.stack([rank_Q, segment_Q, last_Q - length_GR[segment_Q, rank_Q], last_Q], axis=1)
    return ContextSplit(ranks, tokens_per_rank, torch.from_numpy(pieces_Q4))


@dataclass(frozen=True)
class Way:
    name: str
    split: Callable[[Sequence[int] | np.ndarray, int, int], ContextSplit]
    ulysses: int
    everything: bool = False  # every token makes every hop, whoever needs it


WAYS = (
    Way("plain ring", contiguous_split, 1, everything=True),
    Way("ring, same clip", contiguous_split, 1),
    Way("USP", even_split, ULYSSES),
    Way("split_pack, ring", split_pack, 1),
    Way(f"split_pack, {ULYSSES} x ring", split_pack, ULYSSES),
)


# ---- what is counted


def received_tokens(plan: ContextSplit) -> np.ndarray:
    """int64 [ranks]: tokens of other ranks in segments of which a rank has a piece."""
    rank_Q, segment_Q, first_Q, last_Q = plan.pieces_Q4.numpy().T
    length_G = sum_by(segment_Q, last_Q - first_Q, segment_Q.max() + 1)
    return sum_by(rank_Q, length_G[segment_Q] - (last_Q - first_Q), plan.ranks)


def bytes_a_layer(plan: ContextSplit, way: Way) -> np.ndarray:
    """float64 [ranks]: what one GPU of each ring rank sends in a layer's forward and backward; see the top."""
    here, sent, received = tokens(plan), sent_tokens(plan), received_tokens(plan)
    if way.everything:
        sent, received = here * (plan.ranks - 1), here.sum() - here
    u = way.ulysses
    ring = (sent * (2 * 2 + 2 * 2) + received * 2 * 4) * WIDTH / u
    return ring + here / u * 8 * 2 * WIDTH * (u - 1) / u


def least_hops(lengths: np.ndarray, ranks: int) -> float:
    """Hops of a token, on average over the pack, below which no plan has equal tokens and work on all ranks."""
    needed = ranks * np.maximum(lengths / lengths.sum(), lengths**2 / (lengths**2).sum())
    return float((lengths * np.maximum(needed - 1, 0)).sum() / lengths.sum())


@dataclass(frozen=True)
class Result:
    """One pack, split in one way."""

    way: str
    seed: int
    segments: int
    padding: float  # fraction of the slots
    tokens_max_over_mean: float
    work_max_over_mean: float
    hops: float  # that a token makes, on average
    least_hops: float
    mb_a_layer_mean: float  # sent by a GPU, forward and backward; 10^6 bytes
    mb_a_layer_max: float
    gb_a_step_mean: float  # all layers; 10^9 bytes
    of_usp_mean: float  # bytes, relative to USP's
    of_usp_max: float
    plan_ms: list[float]


def heavy_tailed(num_tokens: int, shortest: int, longest: int, seed: int) -> np.ndarray:
    """Lengths of images and clips, log-normal, drawn until `num_tokens` are full; who does not fit is passed over.

    `shortest` and `longest` lie three standard deviations off the median; what is beyond them is drawn again.
    """
    median, sigma = np.sqrt(shortest * longest), np.log(longest / shortest) / 6
    drawn = np.exp(np.random.default_rng(seed).normal(np.log(median), sigma, 20_000)).astype(np.int64)
    chosen = []
    for l in drawn[(drawn >= shortest) & (drawn <= longest)].tolist():
        if l <= num_tokens:
            chosen.append(l)
            num_tokens -= l
    return np.array(chosen)


def measure(ranks: int, tokens_per_rank: int, seed: int) -> list[Result]:
    """One pack in every way."""
    lengths = heavy_tailed(ranks * tokens_per_rank, SHORTEST, LONGEST, seed)
    plans: dict[str, ContextSplit] = {}
    times: dict[str, list[float]] = {}
    for way in WAYS:
        split = partial(way.split, lengths, ranks // way.ulysses, tokens_per_rank * way.ulysses)
        plans[way.name], times[way.name] = split(), []
        for _ in range(REPEATS if way.split is split_pack else 0):
            start = time.perf_counter()
            split()
            times[way.name].append(1e3 * (time.perf_counter() - start))
    sent = {way.name: bytes_a_layer(plans[way.name], way) for way in WAYS}

    results = []
    for way in WAYS:
        plan, here = plans[way.name], sent[way.name]
        hops = plan.ranks - 1 if way.everything else sent_tokens(plan).sum() / lengths.sum()
        results.append(
            Result(
                way=way.name,
                seed=seed,
                segments=len(lengths),
                padding=1 - lengths.sum() / (ranks * tokens_per_rank),
                tokens_max_over_mean=tokens(plan).max() / tokens(plan).mean(),
                work_max_over_mean=attention_work(plan).max() / attention_work(plan).mean(),
                hops=float(hops),
                least_hops=least_hops(lengths, plan.ranks),
                mb_a_layer_mean=here.mean() / 1e6,
                mb_a_layer_max=here.max() / 1e6,
                gb_a_step_mean=here.mean() * LAYERS / 1e9,
                of_usp_mean=here.mean() / sent["USP"].mean(),
                of_usp_max=here.max() / sent["USP"].max(),
                plan_ms=times[way.name],
            )
        )
    return results


# ---- what is shown

MEDIANS = ("hops", "least_hops", "mb_a_layer_mean", "mb_a_layer_max", "gb_a_step_mean", "of_usp_mean", "of_usp_max")


def table_of(ranks: int, tokens_per_rank: int, results: list[Result]) -> Table:
    """Medians over the packs; balance and planning time: the worst of them too."""
    first = results[0]
    table = Table(
        title=f"{ranks} ranks x {tokens_per_rank} tokens; {len({r.seed for r in results})} packs, "
        f"the first has {first.segments} segments and {first.padding:.3%} padding"
    )
    for name in (
        "", "tokens\nmax/mean", "work\nmax/mean", "hops\n(least)", "MB a layer\nmean rank", "MB a layer\nbusiest",
        f"GB a step\n{LAYERS} layers", "of USP\nmean", "of USP\nlow - high", "of USP\nbusiest",
        "plan, ms\nmedian (max)",
    ):  # fmt: skip
        table.add_column(name, justify="right" if name else "left")
    for way in WAYS:
        rows = [r for r in results if r.way == way.name]
        median = {f: np.median([getattr(r, f) for r in rows]) for f in MEDIANS}
        ratios, ms = [r.of_usp_mean for r in rows], [t for r in rows for t in r.plan_ms]
        table.add_row(
            way.name,
            f"{max(r.tokens_max_over_mean for r in rows):.4f}",
            f"{max(r.work_max_over_mean for r in rows):.4f}",
            f"{median['hops']:.1f} ({median['least_hops']:.1f})",
            f"{median['mb_a_layer_mean']:,.0f}",
            f"{median['mb_a_layer_max']:,.0f}",
            f"{median['gb_a_step_mean']:,.0f}",
            f"{median['of_usp_mean']:.1%}",
            f"{min(ratios):.1%} - {max(ratios):.1%}",
            f"{median['of_usp_max']:.1%}",
            f"{np.median(ms):.1f} ({max(ms):.1f})" if ms else "",
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for every number")
    parser.add_argument("--ranks", type=int, nargs="+", default=[256, 1024], help=f"multiples of {ULYSSES}")
    parser.add_argument("--tokens-per-rank", type=int, nargs="+", default=[16_384, 32_768])
    parser.add_argument("--seeds", type=int, default=5, help="packs of each size")
    options = parser.parse_args(arguments)
    for ranks in options.ranks:
        if ranks < ULYSSES or ranks % ULYSSES:
            parser.error(f"--ranks {ranks} must be a multiple of {ULYSSES}, the Ulysses ranks of USP")

    head = surroundings()
    torch.set_num_threads(1)
    console = Console(width=156)
    cases = []
    for ranks in options.ranks:
        for tokens_per_rank in options.tokens_per_rank:
            results = [r for seed in range(options.seeds) for r in measure(ranks, tokens_per_rank, seed)]
            console.print(table_of(ranks, tokens_per_rank, results))
            cases.append({"ranks": ranks, "tokens_per_rank": tokens_per_rank, "results": [asdict(r) for r in results]})
    if options.out:
        mix = {"lengths": "log-normal", "shortest": SHORTEST, "longest": LONGEST, "at_standard_deviations": 3}
        model = {"width": WIDTH, "layers": LAYERS, "ulysses": ULYSSES}
        write_record(options.out, head, {"mix": mix, "model": model, "cases": cases})
        console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

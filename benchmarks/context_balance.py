"""Balance and traffic of a pack over many ranks: python -m benchmarks.context_balance [--out FILE.json]

Packs of a heavy-tailed mix of images and clips are split over the ranks of a context axis in five variants:

    plain ring          contiguous slots; every rank sends its keys and values to every other rank
    ring, same clip     the same slots; a rank sends only tokens whose segment the receiver has too
    USP                 every segment evenly over ring ranks of 8 Ulysses ranks each: the work is even, and every token
                        is sent to all ring ranks
    split_pack, ring    MegaSora's split, on a ring of all ranks
    split_pack, 8 x ring    the same on a ring of Ulysses groups of 8, like USP's

A rank sends in a step, for each layer of width D, on u Ulysses ranks:

    forward    K and V in bf16 to each other rank with a piece of the segment      2 x 2 D / u bytes per token sent
    backward   K and V again; fp32 dK and dV of received ones, back to the owner   2 x 2 D / u and 2 x 4 D / u
    Ulysses    q, k, v and out in bf16, forward and backward                       8 x 2 D (u - 1) / u bytes per token

USP is credited with the same direct exchanges between ranks that know the segments. `sends_per_token` is compared with
the fewest that any balanced split needs: a segment of l tokens needs l / T of all ranks for its tokens and l^2 / W for
its work (T, W: sums over the pack). All links count alike. Times are of one thread, after one call that is not counted.
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

from benchmarks.record import environment, write_record
from megasora.batch import ContextSplit
from megasora.parallel.context_split import (
    attention_work_per_rank,
    check_lengths,
    received_tokens_per_rank,
    sent_tokens_per_rank,
    split_pack,
    tokens_per_rank,
)

WIDTH, LAYERS = 5120, 40  # Wan-14B
ULYSSES = 8
SHORTEST, LONGEST = 64, 1_000_000  # tokens of a clip
REPEATS = 20  # timed calls of split_pack for each pack


# ---- the variants


def contiguous_split(lengths: Sequence[int] | np.ndarray, ranks: int, slots_per_rank: int) -> ContextSplit:
    """The pack in its order, `slots_per_rank` consecutive tokens per rank. Arguments and errors as of split_pack."""
    starts = np.concatenate([[0], np.cumsum(check_lengths(lengths, ranks, slots_per_rank))])
    edges = np.unique(np.concatenate([starts, np.arange(0, starts[-1], slots_per_rank)]))
    segment_Q = np.searchsorted(starts, edges[:-1], side="right") - 1
    start_Q, stop_Q = edges[:-1] - starts[segment_Q], edges[1:] - starts[segment_Q]
    pieces_Q4 = np.stack([edges[:-1] // slots_per_rank, segment_Q, start_Q, stop_Q], axis=1)
    return ContextSplit(ranks, slots_per_rank, torch.from_numpy(pieces_Q4))


def even_split(lengths: Sequence[int] | np.ndarray, ranks: int, slots_per_rank: int) -> ContextSplit:
    """Every segment over all ranks; the remainders are assigned round-robin, one token per rank."""
    lengths_G1 = check_lengths(lengths, ranks, slots_per_rank)[:, None]
    remainder_G1 = lengths_G1 % ranks
    turn_GR = (np.arange(ranks) - (np.cumsum(remainder_G1, axis=0) - remainder_G1)) % ranks
    length_GR = lengths_G1 // ranks + (turn_GR < remainder_G1)
    stop_GR = np.cumsum(length_GR, axis=1)
    rank_Q, segment_Q = np.nonzero(length_GR.T)
    stop_Q = stop_GR[segment_Q, rank_Q]
    pieces_Q4 = np.stack([rank_Q, segment_Q, stop_Q - length_GR[segment_Q, rank_Q], stop_Q], axis=1)
    return ContextSplit(ranks, slots_per_rank, torch.from_numpy(pieces_Q4))


@dataclass(frozen=True)
class Variant:
    name: str
    split: Callable[[Sequence[int] | np.ndarray, int, int], ContextSplit]
    ulysses: int
    sends_all: bool = False  # every token goes to every rank, even to those that do not need it


VARIANTS = (
    Variant("plain ring", contiguous_split, 1, sends_all=True),
    Variant("ring, same clip", contiguous_split, 1),
    Variant("USP", even_split, ULYSSES),
    Variant("split_pack, ring", split_pack, 1),
    Variant(f"split_pack, {ULYSSES} x ring", split_pack, ULYSSES),
)


# ---- counts


def bytes_per_layer(split: ContextSplit, variant: Variant) -> np.ndarray:
    """float64 [ranks]: what one GPU of each ring rank sends in a layer's forward and backward pass; see the top."""
    tokens, sent, received = tokens_per_rank(split), sent_tokens_per_rank(split), received_tokens_per_rank(split)
    if variant.sends_all:
        sent, received = tokens * (split.ranks - 1), tokens.sum() - tokens
    u = variant.ulysses
    ring = (sent * (2 * 2 + 2 * 2) + received * 2 * 4) * WIDTH / u
    return ring + tokens / u * 8 * 2 * WIDTH * (u - 1) / u


def least_sends_per_token(lengths: np.ndarray, ranks: int) -> float:
    """Ranks that a token is sent to, on average over the pack, at least, if all ranks have equal tokens and work."""
    ranks_G = ranks * np.maximum(lengths / lengths.sum(), lengths**2 / (lengths**2).sum())
    return float((lengths * np.maximum(ranks_G - 1, 0)).sum() / lengths.sum())


@dataclass(frozen=True)
class Result:
    """One pack, split by one variant."""

    variant: str
    seed: int
    segments: int
    padding: float  # fraction of the slots
    tokens_max_over_mean: float
    work_max_over_mean: float
    sends_per_token: float  # other ranks that a token is sent to, on average
    least_sends_per_token: float  # that any balanced split needs
    mb_per_layer_mean: float  # sent by a GPU, forward and backward; 10^6 bytes
    mb_per_layer_max: float
    gb_per_step_mean: float  # all layers; 10^9 bytes
    relative_to_usp_mean: float  # bytes
    relative_to_usp_max: float
    split_ms: list[float]  # of each timed call


def heavy_tailed(num_tokens: int, shortest: int, longest: int, seed: int) -> np.ndarray:
    """int64 [G]: log-normal lengths of images and clips, at most `num_tokens` in total; longer ones are skipped.

    `shortest` and `longest` are three standard deviations from the median; lengths beyond them are discarded.
    """
    median, sigma = np.sqrt(shortest * longest), np.log(longest / shortest) / 6
    drawn = np.exp(np.random.default_rng(seed).normal(np.log(median), sigma, 20_000)).astype(np.int64)
    lengths = []
    for l in drawn[(drawn >= shortest) & (drawn <= longest)].tolist():
        if l <= num_tokens:
            lengths.append(l)
            num_tokens -= l
    return np.array(lengths)


def measure(ranks: int, slots_per_rank: int, seed: int) -> list[Result]:
    """One pack, split by every variant."""
    lengths = heavy_tailed(ranks * slots_per_rank, SHORTEST, LONGEST, seed)
    splits: dict[str, ContextSplit] = {}
    times: dict[str, list[float]] = {}
    for variant in VARIANTS:
        make_split = partial(variant.split, lengths, ranks // variant.ulysses, slots_per_rank * variant.ulysses)
        splits[variant.name], times[variant.name] = make_split(), []
        for _ in range(REPEATS if variant.split is split_pack else 0):
            start = time.perf_counter()
            make_split()
            times[variant.name].append(1e3 * (time.perf_counter() - start))
    sent_bytes = {variant.name: bytes_per_layer(splits[variant.name], variant) for variant in VARIANTS}

    results = []
    for variant in VARIANTS:
        split, sent = splits[variant.name], sent_bytes[variant.name]
        sends = split.ranks - 1 if variant.sends_all else sent_tokens_per_rank(split).sum() / lengths.sum()
        results.append(
            Result(
                variant=variant.name,
                seed=seed,
                segments=len(lengths),
                padding=1 - lengths.sum() / (ranks * slots_per_rank),
                tokens_max_over_mean=max_over_mean(tokens_per_rank(split)),
                work_max_over_mean=max_over_mean(attention_work_per_rank(split)),
                sends_per_token=float(sends),
                least_sends_per_token=least_sends_per_token(lengths, split.ranks),
                mb_per_layer_mean=sent.mean() / 1e6,
                mb_per_layer_max=sent.max() / 1e6,
                gb_per_step_mean=sent.mean() * LAYERS / 1e9,
                relative_to_usp_mean=sent.mean() / sent_bytes["USP"].mean(),
                relative_to_usp_max=sent.max() / sent_bytes["USP"].max(),
                split_ms=times[variant.name],
            )
        )
    return results


def max_over_mean(values: np.ndarray) -> float:
    return values.max() / values.mean()


# ---- output

MEDIANS = (
    "sends_per_token", "least_sends_per_token", "mb_per_layer_mean", "mb_per_layer_max", "gb_per_step_mean",
    "relative_to_usp_mean", "relative_to_usp_max",
)  # fmt: skip


def table_of(ranks: int, slots_per_rank: int, results: list[Result]) -> Table:
    """Medians over the packs; of balance the worst pack, of times the median and the longest."""
    first = results[0]
    table = Table(
        title=f"{ranks} ranks x {slots_per_rank} slots; {len({r.seed for r in results})} packs, "
        f"the first has {first.segments} segments and {first.padding:.3%} padding"
    )
    for name in (
        "", "tokens\nmax/mean", "work\nmax/mean", "sends per token\n(least)", "MB per layer\nmean rank",
        "MB per layer\nbusiest", f"GB per step\n{LAYERS} layers", "/ USP\nmean", "/ USP\nlow - high", "/ USP\nbusiest",
        "split, ms\nmedian (max)",
    ):  # fmt: skip
        table.add_column(name, justify="right" if name else "left")
    for variant in VARIANTS:
        rows = [r for r in results if r.variant == variant.name]
        median = {f: np.median([getattr(r, f) for r in rows]) for f in MEDIANS}
        ratios, ms = [r.relative_to_usp_mean for r in rows], [t for r in rows for t in r.split_ms]
        table.add_row(
            variant.name,
            f"{max(r.tokens_max_over_mean for r in rows):.4f}",
            f"{max(r.work_max_over_mean for r in rows):.4f}",
            f"{median['sends_per_token']:.1f} ({median['least_sends_per_token']:.1f})",
            f"{median['mb_per_layer_mean']:,.0f}",
            f"{median['mb_per_layer_max']:,.0f}",
            f"{median['gb_per_step_mean']:,.0f}",
            f"{median['relative_to_usp_mean']:.1%}",
            f"{min(ratios):.1%} - {max(ratios):.1%}",
            f"{median['relative_to_usp_max']:.1%}",
            f"{np.median(ms):.1f} ({max(ms):.1f})" if ms else "",
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    parser.add_argument("--ranks", type=int, nargs="+", default=[256, 1024], help=f"multiples of {ULYSSES}")
    parser.add_argument("--slots-per-rank", type=int, nargs="+", default=[16_384, 32_768])
    parser.add_argument("--seeds", type=int, default=5, help="packs of each size")
    options = parser.parse_args(arguments)
    for ranks in options.ranks:
        if ranks < ULYSSES or ranks % ULYSSES:
            parser.error(f"--ranks {ranks} must be a multiple of {ULYSSES}, the Ulysses ranks of USP")

    head = environment()
    torch.set_num_threads(1)
    console = Console(width=156)
    cases = []
    for ranks in options.ranks:
        for slots_per_rank in options.slots_per_rank:
            results = [r for seed in range(options.seeds) for r in measure(ranks, slots_per_rank, seed)]
            console.print(table_of(ranks, slots_per_rank, results))
            cases.append({"ranks": ranks, "slots_per_rank": slots_per_rank, "results": [asdict(r) for r in results]})
    if options.out:
        mix = {"lengths": "log-normal", "shortest": SHORTEST, "longest": LONGEST, "at_standard_deviations": 3}
        model = {"width": WIDTH, "layers": LAYERS, "ulysses": ULYSSES}
        write_record(options.out, head, {"mix": mix, "model": model, "cases": cases})
        console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

"""Division of a pack's backward attention into calls that keep all multiprocessors of a GPU at work.

The backward kernels of FlashAttention-2 run programs of one head of one segment, over blocks of 128 keys. Two kinds of
packs leave most multiprocessors idle:

    clips of unequal length    the deterministic kernel has ceil(multiprocessors / (segments * heads)) programs for each
                               head of each segment, short or long: with many segments, one for the longest
    few keys                   cross-attention to a caption has one block of keys: a program per head

So segments of similar length get a call of their own, and the queries of segments with few keys are cut into parts that
share their keys; the gradients of shared keys are summed in fp32, in a fixed order. `plan_calls` minimizes an estimate
of the time, in tiles: the products of a block of queries with a block of keys.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from megasora.kernels.segments import Ranges, Segments, TokenIndex, Varlen, overlap, range_indices

QUERY_BLOCK, KEY_BLOCK = 64, 128  # tokens of a tile
LEAST_PART = 16 * QUERY_BLOCK  # queries of a part, at least
CALL_TILES = 16  # time of a call on top of its programs


class Shape(NamedTuple):
    """What the planning depends on: attention heads, multiprocessors of the GPU, whether sums have a fixed order."""

    heads: int
    processors: int
    deterministic: bool


class Call(NamedTuple):
    """Some segments of a pack, or parts of them, with their tokens gathered."""

    queries: TokenIndex
    varlen: Varlen  # of the gathered queries; its `keys` are gathered from all keys


def cut_queries(queries: Ranges, keys: Ranges, shape: Shape) -> tuple[Ranges, Ranges]:
    """The segments, with the queries of each cut into parts if all segments have few programs."""
    programs = shape.heads * sum(math.ceil(length / KEY_BLOCK) for _, length in keys)
    parts = shape.processors // programs
    if parts < 2:
        return queries, keys
    cut: tuple[Ranges, Ranges] = [], []
    for (start, length), key_range in zip(queries, keys, strict=True):
        size = max(LEAST_PART, math.ceil(length / parts))
        for first in range(start, start + length, size):
            cut[0].append((first, min(size, start + length - first)))
            cut[1].append(key_range)
    return cut


def call_tiles(sizes: list[tuple[int, int]], shape: Shape) -> float:
    """Estimated time of a call in tiles. `sizes`: (blocks of queries, blocks of keys) of each segment."""
    splits = math.ceil(shape.processors / (len(sizes) * shape.heads)) if shape.deterministic else math.inf
    longest = max(rows * math.ceil(columns / min(splits, columns)) for rows, columns in sizes)
    return CALL_TILES + max(longest, shape.heads * sum(rows * columns for rows, columns in sizes) / shape.processors)


def group_segments(queries: Ranges, keys: Ranges, shape: Shape) -> list[list[int]]:
    """Indices of segments by call. Segments of one call are neighbours in the order of their size."""
    sizes = [
        (math.ceil(m / QUERY_BLOCK), math.ceil(n / KEY_BLOCK)) for (_, m), (_, n) in zip(queries, keys, strict=True)
    ]
    classes: dict[int, list[int]] = {}  # by size, within a factor of 2: they are not divided further
    for g, (rows, columns) in enumerate(sizes):
        classes.setdefault((rows * columns).bit_length(), []).append(g)
    ordered = [classes[key] for key in sorted(classes)]
    best: list[tuple[float, list[list[int]]]] = [(0.0, [])]  # of the first classes: time, and the calls
    for end in range(1, len(ordered) + 1):
        options = []
        for begin in range(end):
            members = [g for members in ordered[begin:end] for g in members]
            time = best[begin][0] + call_tiles([sizes[g] for g in members], shape)
            options.append((time, [*best[begin][1], sorted(members)]))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]


def plan_calls(segments: Segments, shape: Shape) -> tuple[Call, ...]:
    """The calls of a backward pass; one call with all segments is an empty tuple: it needs no gathering."""
    order = sorted(segments.nonempty, key=lambda g: segments.queries[g])
    queries, keys = cut_queries([segments.queries[g] for g in order], [segments.keys[g] for g in order], shape)
    groups = group_segments(queries, keys, shape)
    if len(groups) == 1 and len(queries) == len(order):
        return ()
    shared = overlap(keys)
    return tuple(
        build_call([queries[g] for g in group], [keys[g] for g in group], shared, segments.device) for group in groups
    )


def build_call(queries: Ranges, keys: Ranges, shared: bool, device: torch.device | str) -> Call:
    """`queries` in ascending order. `shared`: whether a key is in several segments, of this call or of others."""
    ends = torch.tensor([length for _, length in queries]).cumsum(0).tolist()
    gathered = [(end - length, length) for end, (_, length) in zip(ends, queries, strict=True)]
    return Call(
        TokenIndex.from_index(range_indices(queries), False, device),
        Varlen.from_ranges(gathered, keys, ends[-1], shared, device),
    )

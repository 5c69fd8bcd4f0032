"""Which queries see which keys: ranges of both in, one pair a segment; out, how kernels go over them.

    segment g: queries start_q[g] ... start_q[g] + length_q[g] - 1 see keys start_k[g] ... start_k[g] + length_k[g] - 1

Segments lie anywhere. A query is in one at most; a key may be in several; what is in none is padding. There are two
ways to go over them, made of the ranges on the CPU when first asked for, then kept for all layers:

`buckets`: segments of similar lengths side by side, padded to the longest of their bucket, for kernels that take a
batch [g, N, m, K]. Hundreds of short clips cost a few calls, one long clip costs neither padding nor copies.

`varlen`: all in one call, for kernels that take cumulative lengths. These leave no room between segments. In the order
of queries, what lies between segments or behind the last becomes a segment without keys, so that queries stay in place.
Keys stay in place where their ranges follow each other in that order, as in a pack, and are gathered elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

BUCKET_WASTE = 1.35  # a bucket's longest run of queries over its shortest
KEY_WASTE = 4.0  # and of keys: these are uneven in captions, whose padding costs little

Ranges = list[tuple[int, int]]  # (first token, number of tokens)


@dataclass(frozen=True)
class Tokens:
    """Some tokens in some order."""

    count: int
    start: int | None  # they are one run from here, so that a view takes the place of copies
    index: Tensor | None  # else int64 [count], their numbers
    shared: bool  # a token may come more than once

    @classmethod
    def from_index(cls, index: Tensor, shared: bool, device: torch.device | str) -> Tokens:
        is_run = not shared and len(index) > 0 and bool((index.diff() == 1).all())
        return cls(len(index), int(index[0]) if is_run else None, None if is_run else moved(index, device), shared)

    def take(self, x: Tensor) -> Tensor:
        """[L, ...] -> [count, ...]"""
        return x.index_select(0, self.index) if self.start is None else x.narrow(0, self.start, self.count)

    def put(self, x: Tensor, into: Tensor, deterministic: bool = True) -> None:
        """[count, ...] to their places in [L, ...]; values of a token that comes more than once add up, in one order if
        `deterministic`."""
        if self.start is not None:
            into.narrow(0, self.start, self.count).copy_(x)
        elif not self.shared:
            into.index_copy_(0, self.index, x)
        elif deterministic and into.is_cuda:  # it sorts; index_add_ adds by atomics there, and in order on a CPU
            into.index_put_((self.index,), x, accumulate=True)
        else:
            into.index_add_(0, self.index, x)


@dataclass(frozen=True)
class Side:
    """The queries, or the keys, of a bucket: [g, m] of them, m the longest segment's number."""

    shape: tuple[int, int]
    tokens: Tokens  # all g * m; a shorter segment repeats its first token
    real: Tensor | None  # bool [g, m]: what is no such repetition; None if nothing is
    real_at: Tensor | None  # int64: where the real ones are among the g * m
    real_tokens: Tokens  # these

    @classmethod
    def from_ranges(cls, ranges: Ranges, shared: bool, device: torch.device | str) -> Side:
        starts, lengths = torch.tensor(ranges).unbind(1)
        columns = torch.arange(int(lengths.max()))
        real = columns < lengths[:, None]
        index = starts[:, None] + columns.where(real, 0)
        tokens = Tokens.from_index(index.flatten(), shared, device)
        if bool(real.all()):
            return cls(tuple(index.shape), tokens, None, None, tokens)
        real_at = real.flatten().nonzero().flatten()
        real_tokens = Tokens.from_index(index[real], shared, device)
        return cls(tuple(index.shape), tokens, moved(real, device), moved(real_at, device), real_tokens)

    def take(self, x: Tensor) -> Tensor:
        """[L, ...] -> [g, m, ...]"""
        return self.tokens.take(x).unflatten(0, self.shape)

    def real_of(self, x: Tensor) -> Tensor:
        """[g, m, ...] -> [count of real_tokens, ...]"""
        flat = x.flatten(0, 1)
        return flat if self.real_at is None else flat.index_select(0, self.real_at)


class Bucket(NamedTuple):
    queries: Side
    keys: Side


@dataclass(frozen=True)
class Varlen:
    """All segments one after the other; stretches of queries without a key are segments, too."""

    cu_q: Tensor  # int32 [V + 1]: first query of each, from 0; the last entry is the number of queries
    cu_k: Tensor  # int32 [V + 1]: first of its keys among `keys`; a segment without keys repeats it
    max_q: int  # the longest segment's number of queries
    max_k: int
    keys: Tokens  # of all segments
    keyless: Tensor | None  # int64: queries without a key; None if there are none

    @classmethod
    def from_ranges(
        cls, queries: Ranges, keys: Ranges, num_queries: int, shared: bool, device: torch.device | str
    ) -> Varlen:
        """`queries` in order; no range is empty."""
        cu_q, cu_k, gaps = [0], [0], []
        for (first, length_q), (_, length_k) in [*zip(queries, keys, strict=True), ((num_queries, 0), (0, 0))]:
            if first > cu_q[-1]:
                gaps.append((cu_q[-1], first - cu_q[-1]))
                cu_q.append(first)
                cu_k.append(cu_k[-1])
            if length_q:
                cu_q.append(first + length_q)
                cu_k.append(cu_k[-1] + length_k)
        max_q, max_k = (max(b - a for a, b in zip(cu, cu[1:], strict=False)) for cu in (cu_q, cu_k))
        follow = all(
            first + length == following for (first, length), (following, _) in zip(keys, keys[1:], strict=False)
        )
        parts = [torch.tensor(cu_q), torch.tensor(cu_k), numbers(gaps), numbers([] if follow else keys)]
        on_device = moved(torch.cat(parts), device).split([len(part) for part in parts])  # in one transfer
        return cls(
            on_device[0].to(torch.int32),
            on_device[1].to(torch.int32),
            max_q,
            max_k,
            Tokens(cu_k[-1], keys[0][0] if follow else None, None if follow else on_device[3], shared),
            on_device[2] if gaps else None,
        )


@dataclass(frozen=True)
class Segments:
    """Which queries see which keys. Build one per pack and use it in every layer."""

    queries: Ranges  # of each segment
    keys: Ranges
    num_queries: int
    num_keys: int  # how many keys there must be at least
    device: torch.device | str

    @classmethod
    def from_cu_seqlens(cls, cu_q: Tensor, cu_k: Tensor, num_queries: int, device: torch.device | str) -> Segments:
        """Segments one after the other from the first token. `cu_q`, `cu_k`: integers [G + 1] on the CPU, rising, from
        0. Raises ValueError for other input."""
        for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
            if cu.ndim != 1 or len(cu) < 2 or int(cu[0]) != 0 or bool((cu.diff() < 0).any()):
                raise ValueError(f"{name} must be cumulative lengths from 0, not {cu.tolist()[:8]}")
        if len(cu_q) != len(cu_k):
            raise ValueError(f"cu_q has {len(cu_q) - 1} segments, cu_k {len(cu_k) - 1}")
        if int(cu_q[-1]) > num_queries:
            raise ValueError(f"cu_q ends at {int(cu_q[-1])}, behind the last of {num_queries} queries")
        return cls.from_ranges(cu_q[:-1], cu_q.diff(), cu_k[:-1], cu_k.diff(), num_queries, device)

    @classmethod
    def from_ranges(
        cls,
        start_q: Tensor,
        length_q: Tensor,
        start_k: Tensor,
        length_k: Tensor,
        num_queries: int,
        device: torch.device | str,
    ) -> Segments:
        """Segment g is queries `start_q[g] ...` and keys `start_k[g] ...`, so many as its lengths say; integers [G] on
        the CPU, G may be 0. A query is in one segment at most, a key may be in several. ValueError for other input."""
        queries, keys = (
            list(zip(starts.tolist(), lengths.tolist(), strict=True))
            for starts, lengths in ((start_q, length_q), (start_k, length_k))
        )
        if len(queries) != len(keys):
            raise ValueError(f"{len(queries)} ranges of queries, {len(keys)} of keys")
        if any(start < 0 or length < 0 for start, length in queries + keys):
            raise ValueError(f"ranges must not begin or end before 0: queries {queries[:4]}, keys {keys[:4]}")
        if overlap(queries):
            raise ValueError(f"a query is in two segments: {sorted(queries)[:8]}")
        if end_of(queries) > num_queries:
            raise ValueError(f"segments end at query {end_of(queries)}, behind the last of {num_queries}")
        return cls(queries, keys, num_queries, end_of(keys), device)

    @cached_property
    def at_work(self) -> list[int]:
        """Numbers of the segments that have queries and keys."""
        return [g for g in range(len(self.queries)) if self.queries[g][1] and self.keys[g][1]]

    @cached_property
    def keys_are_shared(self) -> bool:
        return overlap(self.keys)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(
            Bucket(
                Side.from_ranges([self.queries[g] for g in similar], False, self.device),
                Side.from_ranges([self.keys[g] for g in similar], self.keys_are_shared, self.device),
            )
            for close in runs_of_similar(self.at_work, [length for _, length in self.queries], BUCKET_WASTE)
            for similar in runs_of_similar(close, [length for _, length in self.keys], KEY_WASTE)
        )

    @cached_property
    def varlen(self) -> Varlen | None:
        """None where no query has a key."""
        order = sorted(self.at_work, key=lambda g: self.queries[g])
        if not order:
            return None
        queries, keys = ([ranges[g] for g in order] for ranges in (self.queries, self.keys))
        return Varlen.from_ranges(queries, keys, self.num_queries, self.keys_are_shared, self.device)


def numbers(ranges: Ranges) -> Tensor:
    """int64, on the CPU: every token of the ranges, one range after the other."""
    return torch.cat([torch.arange(start, start + length) for start, length in [(0, 0), *ranges]])


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """From the CPU to `device`, without waiting for what that still computes."""
    return x.to(device, non_blocking=True)


def overlap(ranges: Ranges) -> bool:
    ordered = sorted(r for r in ranges if r[1])
    return any(a + n > b for (a, n), (b, _) in zip(ordered, ordered[1:], strict=False))


def end_of(ranges: Ranges) -> int:
    return max((start + length for start, length in ranges), default=0)


def runs_of_similar(members: list[int], lengths: list[int], waste: float) -> list[list[int]]:
    """`members` in order of their lengths, cut where a length is more than `waste` times that of its run's first."""
    runs: list[list[int]] = []
    for g in sorted(members, key=lambda g: (lengths[g], g)):
        if runs and lengths[g] <= waste * lengths[runs[-1][0]]:
            runs[-1].append(g)
        else:
            runs.append([g])
    return runs

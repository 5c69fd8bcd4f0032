"""Attention segments: the queries of segment g attend to the keys of segment g, and to no others.

    segment g: queries start_q[g] ... start_q[g] + length_q[g] - 1, keys start_k[g] ... start_k[g] + length_k[g] - 1

Built from ranges or from cu_seqlens. Ranges may be anywhere; a query is in one segment at most, a key may be in
several; queries in none are padding. Two forms for attention kernels are computed from the ranges, on the CPU, on first
use, and reused by all layers:

`buckets`: segments of similar lengths, padded to the longest of their bucket, for kernels that take a batch
[g, N, m, K]. Hundreds of short clips need a few calls; one long clip needs neither padding nor copies.

`varlen`: one call for all segments, for kernels that take cumulative lengths, which allow no gaps. Segments are in the
order of their queries, and gaps between or after them become segments without keys, so that queries stay in place. Keys
stay in place if their ranges are contiguous in that order, as in a pack, and are gathered otherwise.

Letters: `g` segments of a bucket, `m` tokens of its longest; `V` segments of a `Varlen`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

BUCKET_WASTE = 1.35  # number of queries of a bucket's longest segment over its shortest, at most
KEY_WASTE = 4.0  # the same for keys: captions have uneven lengths, and their padding costs little

ON_CPU = {"on_cpu": True}  # metadata of fields without tensors of the device, for code that moves the others there
Ranges = list[tuple[int, int]]  # (first token, number of tokens)


@dataclass(frozen=True)
class TokenIndex:
    """Indices of some tokens of a tensor [L, ...]: a slice if they are contiguous, otherwise an index tensor."""

    count: int
    start: int | None  # of the slice, which is gathered as a view; None: see `index`
    index: Tensor | None  # int64 [count]; None: see `start`
    has_duplicates: bool  # whether an index may occur more than once

    @classmethod
    def from_index(cls, index: Tensor, has_duplicates: bool, device: torch.device | str) -> TokenIndex:
        is_slice = not has_duplicates and len(index) > 0 and bool((index.diff() == 1).all())
        if is_slice:
            return cls(len(index), int(index[0]), None, has_duplicates)
        return cls(len(index), None, to_device(index, device), has_duplicates)

    def gather(self, x: Tensor) -> Tensor:
        """[L, ...] -> [count, ...]"""
        return x.index_select(0, self.index) if self.start is None else x.narrow(0, self.start, self.count)

    def scatter(self, x: Tensor, out: Tensor, deterministic: bool = True) -> None:
        """Writes `x` [count, ...] to `out` [L, ...]. With duplicates the values of a token are added to `out`, in a
        fixed order if `deterministic`.
        """
        if self.start is not None:
            out.narrow(0, self.start, self.count).copy_(x)
        elif not self.has_duplicates:
            out.index_copy_(0, self.index, x)
        elif deterministic and out.is_cuda:  # index_put_ sorts; index_add_ uses atomics on a GPU, but not on a CPU
            out.index_put_((self.index,), x, accumulate=True)
        else:
            out.index_add_(0, self.index, x)


@dataclass(frozen=True)
class PaddedSide:
    """The queries, or the keys, of a bucket of g segments, padded to the length m of the longest: [g, m] tokens."""

    shape: tuple[int, int]
    tokens: TokenIndex  # all g * m; the padding of a segment repeats its first token
    valid: Tensor | None  # bool [g, m]: False at padding; None without padding
    valid_index: Tensor | None  # int64: indices of the valid ones among the g * m; None without padding
    valid_tokens: TokenIndex  # the tokens without padding

    @classmethod
    def from_ranges(cls, ranges: Ranges, has_duplicates: bool, device: torch.device | str) -> PaddedSide:
        starts, lengths = torch.tensor(ranges).unbind(1)
        columns = torch.arange(int(lengths.max()))
        valid = columns < lengths[:, None]
        index = starts[:, None] + columns.where(valid, 0)
        tokens = TokenIndex.from_index(index.flatten(), has_duplicates, device)
        if bool(valid.all()):
            return cls(tuple(index.shape), tokens, None, None, tokens)
        valid_index = valid.flatten().nonzero().flatten()
        valid_tokens = TokenIndex.from_index(index[valid], has_duplicates, device)
        return cls(tuple(index.shape), tokens, to_device(valid, device), to_device(valid_index, device), valid_tokens)

    def pad(self, x: Tensor) -> Tensor:
        """[L, ...] -> [g, m, ...]"""
        return self.tokens.gather(x).unflatten(0, self.shape)

    def unpad(self, x: Tensor) -> Tensor:
        """[g, m, ...] -> [valid_tokens.count, ...]"""
        flat = x.flatten(0, 1)
        return flat if self.valid_index is None else flat.index_select(0, self.valid_index)


class Bucket(NamedTuple):
    """Segments that are computed in one batched call."""

    queries: PaddedSide
    keys: PaddedSide


@dataclass(frozen=True)
class Varlen:
    """All segments as cumulative lengths; ranges of queries without keys are segments, too."""

    cu_q: Tensor  # int32 [V + 1]: first query of each segment, from 0; the last entry is the number of queries
    cu_k: Tensor  # int32 [V + 1]: first key of each segment, an index into `keys`; then their number
    max_q: int  # queries of the longest segment
    max_k: int  # the same for keys
    keys: TokenIndex  # of all segments, in order
    keyless: Tensor | None  # int64: indices of queries without keys; None if there are none

    @classmethod
    def from_ranges(
        cls, queries: Ranges, keys: Ranges, num_queries: int, has_duplicates: bool, device: torch.device | str
    ) -> Varlen:
        """`queries` in ascending order; no range is empty. `has_duplicates`: whether a key is in several segments."""
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
        contiguous = all(first + length == next_ for (first, length), (next_, _) in zip(keys, keys[1:], strict=False))
        index = range_indices([] if contiguous else keys)
        tensors = [torch.tensor(cu_q), torch.tensor(cu_k), range_indices(gaps), index]
        on_device = to_device(torch.cat(tensors), device).split([len(x) for x in tensors])  # in one transfer
        return cls(
            on_device[0].to(torch.int32),
            on_device[1].to(torch.int32),
            max_q,
            max_k,
            TokenIndex(
                cu_k[-1], keys[0][0] if contiguous else None, None if contiguous else on_device[3], has_duplicates
            ),
            on_device[2] if gaps else None,
        )


@dataclass(eq=False)  # not frozen: torch.compile of PyTorch 2.11 recompiles for each number of segments of a frozen one
class Segments:
    """The ranges of queries and of keys of each segment. Build one per pack, use it in every layer."""

    queries: Ranges = field(metadata=ON_CPU)  # one per segment
    keys: Ranges = field(metadata=ON_CPU)  # one per segment
    num_queries: int
    num_keys: int  # the least number of keys that contains all ranges
    device: torch.device  # of index tensors
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)  # of varlen_calls.py and attention_choice.py

    @classmethod
    def from_cu_seqlens(cls, cu_q: Tensor, cu_k: Tensor, num_queries: int, device: torch.device | str) -> Segments:
        """Contiguous segments from token 0 on. `cu_q`, `cu_k`: integers [G + 1] on the CPU, non-decreasing from 0.
        ValueError for other input."""
        for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
            if cu.ndim != 1 or len(cu) < 2 or int(cu[0]) != 0 or bool((cu.diff() < 0).any()):
                raise ValueError(f"{name} must be cumulative lengths from 0, not {cu.tolist()[:8]}")
        if len(cu_q) != len(cu_k):
            raise ValueError(f"cu_q has {len(cu_q) - 1} segments, cu_k {len(cu_k) - 1}")
        if int(cu_q[-1]) > num_queries:
            raise ValueError(f"cu_q ends at {int(cu_q[-1])}, after the last of {num_queries} queries")
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
        """Segment g is `length_q[g]` queries from `start_q[g]` and `length_k[g]` keys from `start_k[g]`; integers [G]
        on the CPU, G may be 0. A query is in one segment at most, a key may be in several. ValueError for other input.
        """
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
            raise ValueError(f"segments end at query {end_of(queries)}, after the last of {num_queries}")
        return cls(queries, keys, num_queries, end_of(keys), torch.device(device))

    @cached_property
    def nonempty(self) -> list[int]:
        """Indices of the segments that have queries and keys."""
        return [g for g in range(len(self.queries)) if self.queries[g][1] and self.keys[g][1]]

    @cached_property
    def keys_overlap(self) -> bool:
        return overlap(self.keys)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(
            Bucket(
                PaddedSide.from_ranges([self.queries[g] for g in similar], False, self.device),
                PaddedSide.from_ranges([self.keys[g] for g in similar], self.keys_overlap, self.device),
            )
            for close in group_similar(self.nonempty, [length for _, length in self.queries], BUCKET_WASTE)
            for similar in group_similar(close, [length for _, length in self.keys], KEY_WASTE)
        )

    @cached_property
    def equal_buckets(self) -> tuple[Bucket, ...]:
        """As `buckets`, of segments with equally many queries and equally many keys: without padding."""
        members: dict[tuple[int, int], list[int]] = {}
        for g in sorted(self.nonempty, key=lambda g: self.queries[g]):
            members.setdefault((self.queries[g][1], self.keys[g][1]), []).append(g)
        return tuple(
            Bucket(
                PaddedSide.from_ranges([self.queries[g] for g in equal], False, self.device),
                PaddedSide.from_ranges([self.keys[g] for g in equal], self.keys_overlap, self.device),
            )
            for equal in members.values()
        )

    @cached_property
    def varlen(self) -> Varlen | None:
        """None if no query has a key."""
        order = sorted(self.nonempty, key=lambda g: self.queries[g])
        if not order:
            return None
        queries, keys = ([ranges[g] for g in order] for ranges in (self.queries, self.keys))
        return Varlen.from_ranges(queries, keys, self.num_queries, self.keys_overlap, self.device)


def range_indices(ranges: Ranges) -> Tensor:
    """int64 on the CPU: the indices in all ranges, in order."""
    return torch.cat([torch.arange(start, start + length) for start, length in [(0, 0), *ranges]])


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x`, a CPU tensor, on `device`; does not synchronise with the device."""
    return x.to(device, non_blocking=True)


def overlap(ranges: Ranges) -> bool:
    """Whether an index is in more than one range."""
    ordered = sorted(r for r in ranges if r[1])
    return any(a + n > b for (a, n), (b, _) in zip(ordered, ordered[1:], strict=False))


def end_of(ranges: Ranges) -> int:
    """One past the last index of all ranges; 0 without ranges."""
    return max((start + length for start, length in ranges), default=0)


def group_similar(members: list[int], lengths: list[int], waste: float) -> list[list[int]]:
    """`members` sorted by length, in groups whose longest is at most `waste` times as long as their shortest."""
    groups: list[list[int]] = []
    for g in sorted(members, key=lambda g: (lengths[g], g)):
        if groups and lengths[g] <= waste * lengths[groups[-1][0]]:
            groups[-1].append(g)
        else:
            groups.append([g])
    return groups

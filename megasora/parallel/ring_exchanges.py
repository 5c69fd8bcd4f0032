"""Plans the exchanges of ring attention: what each rank of the ring sends, receives and computes for one pack.

    ContextSplit  --build_context_segments-->  ContextSegments: own segments, then one RingExchange per distance

At distance d, rank r sends keys and values to rank r + d and receives those of rank r - d (modulo the ring). In a pack
only tokens of one clip need each other: a rank sends another the keys of those of its clips which the other has tokens
of. Every rank knows the split, hence what all others send and receive. Pure planning: nothing here communicates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.batch import ContextSplit
from megasora.kernels.attention import Segments

SliceOrIndex = slice | Tensor  # slots of a rank: a slice, or int64 indices
Range = tuple[int, int]  # (first slot, number of tokens)
Pieces = dict[int, Range]  # of a rank, by segment


@dataclass(frozen=True)
class RingExchange:
    """What this rank sends, receives and computes at one ring distance.

    An exchange in which it does nothing is kept, because all ranks must issue their NCCL operations in the same order.
    """

    distance: int
    dst: int  # rank of the ring
    src: int
    num_sent: int  # tokens whose keys and values go to dst
    num_received: int
    sent_slots: SliceOrIndex  # of these tokens
    query_slots: SliceOrIndex  # of the queries that attend to the received keys
    segments: Segments  # of these queries, numbered from 0, and of the received keys


@dataclass(frozen=True)
class ContextSegments:
    """The attention segments of one rank of the ring. Built once per pack and used in every layer."""

    num_slots: int  # of a rank of the ring
    local: Segments  # queries and keys of this rank
    exchanges: tuple[RingExchange, ...]  # at each distance at which any two ranks exchange keys, nearest first


def build_context_segments(split: ContextSplit, rank: int, device: torch.device | str) -> ContextSegments:
    """What rank `rank` of the ring computes, sends and receives. ValueError as of `pieces_by_rank`."""
    pieces = pieces_by_rank(split)
    ranges = list(pieces[rank].values())
    local = segments_from_pieces(ranges, ranges, split.slots_per_rank, device)
    exchanges = (build_exchange(pieces, rank, distance, device) for distance in ring_distances(split))
    return ContextSegments(split.slots_per_rank, local, tuple(exchanges))


def build_exchange(pieces: list[Pieces], rank: int, distance: int, device: torch.device | str) -> RingExchange:
    """The exchange of `rank` at `distance`, from the pieces of all ranks of the ring."""
    dst, src = (rank + distance) % len(pieces), (rank - distance) % len(pieces)
    local = pieces[rank]
    sent = [piece for segment, piece in local.items() if segment in pieces[dst]]
    received = contiguous_pieces({s: length for s, (_, length) in pieces[src].items() if s in local})
    queries = {segment: piece for segment, piece in local.items() if segment in received}
    query_ranges = contiguous_pieces({segment: length for segment, (_, length) in queries.items()})
    num_queries = sum(length for _, length in queries.values())
    return RingExchange(
        distance,
        dst,
        src,
        num_sent=sum(length for _, length in sent),
        num_received=sum(length for _, length in received.values()),
        sent_slots=slice_or_index(sent, device),
        query_slots=slice_or_index(list(queries.values()), device),
        segments=segments_from_pieces(
            list(query_ranges.values()), [received[segment] for segment in queries], num_queries, device
        ),
    )


def pieces_by_rank(split: ContextSplit) -> list[Pieces]:
    """The pieces of each rank with the slots they fill. ValueError if a rank has two pieces of one segment."""
    result: list[Pieces] = [{} for _ in range(split.ranks)]
    filled = [0] * split.ranks
    for rank, segment, start, stop in split.pieces_Q4.tolist():
        if stop > start:
            if segment in result[rank]:
                raise ValueError(f"rank {rank} has two pieces of segment {segment}; a split may give it one")
            result[rank][segment] = (filled[rank], stop - start)
            filled[rank] += stop - start
    return result


def ring_distances(split: ContextSplit) -> list[int]:
    """All distances on the ring, rising, between two ranks that have tokens of one segment."""
    nonempty_Q4 = split.pieces_Q4[split.pieces_Q4[:, 3] > split.pieces_Q4[:, 2]]
    rank_Q, segment_Q = nonempty_Q4[:, 0], nonempty_Q4[:, 1]
    occurs = torch.zeros(split.ranks, dtype=torch.bool)
    segments, counts = segment_Q.unique(return_counts=True)
    for segment in segments[counts > 1]:
        ranks = rank_Q[segment_Q == segment]
        occurs[((ranks[:, None] - ranks) % split.ranks).flatten()] = True
    occurs[0] = False
    return occurs.nonzero().flatten().tolist()


def contiguous_pieces(lengths: dict[int, int]) -> Pieces:
    """Pieces of these lengths, one directly after the other from slot 0."""
    result, start = {}, 0
    for segment, length in lengths.items():
        result[segment] = (start, length)
        start += length
    return result


def segments_from_pieces(
    queries: list[Range], keys: list[Range], num_queries: int, device: torch.device | str
) -> Segments:
    """Attention segments: the queries of range g attend to the keys of range g."""
    (start_q, length_q), (start_k, length_k) = (
        torch.tensor(ranges, dtype=torch.int64).view(-1, 2).unbind(1) for ranges in (queries, keys)
    )
    return Segments.from_ranges(start_q, length_q, start_k, length_k, num_queries, device)


def slice_or_index(ranges: list[Range], device: torch.device | str) -> SliceOrIndex:
    """The slots of ranges in rising order: a slice, which needs no copy, if they are adjacent, else int64 indices."""
    if all(start + length == following for (start, length), (following, _) in zip(ranges, ranges[1:], strict=False)):
        return slice(ranges[0][0], sum(ranges[-1])) if ranges else slice(0, 0)
    return torch.cat([torch.arange(start, start + length) for start, length in ranges]).to(device)

"""Splits a pack over the ranks of the ring so that each has equal tokens and equal attention work.

    lengths of the segments  --split_pack-->  ContextSplit

A token attends to its whole segment, so a piece of x tokens of a segment of l tokens is x l work. With T = sum(l),
W = sum(l^2) and R ranks, each rank must get T / R tokens and W / R work. Balancing two sums at once looks like a
search, but sorting leaves nothing to search:

    Concatenate the segments, longest first: the work of a token falls from left to right. Move a window of fixed size
    over them: the work inside falls from more than the window's fraction of W to less, so at some position it is
    exactly that fraction. Let window r be the one with T (R - r) / R tokens and W (R - r) / R work: what remains after
    r ranks. By the same argument, a window that has its fraction contains a smaller one that has its own: the windows
    are nested, and rank r gets what is inside window r and outside window r + 1.

    longest segment |<------------------------------- window 0 ------------------------------->| shortest segment
                     rank 0 |<----------------------- window 1 ------------------->|   rank 0
                             rank 1 |<---------------- window 2 ------------>| rank 1

So a rank has a range of long segments from the left and a range of short ones from the right. The longest segments are
combined with the shortest, which cost the least work, and are on no more ranks than their work needs. That keeps the
traffic low, as a token of a segment on n ranks is sent to n - 1 others. The pieces of a segment are on consecutive
ranks; a short segment is split only at a border between two ranks. The balance is exact up to rounding to whole
tokens. The windows do not depend on each other: one vectorised bisection finds them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megasora.batch import ContextSplit

MAX_TOKENS = 1 << 31  # of a pack: the sum of the squares of its lengths fits int64


def split_pack(lengths: Sequence[int] | np.ndarray, ranks: int, slots_per_rank: int) -> ContextSplit:
    """Splits segments of `lengths` tokens [G] over `ranks` ranks of `slots_per_rank` slots.

    The token counts of two ranks differ by at most one, their attention work by at most that of one or two tokens.
    Depends on its arguments only; a rank's pieces are in the order of the segments. ValueError if a length is below 1
    or the tokens do not fit.
    """
    lengths_G = check_lengths(lengths, ranks, slots_per_rank)
    order_G = np.argsort(-lengths_G, kind="stable")
    segments = SortedSegments(lengths_G[order_G])
    lefts, rights = nested_windows(segments, ranks)

    # Left of the last window, which is empty, the ranks have one range each, in rising order; right of it, in reverse.
    borders = np.concatenate([lefts, rights[-2::-1]])
    border_ranks = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])

    edges = np.unique(np.concatenate([borders, segments.starts]))
    start_Q, stop_Q = edges[:-1], edges[1:]
    rank_Q = border_ranks[np.searchsorted(borders, start_Q, side="right") - 1]
    sorted_Q = segments.segment_at(start_Q)
    segment_Q, segment_start_Q = order_G[sorted_Q], segments.starts[sorted_Q]
    pieces_Q4 = np.stack([rank_Q, segment_Q, start_Q - segment_start_Q, stop_Q - segment_start_Q], axis=1)
    pieces_Q4 = pieces_Q4[np.lexsort((segment_Q, rank_Q))]
    return ContextSplit(ranks, slots_per_rank, torch.from_numpy(pieces_Q4))


def check_lengths(lengths: Sequence[int] | np.ndarray, ranks: int, slots_per_rank: int) -> np.ndarray:
    """The lengths as int64 [G]. ValueError if they are not a pack of at most `ranks` x `slots_per_rank` tokens."""
    lengths_G = np.asarray(lengths)
    if lengths_G.ndim != 1 or not len(lengths_G) or lengths_G.dtype.kind not in "iu":
        raise ValueError(
            f"lengths must be one or more integers, not {lengths_G.dtype} of shape {list(lengths_G.shape)}"
        )
    if ranks < 1 or slots_per_rank < 1:
        raise ValueError(f"ranks={ranks} and slots_per_rank={slots_per_rank} must be at least 1")
    if lengths_G.min() < 1:
        shortest = int(lengths_G.argmin())
        raise ValueError(f"lengths[{shortest}]={lengths_G[shortest]} must be at least 1")
    tokens, slots = sum(lengths_G.tolist()), ranks * slots_per_rank
    if tokens > slots:
        raise ValueError(f"{tokens} tokens are more than the {ranks} ranks x {slots_per_rank} slots = {slots}")
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens are more than a pack can have, {MAX_TOKENS}")
    return lengths_G.astype(np.int64)


class SortedSegments:
    """Segments concatenated, longest first: their first tokens, and the attention work of any range of tokens."""

    def __init__(self, lengths_G: np.ndarray) -> None:
        self.starts = np.concatenate([[0], np.cumsum(lengths_G)])  # [G + 1]
        self.tokens = int(self.starts[-1])
        self.work_before = np.concatenate([[0], np.cumsum(lengths_G**2)])  # [G + 1]
        self.work = int(self.work_before[-1])
        self.work_of_token = np.append(lengths_G, 0)  # 0: after the last segment

    def segment_at(self, token: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, token, side="right") - 1

    def work_up_to(self, token: np.ndarray) -> np.ndarray:
        segment = self.segment_at(token)
        return self.work_before[segment] + (token - self.starts[segment]) * self.work_of_token[segment]


def nested_windows(segments: SortedSegments, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """First token, and one past the last, of the windows 0 .. R: int64 [R + 1]; lefts never fall, rights never rise.

    Each is the leftmost window with no more than its fraction of the work. That nests them whatever the rounding: one
    window further left has more than its fraction, and so has any smaller one that begins there or before; while a
    smaller one that ends with the window, or after it, has no more than its fraction. And no rank gets two pieces of a
    segment: with both ends in one segment the window could be further left in it.
    """
    sizes = segments.tokens - np.arange(ranks + 1) * segments.tokens // ranks
    quotient, remainder = divmod(segments.work, segments.tokens)  # sizes * work would not fit int64
    limits = sizes * quotient + sizes * remainder // segments.tokens

    low, high = np.zeros_like(sizes), segments.tokens - sizes  # the rightmost has the least work: never above its limit
    while (low < high).any():
        middle = (low + high) // 2
        fits = segments.work_up_to(middle + sizes) - segments.work_up_to(middle) <= limits
        low, high = np.where(fits, low, middle + 1), np.where(fits, middle, high)
    low[-1] = low[-2]  # the empty window fits anywhere: the last rank's tokens are all to the right of it
    return low, low + sizes


def tokens_per_rank(split: ContextSplit) -> np.ndarray:
    """int64 [ranks]: tokens of each rank, without padding."""
    rank_Q, _, start_Q, stop_Q = split.pieces_Q4.numpy().T
    return sum_by(rank_Q, stop_Q - start_Q, split.ranks)


def attention_work_per_rank(split: ContextSplit) -> np.ndarray:
    """int64 [ranks]: pairs of a query of the rank and a key of the query's segment."""
    rank_Q, segment_Q, start_Q, stop_Q = split.pieces_Q4.numpy().T
    length_G = sum_by(segment_Q, stop_Q - start_Q, segment_Q.max() + 1)
    return sum_by(rank_Q, (stop_Q - start_Q) * length_G[segment_Q], split.ranks)


def sent_tokens_per_rank(split: ContextSplit) -> np.ndarray:
    """int64 [ranks]: tokens whose keys and values each rank sends in one forward pass of a layer.

    A token counts once for each other rank that has a piece of its segment.
    """
    rank_Q, segment_Q, start_Q, stop_Q = split.pieces_Q4.numpy().T
    ranks_G = np.bincount(segment_Q)
    return sum_by(rank_Q, (stop_Q - start_Q) * (ranks_G[segment_Q] - 1), split.ranks)


def received_tokens_per_rank(split: ContextSplit) -> np.ndarray:
    """int64 [ranks]: tokens whose keys and values each rank receives in one forward pass of a layer.

    The backward pass sends the gradients of these back.
    """
    rank_Q, segment_Q, start_Q, stop_Q = split.pieces_Q4.numpy().T
    length_G = sum_by(segment_Q, stop_Q - start_Q, segment_Q.max() + 1)
    return sum_by(rank_Q, length_G[segment_Q] - (stop_Q - start_Q), split.ranks)


def sum_by(key_Q: np.ndarray, value_Q: np.ndarray, num_keys: int) -> np.ndarray:
    """int64 [num_keys]: sums of the values with the same key; np.bincount would round above 2^53."""
    sums = np.zeros(num_keys, dtype=np.int64)
    np.add.at(sums, key_Q, value_Q)
    return sums

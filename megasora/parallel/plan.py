"""Which rank gets which tokens of a pack: lengths of segments in, a PackPlan out; tokens and attention work are equal.

A token attends to its whole segment, so a piece of x tokens of a segment of l tokens is x l work. With T = sum(l),
W = sum(l^2) and R ranks, each must have T / R tokens and W / R work. Two sums to even out at once sound like a search,
but sorting leaves nothing to search:

    Lay the segments on a line, longest first: the work of a token falls from left to right. Slide a window of fixed
    size along it: the work inside falls from more than the window's share of W to less, so somewhere it is exactly its
    share. Let window r be the one of T (R - r) / R tokens and W (R - r) / R work: what is left after r ranks. In a
    window that has its share there is, by the same argument, room for a smaller one that has its share: the windows
    are nested, and rank r gets what is inside window r and outside window r + 1.

    longest segment |<------------------------------- window 0 ------------------------------->| shortest segment
                     rank 0 |<----------------------- window 1 ------------------->|   rank 0
                             rank 1 |<---------------- window 2 ------------>| rank 1

So a rank has a run of long segments from the left and a run of short ones from the right. The longest meet the
shortest, which cost the least work, and take only as many ranks as can carry theirs. That keeps the traffic low, as
a token of a segment on n ranks is sent to n - 1 others. The pieces of a segment lie on consecutive ranks; short
segments are cut only where two ranks meet. Shares are exact but for the rounding of a token. The windows do not depend
on each other: one bisection finds them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megasora.batch import PackPlan

MOST_TOKENS = 1 << 31  # of a pack: the sum of the squares of its lengths fits int64


def plan_pack(lengths: Sequence[int] | np.ndarray, ranks: int, tokens_per_rank: int) -> PackPlan:
    """Pieces of segments of `lengths` tokens [G] for `ranks` ranks of `tokens_per_rank` slots.

    Token counts of two ranks differ by one at most, their attention work by the work of one or two tokens. Depends on
    nothing but its arguments; a rank's pieces are in the order of the segments. ValueError if a length is below 1 or
    the tokens do not fit.
    """
    lengths_G = check_lengths(lengths, ranks, tokens_per_rank)
    order_G = np.argsort(-lengths_G, kind="stable")
    line = Line(lengths_G[order_G])
    lefts, rights = nested_windows(line, ranks)

    # Left of the last window, which is empty, each rank in turn has a run of the line; right of it, in reverse.
    cuts = np.concatenate([lefts, rights[-2::-1]])
    owners = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])

    ends = np.unique(np.concatenate([cuts, line.starts]))
    first_Q, last_Q = ends[:-1], ends[1:]
    rank_Q = owners[np.searchsorted(cuts, first_Q, side="right") - 1]
    at_Q = line.segment_at(first_Q)
    segment_Q, begin_Q = order_G[at_Q], line.starts[at_Q]
    pieces_Q4 = np.stack([rank_Q, segment_Q, first_Q - begin_Q, last_Q - begin_Q], axis=1)
    pieces_Q4 = pieces_Q4[np.lexsort((segment_Q, rank_Q))]
    return PackPlan(ranks, tokens_per_rank, torch.from_numpy(pieces_Q4))


def check_lengths(lengths: Sequence[int] | np.ndarray, ranks: int, tokens_per_rank: int) -> np.ndarray:
    """The lengths as int64 [G]. ValueError if they are no pack of at most `ranks` x `tokens_per_rank` tokens."""
    lengths_G = np.asarray(lengths)
    if lengths_G.ndim != 1 or not len(lengths_G) or lengths_G.dtype.kind not in "iu":
        raise ValueError(
            f"lengths must be one or more integers, not {lengths_G.dtype} of shape {list(lengths_G.shape)}"
        )
    if ranks < 1 or tokens_per_rank < 1:
        raise ValueError(f"ranks={ranks} and tokens_per_rank={tokens_per_rank} must be at least 1")
    if lengths_G.min() < 1:
        shortest = int(lengths_G.argmin())
        raise ValueError(f"lengths[{shortest}]={lengths_G[shortest]} must be at least 1")
    tokens, slots = sum(lengths_G.tolist()), ranks * tokens_per_rank
    if tokens > slots:
        raise ValueError(f"{tokens} tokens are more than {ranks} ranks x {tokens_per_rank} tokens = {slots} hold")
    if tokens > MOST_TOKENS:
        raise ValueError(f"{tokens} tokens are more than a pack can have, {MOST_TOKENS}")
    return lengths_G.astype(np.int64)


class Line:
    """Segments side by side, longest first: their first tokens, and the work of any stretch of tokens."""

    def __init__(self, lengths_G: np.ndarray) -> None:
        self.starts = np.concatenate([[0], np.cumsum(lengths_G)])  # [G + 1]
        self.tokens = int(self.starts[-1])
        self.work_before = np.concatenate([[0], np.cumsum(lengths_G**2)])  # [G + 1]
        self.work = int(self.work_before[-1])
        self.work_of_token = np.append(lengths_G, 0)  # 0: behind the last

    def segment_at(self, token: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, token, side="right") - 1

    def work_up_to(self, token: np.ndarray) -> np.ndarray:
        at = self.segment_at(token)
        return self.work_before[at] + (token - self.starts[at]) * self.work_of_token[at]


def nested_windows(line: Line, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """First and one past last token of the windows 0 .. R: int64 [R + 1], lefts never fall, rights never rise.

    Each is the leftmost with no more than its share of the work. That nests them whatever the rounding: one window
    further left has more than its share, and so has any smaller one that begins there or before; while a smaller one
    that ends with the window, or behind it, has no more than its share. And no rank gets two pieces of a segment: with
    both ends in one segment a window could lie further left in it.
    """
    sizes = line.tokens - np.arange(ranks + 1) * line.tokens // ranks
    whole, rest = divmod(line.work, line.tokens)  # sizes * work would not fit int64
    shares = sizes * whole + sizes * rest // line.tokens

    low, high = np.zeros_like(sizes), line.tokens - sizes  # the rightmost has the least work: never above its share
    while (low < high).any():
        middle = (low + high) // 2
        fits = line.work_up_to(middle + sizes) - line.work_up_to(middle) <= shares
        low, high = np.where(fits, low, middle + 1), np.where(fits, middle, high)
    low[-1] = low[-2]  # the empty window fits anywhere: the last rank's tokens are all to the right of it
    return low, low + sizes


def tokens(plan: PackPlan) -> np.ndarray:
    """int64 [ranks]: real tokens of each rank."""
    rank_Q, _, first_Q, last_Q = plan.pieces_Q4.numpy().T
    return sum_by(rank_Q, last_Q - first_Q, plan.ranks)


def attention_work(plan: PackPlan) -> np.ndarray:
    """int64 [ranks]: pairs of a query of the rank and a key of the query's segment."""
    rank_Q, segment_Q, first_Q, last_Q = plan.pieces_Q4.numpy().T
    length_G = sum_by(segment_Q, last_Q - first_Q, segment_Q.max() + 1)
    return sum_by(rank_Q, (last_Q - first_Q) * length_G[segment_Q], plan.ranks)


def sent_tokens(plan: PackPlan) -> np.ndarray:
    """int64 [ranks]: tokens whose keys and values each rank sends in one forward pass of a layer.

    A token counts once for each other rank that has a piece of its segment.
    """
    rank_Q, segment_Q, first_Q, last_Q = plan.pieces_Q4.numpy().T
    ranks_G = np.bincount(segment_Q)
    return sum_by(rank_Q, (last_Q - first_Q) * (ranks_G[segment_Q] - 1), plan.ranks)


def sum_by(key_Q: np.ndarray, value_Q: np.ndarray, num_keys: int) -> np.ndarray:
    """int64 [num_keys]: sums of the values with the same key; np.bincount would round above 2^53."""
    sums = np.zeros(num_keys, dtype=np.int64)
    np.add.at(sums, key_Q, value_Q)
    return sums

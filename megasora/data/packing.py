"""Bin packing of clips: token counts in; packs (bins) of at most `capacity` tokens out. No clip is split.

    place the long clips so that packs cost the same (long_clips.py)
    unplaced = the other clips, in the order of the epoch; queue = all packs
    while there are more than MAX_BEST_FIT_CLIPS unplaced clips:
        if the queue is empty: append new packs for the unplaced tokens
        sequence, reserve = the first half of `unplaced`, the rest sorted by length
        next-fit: put the sequence into the queued packs; a clip that does not fit starts the next pack
        up to MAX_SWAP_ROUNDS times, in all these packs at once: swap one clip of the pack, or nothing, for the longest
            reserve clip that still fits into the freed space
        unplaced = what remains in the reserve, with the clips that were swapped out
    best-fit decreasing: put the last few clips, longest first, each into the fullest pack that has space for it

Next-fit leaves about half a clip of free space per pack. A pack has several clips to swap and the reserve has clips of
all lengths, so one or two swaps fill the pack exactly. Swaps take clips of all lengths, so the reserve stays a sample
of the whole: short clips, which fill any gap, are not used up early. If clips have only few different lengths, placing
the long ones first can prevent full packs; then all clips are packed as `unplaced`, and the result with fewer packs is
used.

Letters: `I` clips (items), `B` packs (bins), `J` placed clips, as pairs of `pack_J` and `clip_J`. Everything is
computed on whole arrays in integers, so that every machine finds the same packs.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np

from megasora.data.long_clips import place_long_clips

MAX_BEST_FIT_CLIPS = 64  # at most so many clips are packed one by one
MAX_SWAP_ROUNDS = 16  # few packs gain from more
FULL_SLACK_DIVISOR = 8192  # a pack with at most capacity / 8192 free tokens is full
LITTLE_SPACE_DIVISOR = 3  # packs with less than capacity / 3 free tokens are filled first, the fullest in front
EXTRA_PACKS_DIVISOR = 1000  # with over 1 + 1/1000 packs more than the least number, try without placing long clips


@dataclass(frozen=True)
class Packs:
    """`B` packs of `I` clips; pack b has the clips `clip_I[cu_packs[b] : cu_packs[b + 1]]`."""

    clip_I: np.ndarray  # int64: indices into the token counts that were packed
    cu_packs: np.ndarray  # int64 [B + 1]

    def __len__(self) -> int:
        return len(self.cu_packs) - 1

    def __getitem__(self, b: int) -> np.ndarray:
        return self.clip_I[self.cu_packs[b] : self.cu_packs[b + 1]]

    def sums(self, values_I: np.ndarray) -> np.ndarray:
        """int64 [B]: the sum of a value per clip over the clips of each pack."""
        running = np.append(0, np.cumsum(values_I[self.clip_I]))
        return running[self.cu_packs[1:]] - running[self.cu_packs[:-1]]


def pack_clips(tokens_I: np.ndarray, capacity: int, packs_per_step: int = 1) -> Packs:
    """Packs clips of `tokens_I` tokens, int64, each from 1 to `capacity`. A pure function of its arguments.

    `packs_per_step`: where not all packs can have the same cost, groups of so many do. Raises ValueError if a clip has
    no tokens or more than `capacity`.
    """
    if len(tokens_I) and not 1 <= tokens_I.min() <= tokens_I.max() <= capacity:
        raise ValueError(f"clips of {tokens_I.min()} to {tokens_I.max()} tokens in packs of {capacity}")
    pack_I, least_packs = place_long_clips(tokens_I, capacity, packs_per_step)
    packs = fill_packs(tokens_I, capacity, pack_I, least_packs)
    if len(packs) > least_packs + 1 + least_packs // EXTRA_PACKS_DIVISOR:
        unbalanced = fill_packs(tokens_I, capacity, np.full(len(tokens_I), -1), least_packs)
        packs = min(packs, unbalanced, key=len)
    return packs


def fill_packs(tokens_I: np.ndarray, capacity: int, pack_I: np.ndarray, num_packs: int) -> Packs:
    """Packs all clips; those that already have a pack in `pack_I` (not -1) keep it. Writes to `pack_I`.

    `num_packs`: packs to begin with; more are added if needed.
    """
    unplaced, placed = np.flatnonzero(pack_I < 0), np.flatnonzero(pack_I >= 0)
    free_B = capacity - np.bincount(pack_I[placed], tokens_I[placed], num_packs).astype(np.int64)
    first_clip_B = np.full(num_packs, len(tokens_I))  # packs are filled in the random order of their first clips
    first_clip_B[pack_I[placed[::-1]]] = placed[::-1]
    queue = np.lexsort((first_clip_B, np.minimum(free_B, capacity // LITTLE_SPACE_DIVISOR)))
    while len(unplaced) > MAX_BEST_FIT_CLIPS:
        if not len(queue):  # some clips do not fit together: more packs than the least are needed
            queue = np.arange(num_packs, num_packs - (-int(tokens_I[unplaced].sum()) // capacity))
            num_packs, free_B = num_packs + len(queue), np.append(free_B, np.full(len(queue), capacity))
        cu_sequence = next_fit(tokens_I[unplaced[: len(unplaced) // 2]], free_B[queue])
        filled, queue = np.split(queue, [len(cu_sequence) - 1])
        if not len(filled):
            break
        pack_J = np.repeat(np.arange(len(filled)), np.diff(cu_sequence))
        sequence, reserve = np.split(unplaced, [cu_sequence[-1]])
        pack_J, clip_J, unplaced = swap_clips(tokens_I, capacity, free_B[filled], pack_J, sequence, reserve)
        pack_I[clip_J] = filled[pack_J]
    best_fit_decreasing(tokens_I, capacity, unplaced, free_B, queue, pack_I)
    counts = np.bincount(pack_I)
    return Packs(np.argsort(pack_I, kind="stable"), np.append(0, np.cumsum(counts[counts > 0])))


def next_fit(tokens_J: np.ndarray, free_B: np.ndarray) -> np.ndarray:
    """int64: a sequence of clips divided into packs of `free_B` free tokens: 0, end of the first pack, of the second
    ...

    The clips after the last end, which may fill no pack, are not placed.
    """
    ends = np.cumsum(tokens_J).tolist()
    starts, cu_sequence = [0, *ends], [0]
    for free in free_B.tolist():
        end = bisect.bisect_right(ends, starts[cu_sequence[-1]] + free, cu_sequence[-1])
        if end == len(ends):
            break
        cu_sequence.append(end)
    return np.array(cu_sequence)


def swap_clips(
    tokens_I: np.ndarray, capacity: int, free_B: np.ndarray, pack_J: np.ndarray, clip_J: np.ndarray, reserve: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fills packs by swapping their clips for longer ones of the reserve.

    `free_B`: free tokens of the packs without the clips `clip_J`. Returns `pack_J` and `clip_J` after the swaps,
    unsorted, and the reserve in the order of the epoch.
    """
    tokens, no_clip, every_pack = np.append(tokens_I, 0), len(tokens_I), np.arange(len(free_B))
    free_B = free_B - np.bincount(pack_J, tokens[clip_J], len(free_B)).astype(np.int64)
    # each pack can also swap nothing for a reserve clip: a clip without tokens
    pack_J, clip_J = np.append(every_pack, pack_J), np.append(np.full(len(every_pack), no_clip), clip_J)
    done = []
    for _ in range(MAX_SWAP_ROUNDS):
        has_space = free_B[pack_J] > capacity // FULL_SLACK_DIVISOR
        done.append((pack_J[~has_space], clip_J[~has_space]))
        pack_J, clip_J = pack_J[has_space], clip_J[has_space]
        order = np.argsort(pack_J, kind="stable")
        pack_J, clip_J = pack_J[order], clip_J[order]
        reserve = reserve[np.argsort(tokens[reserve], kind="stable")]
        out_j, in_r = best_swaps(tokens[clip_J], pack_J, free_B, tokens[reserve])
        if not len(out_j):
            break
        clips_out, clips_in, pack = clip_J[out_j], reserve[in_r], pack_J[out_j]
        free_B[pack] -= tokens[clips_in] - tokens[clips_out]
        added = clips_out == no_clip
        clip_J[out_j[~added]] = clips_in[~added]
        pack_J, clip_J = np.append(pack_J, pack[added]), np.append(clip_J, clips_in[added])
        reserve = np.append(np.delete(reserve, in_r), clips_out[~added])
    done.append((pack_J, clip_J))
    pack_J, clip_J = (np.concatenate(parts) for parts in zip(*done, strict=True))
    is_clip = clip_J != no_clip
    return pack_J[is_clip], clip_J[is_clip], np.sort(reserve)


def best_swaps(
    tokens_J: np.ndarray, pack_J: np.ndarray, free_B: np.ndarray, reserve_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The swap that fills each pack best, at most one per pack: (indices of clips to swap out, of reserve clips).

    `pack_J` and `reserve_tokens` are sorted. If several packs want reserve clips of one length and there are too few,
    the last packs get none.
    """
    if not len(tokens_J) or not len(reserve_tokens):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    best_J = np.searchsorted(reserve_tokens, tokens_J + free_B[pack_J], side="right") - 1
    gain_J = np.where(best_J >= 0, reserve_tokens[best_J] - tokens_J, 0)
    first = np.flatnonzero(np.diff(pack_J, prepend=-1))
    best_gain_J = np.repeat(np.maximum.reduceat(gain_J, first), np.diff(first, append=len(pack_J)))
    out_j = np.flatnonzero((gain_J == best_gain_J) & (gain_J > 0))
    out_j = out_j[np.diff(pack_J[out_j], prepend=-1) > 0]
    out_j = out_j[np.argsort(best_J[out_j], kind="stable")]
    best = best_J[out_j]  # the last reserve clip of its length; each further pack takes the one before
    first = np.flatnonzero(np.diff(best, prepend=-1))
    in_r = best - (np.arange(len(best)) - np.repeat(first, np.diff(first, append=len(best))))
    available = (in_r >= 0) & (reserve_tokens[np.maximum(in_r, 0)] == reserve_tokens[best])
    return out_j[available], in_r[available]


def best_fit_decreasing(
    tokens_I: np.ndarray, capacity: int, unplaced: np.ndarray, free_B: np.ndarray, queue: np.ndarray, pack_I: np.ndarray
) -> None:
    """Places the clips `unplaced`, longest first, each into the queued pack with the least free space that suffices.

    If there is none, a new pack is opened. Writes to `pack_I`.
    """
    bins = sorted(zip(free_B[queue].tolist(), queue.tolist(), strict=True))
    num_packs, order = len(free_B), unplaced[np.argsort(-tokens_I[unplaced], kind="stable")]
    for clip, tokens in zip(order.tolist(), tokens_I[order].tolist(), strict=True):
        best = bisect.bisect_left(bins, (tokens, -1))
        free, pack = bins.pop(best) if best < len(bins) else (capacity, num_packs)
        num_packs = max(num_packs, pack + 1)
        pack_I[clip] = pack
        bisect.insort(bins, (free - tokens, pack))

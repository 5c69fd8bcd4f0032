"""Places the long clips into packs so that packs cost the same. Token counts in; a pack for each long clip out.

Long clips are the longest quarter, without those of at most 1/256 of a pack. The attention cost of a full pack is the
sum of l^2 over its clips of l tokens, and long clips make nearly all of its differences. They are therefore placed
before the short clips, which then fill the packs (packing.py):

    mean       = sum(l^2) / sum(l) over the short clips          cost of one token of them
    surplus(l) = l (l - mean)                                    cost of a long clip beyond short clips in its place

    targets of the packs' sums of surplus, for equal costs:
        for each group of packs_per_step packs and as many clips, longest clips first:
            average = (surplus of all long clips - targets so far) / packs without a target
            if surplus(longest clip of the group) > average:
                it is the target of all packs of the group; each of them gets one clip of the group
            else: `average` is the target of all remaining packs; stop
    until no clip fits:
        every pack takes the longest clip within its remaining target and its free space;
        the pack that can take the longest chooses first
    clips that fit no target: the same, by free space alone

So packs that must cost more than the average come in groups of equal cost, one group per step. Part of each pack is not
given to long clips, so that short clips are in all packs, not only where long clips leave gaps.

Letters: `I` clips, `J` long clips, longest first, `B` packs, `G` groups of packs. All arithmetic is in integers, on
whole arrays, so that every machine finds the same packs.
"""

from __future__ import annotations

import numpy as np

LONG_CLIPS_DIVISOR = 4  # at most 1/4 of the clips are long: the others suffice to fill every pack exactly
MIN_LONG_DIVISOR = 256  # a clip of at most capacity / 256 tokens is never long: it hardly changes the cost of a pack
SHORT_SPACE_DIVISOR = 4  # space kept for short clips: at most 1/4 of what the first clip of a pack leaves


def place_long_clips(tokens_I: np.ndarray, capacity: int, packs_per_step: int) -> tuple[np.ndarray, int]:
    """(int64 [I]: the pack of each long clip, -1 for the others; the least number of packs that may hold all clips).

    `tokens_I`: int64, each from 1 to `capacity`. `packs_per_step`: packs of a group.
    """
    pack_I, num_packs = np.full(len(tokens_I), -1), -(-int(tokens_I.sum()) // capacity)
    by_length = np.argsort(-tokens_I, kind="stable")
    num_long = min(len(tokens_I) // LONG_CLIPS_DIVISOR, int((tokens_I > capacity // MIN_LONG_DIVISOR).sum()))
    if not num_long:
        return pack_I, num_packs
    clip_J, short = by_length[:num_long], tokens_I[by_length[num_long:]]
    tokens_J = tokens_I[clip_J]
    surplus_J = tokens_J * (tokens_J - (short * short).sum() // short.sum())
    target_B, num_expensive_packs = surplus_targets(surplus_J, num_packs, packs_per_step)

    pack_I[clip_J[:num_expensive_packs]] = np.arange(num_expensive_packs)
    free_B = np.full(num_packs, capacity)
    free_B[:num_expensive_packs] -= tokens_J[:num_expensive_packs]
    free_B -= np.minimum(capacity * int(short.sum()) // int(tokens_I.sum()), free_B // SHORT_SPACE_DIVISOR)
    target_B[:num_expensive_packs] -= surplus_J[:num_expensive_packs]
    remaining = np.arange(num_expensive_packs, num_long)
    for within_target in (True, False):
        while len(remaining):
            longest_B = np.searchsorted(-tokens_J[remaining], -free_B)  # of the remaining clips, the longest that fits
            if within_target:
                longest_B = np.maximum(longest_B, np.searchsorted(-surplus_J[remaining], -target_B))
            packs, taken = match_clips_to_packs(longest_B, target_B, len(remaining))
            if not len(packs):
                break
            clips = remaining[taken]
            pack_I[clip_J[clips]] = packs
            free_B[packs] -= tokens_J[clips]
            target_B[packs] -= surplus_J[clips]
            remaining = np.delete(remaining, taken)
    return pack_I, num_packs


def surplus_targets(surplus_J: np.ndarray, num_packs: int, packs_per_step: int) -> tuple[np.ndarray, int]:
    """(int64 [B]: the target sum of surplus of each pack; the number of expensive packs, which come first).

    The target of an expensive pack is the largest surplus of its group; pack b begins with clip b. `surplus_J`: of the
    long clips, longest first.
    """
    num_groups = min(len(surplus_J), num_packs) // packs_per_step
    largest_G = surplus_J[: num_groups * packs_per_step : packs_per_step]
    # remaining surplus, and its average over the remaining packs, once the first 0, 1, 2 ... groups have their targets
    remaining_G1 = int(surplus_J.sum()) - packs_per_step * np.append(0, np.cumsum(largest_G))
    average_G1 = remaining_G1 // np.maximum(num_packs - packs_per_step * np.arange(len(remaining_G1)), 1)
    num_expensive_groups = int(np.argmin(np.append(largest_G > average_G1[:-1], False)))
    num_expensive_packs = num_expensive_groups * packs_per_step
    expensive_targets = np.repeat(largest_G[:num_expensive_groups], packs_per_step)
    other_targets = np.full(num_packs - num_expensive_packs, average_G1[num_expensive_groups])
    return np.append(expensive_targets, other_targets), num_expensive_packs


def match_clips_to_packs(longest_B: np.ndarray, target_B: np.ndarray, num_clips: int) -> tuple[np.ndarray, np.ndarray]:
    """(packs, the clip that each takes), at most one clip per pack.

    `longest_B`: the first of `num_clips` clips, sorted by length, that the pack can take; it can take all after it. The
    pack that can take the longest chooses first (ties: the largest target); the next takes the longest that remains.
    """
    pack_B = np.lexsort((-target_B, longest_B))
    rank_B = np.arange(len(longest_B))
    taken_B = rank_B + np.maximum.accumulate(longest_B[pack_B] - rank_B)
    has_clip = taken_B < num_clips
    return pack_B[has_clip], taken_B[has_clip]

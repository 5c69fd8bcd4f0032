"""Which long clips share a pack, so that packs cost the same. Token counts in; a pack for each long clip out.

Attention makes one full pack dearer than another, by the sum of l^2 over its clips of l tokens. Long clips make nearly
all of the difference. So they are laid into packs before the others, the fill, come (`packing.py`):

    mu = sum l^2 / sum l  over the fill: what each of its tokens adds
    s  = l (l - mu)       the surplus of a long clip: what it adds more than as much fill

Packs in which the sum of s is the same cost the same, whatever random fill makes them full. A clip whose s is more than
a pack's share leads a pack that stays dearer than most. Such packs are used together, in groups as large as a step: the
longest clips lead the first group, and so on, and the target of all packs of a group is what its dearest cannot go
below. The target of the others is an equal share of what is left.

Then every pack takes the longest clip that its target and its room allow, the pack that can take the longest first, and
again, until none fits. Some room is kept for fill, so that short clips come in all packs, not where long ones left gaps
alone. It goes by arrays, one round for all packs, and in whole numbers, so that every machine finds the same.
"""

from __future__ import annotations

import numpy as np

LONG = 4  # one of so many clips is long: the rest are enough to fill every pack to the token
RESERVE = 4  # one of so many tokens behind a pack's first clip is for fill; less where fill is less of all tokens
SHORT = 256  # a clip of at most budget / SHORT tokens is never long: it hardly matters, and rounds would be many


def lead_packs(tokens_N: np.ndarray, budget: int, together: int) -> tuple[np.ndarray, int]:
    """(int64 [N]: the pack of each long clip, -1 of the others; the number of packs, the least that may hold them all).

    `tokens_N`: int64, each from 1 to `budget`. `together`: packs of a group.
    """
    pack_N, packs = np.full(len(tokens_N), -1), -(-int(tokens_N.sum()) // budget)
    by_length = np.argsort(-tokens_N, kind="stable")
    count = min(len(tokens_N) // LONG, int((tokens_N > budget // SHORT).sum()))
    if not count:
        return pack_N, packs
    clip_Q, fill = by_length[:count], tokens_N[by_length[count:]]
    tokens_Q = tokens_N[clip_Q]
    surplus_Q = tokens_Q * (tokens_Q - (fill * fill).sum() // fill.sum())
    target_M, led = targets(surplus_Q, packs, together)

    pack_N[clip_Q[:led]] = np.arange(led)
    room_M = np.full(packs, budget)
    room_M[:led] -= tokens_Q[:led]
    room_M -= np.minimum(budget * int(fill.sum()) // int(tokens_N.sum()), room_M // RESERVE)
    target_M[:led] -= surplus_Q[:led]
    left = np.arange(led, count)
    for within_target in (True, False):  # what finds no pack in this way goes where there is most room
        while len(left):
            longest_M = np.searchsorted(-tokens_Q[left], -room_M)  # of those left, the longest that fits
            if within_target:
                longest_M = np.maximum(longest_M, np.searchsorted(-surplus_Q[left], -target_M))
            pack_S, taken_S = served(longest_M, target_M, len(left))
            if not len(pack_S):
                break
            chosen_S = left[taken_S]
            pack_N[clip_Q[chosen_S]] = pack_S
            room_M[pack_S] -= tokens_Q[chosen_S]
            target_M[pack_S] -= surplus_Q[chosen_S]
            left = np.delete(left, taken_S)
    return pack_N, packs


def targets(surplus_Q: np.ndarray, packs: int, together: int) -> tuple[np.ndarray, int]:
    """(int64 [packs]: sums of surplus to aim at; how many of the first are led, each by the clip of its number).

    `surplus_Q` of the long clips, the longest first.
    """
    dearest_G = surplus_Q[: min(len(surplus_Q), packs) // together * together : together]
    left_G = int(surplus_Q.sum()) - together * np.append(0, np.cumsum(dearest_G))  # when so many groups are led
    share_G = left_G // np.maximum(packs - together * np.arange(len(left_G)), 1)
    above_G = np.append(dearest_G > share_G[:-1], False)
    groups = int(np.argmin(above_G))
    led = groups * together
    return np.append(np.repeat(dearest_G[:groups], together), np.full(packs - led, share_G[groups])), led


def served(longest_M: np.ndarray, target_M: np.ndarray, clips: int) -> tuple[np.ndarray, np.ndarray]:
    """(packs, the clip that each takes), where pack m can take `longest_M[m]` of `clips` sorted clips, or any behind.

    The pack that can take the longest chooses first, by the greatest target of several; the next takes the longest that
    is left to it, and so on.
    """
    pack_M = np.lexsort((-target_M, longest_M))
    place_M = np.arange(len(longest_M))
    taken_M = place_M + np.maximum.accumulate(longest_M[pack_M] - place_M)
    some = taken_M < clips
    return pack_M[some], taken_M[some]

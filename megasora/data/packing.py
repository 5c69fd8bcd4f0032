"""Which clips share a pack: token counts in, in the order of an epoch; packs of at most `budget` tokens out.

Best fit with look-ahead over a window of clips, on whole arrays instead of clip by clip:

    line     The first half of the window is laid into packs as it comes. A clip that does not fit begins the next pack;
             each pack is left with some room, about half a clip.
    spare    The other half waits, sorted.
    trade    Every pack with room gives one of its clips, or none, for the spare clip that fills it best: the longest
             that is not longer than what it gives and its room together. A pack has several clips to give, and spare
             clips come in all sizes: one or two trades fill it to the token.
    again    What is left, with what was given, is the next window, half as long; the last few clips go one by one, by
             best fit decreasing.

Trades take clips of all sizes, so that what is left is a sample like the first: short clips, which fill every gap, do
not run out. Nothing is cut, and every clip is in exactly one pack.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np

FEW = 64  # clips that are packed one by one
FULL = 4096  # a pack with less room than budget / FULL is full
TRADES = 12  # rounds of them; hardly any pack has use for more


@dataclass(frozen=True)
class Packs:
    """`M` packs of `N` clips; pack m has clips `clip_N[cu_M1[m] : cu_M1[m + 1]]`."""

    clip_N: np.ndarray  # int64: places in the list that was packed
    cu_M1: np.ndarray  # int64 [M + 1]

    def __len__(self) -> int:
        return len(self.cu_M1) - 1

    def __getitem__(self, m: int) -> np.ndarray:
        return self.clip_N[self.cu_M1[m] : self.cu_M1[m + 1]]

    def sums(self, values_N: np.ndarray) -> np.ndarray:
        """int64 [M]: sums over each pack of a number that every clip has."""
        running = np.append(0, np.cumsum(values_N[self.clip_N]))
        return running[self.cu_M1[1:]] - running[self.cu_M1[:-1]]


def pack_clips(tokens_N: np.ndarray, budget: int) -> Packs:
    """Packs of clips with `tokens_N` tokens, int64, each from 1 to `budget`. Depends on nothing but its arguments.

    Raises ValueError where a clip does not fit.
    """
    if len(tokens_N) and not 1 <= tokens_N.min() <= tokens_N.max() <= budget:
        raise ValueError(f"clips of {tokens_N.min()} to {tokens_N.max()} tokens in packs of {budget}")
    pool, owners, clips, made = np.arange(len(tokens_N)), [], [], 0
    while len(pool) > FEW:
        cuts = full_packs(tokens_N[pool[: len(pool) // 2]], budget)
        if len(cuts) < 2:
            break
        owner_Q = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))
        owner_Q, clip_Q, pool = trade(tokens_N, budget, owner_Q, pool[: cuts[-1]], pool[cuts[-1] :])
        owners.append(made + owner_Q)
        clips.append(clip_Q)
        made += len(cuts) - 1
    for pack in best_fit_decreasing(tokens_N, pool, budget):
        owners.append(np.full(len(pack), made))
        clips.append(np.array(pack))
        made += 1
    if not made:
        return Packs(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    owner_N, clip_N = np.concatenate(owners), np.concatenate(clips)
    order = np.lexsort((clip_N, owner_N))
    return Packs(clip_N[order], np.append(0, np.cumsum(np.bincount(owner_N))))


def full_packs(tokens_Q: np.ndarray, budget: int) -> np.ndarray:
    """The line cut into packs: [0, end of the first, ...]. What is behind the last cut may be no full pack."""
    ends = np.cumsum(tokens_Q)
    end_of_pack = np.searchsorted(ends, ends - tokens_Q + budget, side="right").tolist()  # of one that begins here
    cuts = [0]
    while cuts[-1] < len(end_of_pack):
        cuts.append(end_of_pack[cuts[-1]])
    return np.array(cuts[:-1])


def trade(
    tokens_N: np.ndarray, budget: int, owner_Q: np.ndarray, clip_Q: np.ndarray, spare: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fills packs, given as a pack and a clip a line, sorted by pack, from the spare clips.

    Returns the packs in the same form, unsorted, and the spare clips in the order of the epoch.
    """
    tokens, nothing = np.append(tokens_N, 0), len(tokens_N)
    room_M = budget - np.bincount(owner_Q, tokens[clip_Q]).astype(np.int64)
    first = np.flatnonzero(np.diff(owner_Q, prepend=-1))  # a pack may give nothing: a clip of no tokens
    owner_Q, clip_Q = np.insert(owner_Q, first, owner_Q[first]), np.insert(clip_Q, first, nothing)
    done = []
    for _ in range(TRADES):
        has_room = room_M[owner_Q] > budget // FULL
        done.append((owner_Q[~has_room], clip_Q[~has_room]))
        owner_Q, clip_Q = owner_Q[has_room], clip_Q[has_room]
        spare = spare[np.argsort(tokens[spare], kind="stable")]
        given, taken = best_trades(tokens[clip_Q], owner_Q, room_M, tokens[spare])
        if not len(given):
            break
        gives, takes, owner = clip_Q[given], spare[taken], owner_Q[given]
        room_M[owner] -= tokens[takes] - tokens[gives]
        whole = gives == nothing
        clip_Q[given[~whole]] = takes[~whole]
        owner_Q, clip_Q = np.concatenate([owner_Q, owner[whole]]), np.concatenate([clip_Q, takes[whole]])
        order = np.argsort(owner_Q, kind="stable")
        owner_Q, clip_Q = owner_Q[order], clip_Q[order]
        spare = np.concatenate([np.delete(spare, taken), gives[~whole]])
    done.append((owner_Q, clip_Q))
    owner_Q, clip_Q = (np.concatenate(parts) for parts in zip(*done, strict=True))
    real = clip_Q != nothing
    return owner_Q[real], clip_Q[real], np.sort(spare)


def best_trades(
    tokens_Q: np.ndarray, owner_Q: np.ndarray, room_M: np.ndarray, spare_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(line that is given, spare clip that is taken for it) of each pack that gains, at most one a pack.

    `spare_tokens` is sorted. Where several packs want clips of one length and there are too few, the last get none.
    """
    if not len(tokens_Q) or not len(spare_tokens):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    best_Q = np.searchsorted(spare_tokens, tokens_Q + room_M[owner_Q], side="right") - 1
    gain_Q = np.where(best_Q >= 0, spare_tokens[best_Q] - tokens_Q, 0)
    first = np.flatnonzero(np.diff(owner_Q, prepend=-1))
    best_gain = np.repeat(np.maximum.reduceat(gain_Q, first), np.diff(first, append=len(owner_Q)))
    given = np.flatnonzero((gain_Q == best_gain) & (gain_Q > 0))
    given = given[np.diff(owner_Q[given], prepend=-1) > 0]
    given = given[np.argsort(best_Q[given], kind="stable")]
    wanted = best_Q[given]  # the last of those of its length: the first pack takes it, the next the one before it ...
    first = np.flatnonzero(np.diff(wanted, prepend=-1))
    taken = wanted - (np.arange(len(wanted)) - np.repeat(first, np.diff(first, append=len(wanted))))
    served = (taken >= 0) & (spare_tokens[taken] == spare_tokens[wanted])
    return given[served], taken[served]


def best_fit_decreasing(tokens_N: np.ndarray, pool: np.ndarray, budget: int) -> list[list[int]]:
    """The longest first, each into the pack with the least room for it, or into a new one."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, pack), sorted
    order = pool[np.argsort(-tokens_N[pool], kind="stable")]
    for clip, tokens in zip(order.tolist(), tokens_N[order].tolist(), strict=True):
        place = bisect.bisect_left(rooms, (tokens, -1))
        room, pack = rooms.pop(place) if place < len(rooms) else (budget, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(clip)
        bisect.insort(rooms, (room - tokens, pack))
    return packs

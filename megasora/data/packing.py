"""Which clips share a pack: token counts in, in the order of an epoch; packs of at most `budget` tokens out.

    lead     The longest clips are laid into all packs first, so that packs cost the same (`balance.py`). The others are
             the fill: they make the packs full, by best fit with look-ahead, on whole arrays instead of clip by clip.
    line     The first half of the fill is laid into packs as it comes. A clip that does not fit begins the next pack;
             each pack is left with some room, about half a clip.
    spare    The other half waits, sorted.
    trade    Every pack with room gives one of these clips, or none, for the spare clip that fills it best: the longest
             that is not longer than what it gives and its room together. A pack has several clips to give, and spare
             clips come in all sizes: one or two trades fill it to the token.
    again    What is left, with what was given, is the next fill, half as long, for the packs that had none; the last
             few clips go one by one, by best fit decreasing.

Trades take clips of all sizes, so that what is left is a sample like the first: short clips, which fill every gap, do
not run out. Where clips come in few sizes, long ones that are laid out by cost can get in the way of full packs: then
all clips are fill. Nothing is cut, and every clip is in exactly one pack.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np

from megasora.data.balance import lead_packs

FEW = 64  # clips that are packed one by one
MORE = 1000  # with one more pack in so many than there must be, clips may do better without balance
FULL = 8192  # a pack with less room than budget / FULL is full
TRADES = 16  # rounds of them; hardly any pack has use for more


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


def pack_clips(tokens_N: np.ndarray, budget: int, together: int = 1) -> Packs:
    """Packs of clips with `tokens_N` tokens, int64, each from 1 to `budget`. Depends on nothing but its arguments.

    `together`: how many packs are used at a time: where packs cannot all cost the same, so many of them do.
    Raises ValueError where a clip does not fit.
    """
    if len(tokens_N) and not 1 <= tokens_N.min() <= tokens_N.max() <= budget:
        raise ValueError(f"clips of {tokens_N.min()} to {tokens_N.max()} tokens in packs of {budget}")
    pack_N, least = lead_packs(tokens_N, budget, together)
    packs = fill_packs(tokens_N, budget, pack_N, least)
    if len(packs) > least + 1 + least // MORE:
        packs = min(packs, fill_packs(tokens_N, budget, np.full(len(tokens_N), -1), least), key=len)
    return packs


def fill_packs(tokens_N: np.ndarray, budget: int, pack_N: np.ndarray, packs: int) -> Packs:
    """At least `packs` packs, where clips that have a pack already in `pack_N`, not -1, keep it. Writes to `pack_N`."""
    pool, placed = np.flatnonzero(pack_N < 0), np.flatnonzero(pack_N >= 0)
    room_M = budget - np.bincount(pack_N[placed], tokens_N[placed], packs).astype(np.int64)
    first_M = np.full(packs, len(tokens_N))  # clip of each pack: as it is drawn, so is the order of the packs
    first_M[pack_N[placed[::-1]]] = placed[::-1]
    queue = np.lexsort((first_M, np.minimum(room_M, budget // 3)))  # little room needs the choice of much spare fill
    while len(pool) > FEW:
        if not len(queue):  # some clips do not go together: there must be more packs
            queue = np.arange(packs, packs - (-int(tokens_N[pool].sum()) // budget))
            packs, room_M = packs + len(queue), np.append(room_M, np.full(len(queue), budget))
        cuts = full_packs(tokens_N[pool[: len(pool) // 2]], room_M[queue])
        filled, queue = np.split(queue, [len(cuts) - 1])
        if not len(filled):
            break
        owner_Q = np.repeat(np.arange(len(filled)), np.diff(cuts))
        line, spare = np.split(pool, [cuts[-1]])
        owner_Q, clip_Q, pool = trade(tokens_N, budget, room_M[filled], owner_Q, line, spare)
        pack_N[clip_Q] = filled[owner_Q]
    best_fit_decreasing(tokens_N, budget, pool, room_M, queue, pack_N)
    counts = np.bincount(pack_N)
    return Packs(np.argsort(pack_N, kind="stable"), np.append(0, np.cumsum(counts[counts > 0])))


def full_packs(tokens_Q: np.ndarray, room_M: np.ndarray) -> np.ndarray:
    """The line cut into packs: [0, end of the first, ...]. What is behind the last cut may fill no pack."""
    ends = np.cumsum(tokens_Q).tolist()
    begins, cuts = [0, *ends], [0]
    for room in room_M.tolist():
        cut = bisect.bisect_right(ends, begins[cuts[-1]] + room, cuts[-1])
        if cut == len(ends):
            break
        cuts.append(cut)
    return np.array(cuts)


def trade(
    tokens_N: np.ndarray, budget: int, room_M: np.ndarray, owner_Q: np.ndarray, clip_Q: np.ndarray, spare: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fills packs of room for `room_M` tokens, given as a pack and a clip a line, from the spare clips.

    Returns the packs in the same form, unsorted, and the spare clips in the order of the epoch.
    """
    tokens, nothing, every = np.append(tokens_N, 0), len(tokens_N), np.arange(len(room_M))
    room_M = room_M - np.bincount(owner_Q, tokens[clip_Q], len(room_M)).astype(np.int64)
    # a pack may give nothing: a clip of no tokens
    owner_Q, clip_Q = np.append(every, owner_Q), np.append(np.full(len(every), nothing), clip_Q)
    done = []
    for _ in range(TRADES):
        has_room = room_M[owner_Q] > budget // FULL
        done.append((owner_Q[~has_room], clip_Q[~has_room]))
        owner_Q, clip_Q = owner_Q[has_room], clip_Q[has_room]
        order = np.argsort(owner_Q, kind="stable")
        owner_Q, clip_Q = owner_Q[order], clip_Q[order]
        spare = spare[np.argsort(tokens[spare], kind="stable")]
        given, taken = best_trades(tokens[clip_Q], owner_Q, room_M, tokens[spare])
        if not len(given):
            break
        gives, takes, owner = clip_Q[given], spare[taken], owner_Q[given]
        room_M[owner] -= tokens[takes] - tokens[gives]
        whole = gives == nothing
        clip_Q[given[~whole]] = takes[~whole]
        owner_Q, clip_Q = np.append(owner_Q, owner[whole]), np.append(clip_Q, takes[whole])
        spare = np.append(np.delete(spare, taken), gives[~whole])
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
    served = (taken >= 0) & (spare_tokens[np.maximum(taken, 0)] == spare_tokens[wanted])
    return given[served], taken[served]


def best_fit_decreasing(
    tokens_N: np.ndarray, budget: int, pool: np.ndarray, room_M: np.ndarray, queue: np.ndarray, pack_N: np.ndarray
) -> None:
    """Writes to `pack_N` the packs of the clips in `pool`, out of those in `queue`.

    The longest first, each into the pack with the least room for it, or into a new one.
    """
    rooms = sorted(zip(room_M[queue].tolist(), queue.tolist(), strict=True))
    packs, order = len(room_M), pool[np.argsort(-tokens_N[pool], kind="stable")]
    for clip, tokens in zip(order.tolist(), tokens_N[order].tolist(), strict=True):
        place = bisect.bisect_left(rooms, (tokens, -1))
        room, pack = rooms.pop(place) if place < len(rooms) else (budget, packs)
        packs = max(packs, pack + 1)
        pack_N[clip] = pack
        bisect.insort(rooms, (room - tokens, pack))

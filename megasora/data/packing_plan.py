"""The packing plan of a run: which clips each step trains on. Token counts in; steps of packs out; no clip is read.

    for each epoch:
        order   = clips of all datasets in proportion to their weights; each dataset runs through permutations of itself
        windows = ceil(clips / packing_window) windows: clips of at most half a pack, divided evenly, in order;
                  clips of more than half a pack: sorted by length, in groups of packs_per_step, each in a random window
        for each window:
            packs = bin packing of its clips                             packing.py, long_clips.py
            steps = packs sorted by cost, divided into steps of packs_per_step, the steps in random order
    for each step: assign its packs to the data ranks: equally many, of equal cost

- Order: an epoch has as many clips as all datasets together. A dataset resumes in the next epoch where it stopped in
  this one: alone, it is seen exactly once per epoch; in a mixture, at the end of an epoch any two of its clips have
  been seen equally often, or one of them once more.
- Windows are packed independently, so a run can start in any window without packing those before it. This costs about
  one underfilled pack per window. No two clips of more than half a pack fit into one, so they are grouped by length:
  the packs of a group cost nearly the same.
- Packing and cost use the token counts after token dropping in that window (token_drop.py); the assignment to windows
  uses all tokens.
- Costs: a clip of l tokens costs l (a + l), in tokens squared, where a = `attention_break_even_tokens`. Packing gives
  most packs of a window the same cost (long_clips.py); the longest clips make the others more expensive.
- Steps continue across the ends of windows and epochs. A step that does so takes packs of medium cost from both sides.
- Assignment to ranks comes last, so the number of ranks does not change what a step trains on.

The packs of a window are a pure function of (seed, epoch, window); their order also of `step_offset`, which follows
from the cursor. So the state of the plan is a `Cursor`.

Letters: `I` clips (of all datasets, an epoch or a window), `B` packs of a window.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megasora.config import TokenDropConfig
from megasora.data.packing import Packs, pack_clips
from megasora.data.shuffle import GROUPS, INTERLEAVE, ORDER, STEPS, permutation
from megasora.data.token_drop import drop_fraction_at, kept_token_counts

UNDERFILLED_DIVISOR = 64  # a pack with at least tokens_per_pack / 64 free tokens is underfilled


@dataclass(frozen=True)
class Cursor:
    """Position in a plan: the next pack to use."""

    epoch: int = 0
    window: int = 0  # of the epoch
    pack: int = 0  # of the window, in the order of the plan


class PlannedPack(NamedTuple):
    """The clips of one pack, before they are read."""

    clips: np.ndarray  # int64: global clip indices: datasets concatenated
    tokens: np.ndarray  # int64: tokens of each clip after token dropping
    cost: int  # tokens squared: sum of l (a + l)
    epoch: int  # of its clips; part of the key that selects the kept tokens


@dataclass(frozen=True)
class PlannedStep:
    """The packs of one optimizer step on all ranks."""

    packs: list[PlannedPack]
    next_cursor: Cursor

    @property
    def costs(self) -> np.ndarray:
        """int64: the cost of each pack, in tokens squared."""
        return np.array([pack.cost for pack in self.packs])


@dataclass(frozen=True)
class Window:
    """A packed window: its packs, and the order in which steps use them."""

    packs: Packs
    tokens: np.ndarray  # int64: tokens of each clip after token dropping, in the order of `packs.clip_I`
    cu_packs: list[int]  # pack b has the clips cu_packs[b] to cu_packs[b + 1]
    costs: list[int]  # of each pack, in tokens squared
    order: list[int]  # pack indices


class PackingPlan:
    """An endless, reproducible sequence of steps over the clips of one or several datasets."""

    def __init__(
        self,
        token_counts: list[np.ndarray],
        weights: list[float],
        tokens_per_pack: int,
        packs_per_step: int,
        packing_window: int,
        attention_break_even_tokens: int,
        seed: int,
        token_drop: TokenDropConfig | None = None,
    ):
        """`token_counts`: per dataset, int64, the tokens of each of its clips, at most `tokens_per_pack`.

        `weights`: how often clips of each dataset are seen, relative to each other. `packing_window`: clips.
        `attention_break_even_tokens`: tokens of a clip whose self-attention costs as much as everything else.
        `token_drop`: None drops no token. Raises ValueError if a dataset is empty or a weight is not positive.
        """
        if not token_counts or len(token_counts) != len(weights) or not all(len(t) for t in token_counts):
            raise ValueError(f"{len(weights)} weights for datasets of {[len(t) for t in token_counts]} clips")
        if not all(0 < w < float("inf") for w in weights):
            raise ValueError(f"weights={weights} must be positive numbers")
        self.tokens_I = np.concatenate(token_counts)
        self.dataset_sizes = [len(t) for t in token_counts]
        self.clips_per_epoch = clips_per_epoch(self.dataset_sizes, weights)
        self.break_even_tokens, self.token_drop = attention_break_even_tokens, token_drop or TokenDropConfig()
        self.tokens_per_pack, self.packs_per_step, self.seed = tokens_per_pack, packs_per_step, seed
        self.num_windows = -(-sum(self.clips_per_epoch) // packing_window)  # of an epoch
        self._epoch_cache: tuple[int, list[np.ndarray]] | None = None
        self._window_cache: tuple[tuple[int, int, int], Window] | None = None

    def steps(self, cursor: Cursor) -> Iterator[PlannedStep]:
        """Yields steps without end, beginning at `cursor`."""
        while True:
            packs: list[PlannedPack] = []
            while len(packs) < self.packs_per_step:
                missing = self.packs_per_step - len(packs)
                step_offset = (cursor.pack + missing) % self.packs_per_step
                window = self.window_at(cursor.epoch, cursor.window, step_offset)
                chosen = window.order[cursor.pack : cursor.pack + missing]
                for b in chosen:
                    clips = slice(window.cu_packs[b], window.cu_packs[b + 1])
                    pack = window.packs.clip_I[clips], window.tokens[clips], window.costs[b], cursor.epoch
                    packs.append(PlannedPack(*pack))
                cursor = self.advance(cursor, len(chosen), len(window.order))
            yield PlannedStep(packs, cursor)

    def advance(self, cursor: Cursor, num_packs: int, window_packs: int) -> Cursor:
        """The cursor `num_packs` later, in a window of `window_packs` packs."""
        if cursor.pack + num_packs < window_packs:
            return Cursor(cursor.epoch, cursor.window, cursor.pack + num_packs)
        if cursor.window + 1 < self.num_windows:
            return Cursor(cursor.epoch, cursor.window + 1)
        return Cursor(cursor.epoch + 1)

    def window_at(self, epoch: int, window: int, step_offset: int) -> Window:
        """A packed and ordered window. The first step that uses packs of this window alone begins at `step_offset`."""
        if self._window_cache is None or self._window_cache[0] != (epoch, window, step_offset):
            tokens_I = self.token_counts(epoch, window)
            packs = self.pack_window(epoch, window)
            costs_B = packs.sums(tokens_I * (self.break_even_tokens + tokens_I))
            is_filled_B = packs.sums(tokens_I) > self.tokens_per_pack - self.tokens_per_pack // UNDERFILLED_DIVISOR
            order = order_packs(costs_B, is_filled_B, self.packs_per_step, step_offset, self.seed, epoch, window)
            ordered = Window(packs, tokens_I[packs.clip_I], packs.cu_packs.tolist(), costs_B.tolist(), order.tolist())
            self._window_cache = (epoch, window, step_offset), ordered
        return self._window_cache[1]

    def pack_window(self, epoch: int, window: int) -> Packs:
        """The packs of a window, of global clip indices."""
        clip_I = self.window_clips(epoch)[window]
        packs = pack_clips(self.token_counts(epoch, window)[clip_I], self.tokens_per_pack, self.packs_per_step)
        return Packs(clip_I[packs.clip_I], packs.cu_packs)

    def token_counts(self, epoch: int, window: int) -> np.ndarray:
        """int64 [I]: tokens of each clip of all datasets after token dropping in a window."""
        fraction = drop_fraction_at(self.token_drop, epoch + window / self.num_windows)
        return kept_token_counts(self.tokens_I, fraction) if fraction else self.tokens_I

    def window_clips(self, epoch: int) -> list[np.ndarray]:
        """Per window, int64: global indices of its clips."""
        if self._epoch_cache is None or self._epoch_cache[0] != epoch:
            clip_I = self.epoch_order(epoch)
            window_I = self.window_of_clips(epoch, clip_I)
            self._epoch_cache = epoch, [clip_I[window_I == w] for w in range(self.num_windows)]
        return self._epoch_cache[1]

    def window_of_clips(self, epoch: int, clip_I: np.ndarray) -> np.ndarray:
        """int64 [I]: the window of each clip `clip_I` of an epoch."""
        tokens_I = self.tokens_I[clip_I]
        is_over_half_I = tokens_I > self.tokens_per_pack // 2
        num_rest, window_I = np.count_nonzero(~is_over_half_I), np.empty_like(clip_I)
        window_I[~is_over_half_I] = np.arange(num_rest) * self.num_windows // max(num_rest, 1)
        over_half = np.flatnonzero(is_over_half_I)
        over_half = over_half[np.argsort(-tokens_I[over_half], kind="stable")]
        num_groups = -(-len(over_half) // self.packs_per_step)
        window_of_group = permutation(num_groups, self.seed, GROUPS, epoch) % self.num_windows
        window_I[over_half] = np.repeat(window_of_group, self.packs_per_step)[: len(over_half)]
        return window_I

    def epoch_order(self, epoch: int) -> np.ndarray:
        """int64 [I]: global indices of the clips of an epoch, in order."""
        dataset_I = np.repeat(np.arange(len(self.dataset_sizes)), self.clips_per_epoch)
        if len(self.dataset_sizes) > 1:
            dataset_I = dataset_I[permutation(len(dataset_I), self.seed, INTERLEAVE, epoch)]
        clip_I, first_clip = np.empty_like(dataset_I), 0
        for dataset, (size, count) in enumerate(zip(self.dataset_sizes, self.clips_per_epoch, strict=True)):
            clip_I[dataset_I == dataset] = first_clip + self.permutation_slice(dataset, size, epoch * count, count)
            first_clip += size
        return clip_I

    def permutation_slice(self, dataset: int, size: int, start: int, count: int) -> np.ndarray:
        """Elements start .. start + count - 1 of the endless concatenation of permutations of a dataset."""
        passes = range(start // size, (start + count - 1) // size + 1)
        permutations = np.concatenate([permutation(size, self.seed, ORDER, dataset, p) for p in passes])
        return permutations[start - passes[0] * size :][:count]


def order_packs(
    costs_B: np.ndarray,
    is_filled_B: np.ndarray,
    packs_per_step: int,
    step_offset: int,
    seed: int,
    epoch: int,
    window: int,
) -> np.ndarray:
    """int64 [B]: the order in which the packs of a window are used. Its own steps begin at index `step_offset`.

    Packs before the first and after the last of these steps, of medium cost, belong to steps shared with neighbouring
    windows. The few underfilled packs that are cheaper than all filled ones go into different steps.
    """
    by_cost = np.argsort(costs_B, kind="stable")
    num_cheap = int(np.argmax(np.append(is_filled_B[by_cost], True)))
    if num_cheap < packs_per_step:
        indices = np.minimum(np.arange(num_cheap) * (packs_per_step - 1), len(by_cost) - num_cheap)
        by_cost = np.insert(by_cost[num_cheap:], indices, by_cost[:num_cheap])
    head = min(step_offset, len(costs_B))
    num_shared = head + (len(costs_B) - head) % packs_per_step
    middle = (len(costs_B) - num_shared) // packs_per_step // 2 * packs_per_step
    shared = by_cost[middle : middle + num_shared]
    steps = np.delete(by_cost, np.s_[middle : middle + num_shared]).reshape(-1, packs_per_step)
    steps = steps[permutation(len(steps), seed, STEPS, epoch, window)]
    return np.concatenate([shared[:head], steps.ravel(), shared[head:]])


def clips_per_epoch(dataset_sizes: list[int], weights: list[float]) -> list[int]:
    """Clips of each dataset in an epoch, at least one; together about as many as all datasets have."""
    if len(dataset_sizes) == 1:
        return list(dataset_sizes)
    return [max(1, round(sum(dataset_sizes) * weight / sum(weights))) for weight in weights]


def assign_packs_to_ranks(costs: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [num_ranks, n / num_ranks]: which of a step's `n` packs each rank gets; equally many, of equal cost.

    Greedy: the most expensive pack first, each to the rank with the least cost so far that still needs packs. Raises
    ValueError if `num_ranks` does not divide `n`.
    """
    packs_per_rank, remainder = divmod(len(costs), num_ranks)
    if remainder:
        raise ValueError(f"{len(costs)} packs for {num_ranks} ranks")
    assigned: list[list[int]] = [[] for _ in range(num_ranks)]
    heap = [(0, rank) for rank in range(num_ranks)]  # (cost so far, rank)
    for pack in np.argsort(-costs, kind="stable").tolist():
        cost, rank = heapq.heappop(heap)
        assigned[rank].append(pack)
        if len(assigned[rank]) < packs_per_rank:
            heapq.heappush(heap, (cost + int(costs[pack]), rank))
    return np.array(assigned)

"""The plan of a run: which clips a step trains on. Token counts in; steps of packs out; no clip is read.

    datasets, weights --order--> an epoch's clips --windows--> packs --by cost--> steps --deal--> packs of a rank

- order: an epoch has as many clips as the datasets together, of each in proportion to its weight. Each dataset goes
  through permutations of itself, one after the other, and goes on in the next epoch where it stopped in this one. So a
  dataset alone is seen exactly once an epoch, and in a mixture, when an epoch ends, two clips of a dataset have been
  seen equally often, or one of them once more.
- windows: runs of the order, of at most `window` clips and of equal size. Each is packed by itself, so that a plan is
  at hand for any place in an epoch, however long the epoch is; the price is a pack of each window that is not full.
- steps: attention makes two full packs cost differently, the sum of l (a + l) over their clips of l tokens. The packs
  of a window are sorted by it and cut into steps of equal packs; the order of the steps is drawn. Steps go on over the
  ends of windows and epochs: such a step takes packs from the middle of both, which are alike too.
- deal: of a step's packs, every rank gets equally many, of equal cost. The number of ranks changes nothing before.

All of it is a pure function of (seed, epoch, window), so the state of a run is a cursor. Random numbers are the raw
output of a bit generator, which numpy keeps the same in all its versions, unlike that of its shuffles.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megasora.data.packing import Packs, pack_clips

ORDER, INTERLEAVE, STEPS = range(3)  # streams of random numbers


@dataclass(frozen=True)
class Cursor:
    """The first pack that is not used yet."""

    epoch: int = 0
    window: int = 0  # of the epoch
    pack: int = 0  # of the window, in the order of the plan


@dataclass(frozen=True)
class PlannedStep:
    packs: list[np.ndarray]  # int64: numbers of clips, counted through all datasets
    costs: np.ndarray  # int64, of each pack, in tokens squared
    after: Cursor


@dataclass(frozen=True)
class Window:
    packs: Packs
    costs: list[int]  # of each pack
    order: list[int]  # in which the packs are used


class Plan:
    def __init__(
        self,
        tokens: list[np.ndarray],
        weights: list[float],
        budget: int,
        packs_per_step: int,
        window: int,
        attention_length: int,
        seed: int,
    ):
        """`tokens`: of each dataset, int64, of each of its clips, at most `budget`. `weights`: how often each is seen.

        `attention_length`: tokens of a clip whose attention to itself costs as much as all else. Raises ValueError
        where a dataset is empty or a weight is not positive.
        """
        if not tokens or len(tokens) != len(weights) or not all(len(t) for t in tokens):
            raise ValueError(f"{len(weights)} weights for datasets of {[len(t) for t in tokens]} clips")
        if not all(0 < w < float("inf") for w in weights):
            raise ValueError(f"weights={weights} must be positive numbers")
        self.tokens = np.concatenate(tokens)
        self.sizes = [len(t) for t in tokens]
        self.counts = clips_of_an_epoch(self.sizes, weights)
        self.cost = self.tokens * (attention_length + self.tokens)
        self.budget, self.packs_per_step, self.seed = budget, packs_per_step, seed
        self.windows = -(-sum(self.counts) // window)  # of an epoch
        self.ordered: tuple[int, np.ndarray] | None = None  # the epoch that was ordered last
        self.latest: tuple[tuple[int, int, int], Window] | None = None  # the window that was arranged last

    def steps(self, cursor: Cursor) -> Iterator[PlannedStep]:
        """Endless, from `cursor` on."""
        while True:
            packs: list[np.ndarray] = []
            costs: list[int] = []
            while len(packs) < self.packs_per_step:
                missing = self.packs_per_step - len(packs)
                begins = (cursor.pack + missing) % self.packs_per_step  # the first step that is of this window alone
                window = self.arranged(cursor.epoch, cursor.window, begins)
                chosen = window.order[cursor.pack : cursor.pack + missing]
                packs += [window.packs[m] for m in chosen]
                costs += [window.costs[m] for m in chosen]
                cursor = self.move(cursor, len(chosen), len(window.order))
            yield PlannedStep(packs, np.array(costs), cursor)

    def move(self, cursor: Cursor, packs: int, of: int) -> Cursor:
        if cursor.pack + packs < of:
            return Cursor(cursor.epoch, cursor.window, cursor.pack + packs)
        if cursor.window + 1 < self.windows:
            return Cursor(cursor.epoch, cursor.window + 1)
        return Cursor(cursor.epoch + 1)

    def arranged(self, epoch: int, window: int, begins: int) -> Window:
        """A window whose first own step begins at place `begins`."""
        if self.latest is None or self.latest[0] != (epoch, window, begins):
            packs = self.packs(epoch, window)
            costs = packs.sums(self.cost)
            order = arrange(costs, self.packs_per_step, begins, self.seed, epoch, window)
            self.latest = (epoch, window, begins), Window(packs, costs.tolist(), order.tolist())
        return self.latest[1]

    def packs(self, epoch: int, window: int) -> Packs:
        """Of clips as they are numbered through all datasets."""
        order = self.order(epoch)
        first, last = (len(order) * w // self.windows for w in (window, window + 1))
        packs = pack_clips(self.tokens[order[first:last]], self.budget)
        return Packs(order[first:last][packs.clip_N], packs.cu_M1)

    def order(self, epoch: int) -> np.ndarray:
        """int64: the clips of an epoch, one after the other."""
        if self.ordered is None or self.ordered[0] != epoch:
            dataset_N = np.repeat(np.arange(len(self.sizes)), self.counts)
            if len(self.sizes) > 1:
                dataset_N = dataset_N[shuffled(len(dataset_N), self.seed, INTERLEAVE, epoch)]
            clip_N = np.empty_like(dataset_N)
            for k, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
                clip_N[dataset_N == k] = sum(self.sizes[:k]) + self.stream(k, size, epoch * count, count)
            self.ordered = epoch, clip_N
        return self.ordered[1]

    def stream(self, dataset: int, size: int, first: int, count: int) -> np.ndarray:
        """Places `first .. first + count - 1` of the endless line of permutations of a dataset."""
        passes = range(first // size, (first + count - 1) // size + 1)
        line = np.concatenate([shuffled(size, self.seed, ORDER, dataset, p) for p in passes])
        return line[first - passes[0] * size :][:count]


def arrange(costs_M: np.ndarray, packs_per_step: int, begins: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """int64 [M]: the order in which the packs of a window are used; its steps begin at place `begins` and so on.

    What is before the first and behind the last of its steps belongs to steps that it shares with other windows.
    """
    by_cost = np.argsort(costs_M, kind="stable")
    head = min(begins, len(costs_M))
    shared = head + (len(costs_M) - head) % packs_per_step
    middle = (len(costs_M) - shared) // packs_per_step // 2 * packs_per_step
    ends, own = by_cost[middle : middle + shared], np.delete(by_cost, np.s_[middle : middle + shared])
    steps = own.reshape(-1, packs_per_step)
    steps = steps[shuffled(len(steps), seed, STEPS, epoch, window)]
    return np.concatenate([ends[:head], steps.ravel(), ends[head:]])


def clips_of_an_epoch(sizes: list[int], weights: list[float]) -> list[int]:
    """How many clips of each dataset are seen in an epoch of as many clips as there are; at least one of each."""
    if len(sizes) == 1:
        return list(sizes)
    return [max(1, round(sum(sizes) * weight / sum(weights))) for weight in weights]


def shuffled(count: int, seed: int, *key: int) -> np.ndarray:
    """int64 [count]: a permutation that depends on (seed, key) alone."""
    drawn = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    return np.argsort(drawn, kind="stable")


def deal(costs: np.ndarray, ranks: int) -> np.ndarray:
    """int64 [ranks, n / ranks]: which of a step's `n` packs each rank gets, so that sums of costs are equal.

    The dearest first, each to the rank that has least so far and not all of its packs. Raises ValueError where the
    packs cannot be shared out evenly.
    """
    each, left = divmod(len(costs), ranks)
    if left:
        raise ValueError(f"{len(costs)} packs for {ranks} ranks")
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    sums = [(0, rank) for rank in range(ranks)]  # a heap
    for pack in np.argsort(-costs, kind="stable").tolist():
        cost, rank = heapq.heappop(sums)
        dealt[rank].append(pack)
        if len(dealt[rank]) < each:
            heapq.heappush(sums, (cost + int(costs[pack]), rank))
    return np.array(dealt)

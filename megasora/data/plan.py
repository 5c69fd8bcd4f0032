"""The plan of a run: which clips a step trains on. Token counts in; steps of packs out; no clip is read.

    datasets, weights --order--> an epoch's clips --windows--> packs --by cost--> steps --deal--> packs of a rank

- order: an epoch has as many clips as the datasets together, of each in proportion to its weight. Each dataset goes
  through permutations of itself, one after the other, and goes on in the next epoch where it stopped in this one. So a
  dataset alone is seen exactly once an epoch, and in a mixture, when an epoch ends, two clips of a dataset have been
  seen equally often, or one of them once more.
- windows: runs of the order, of about `window` clips at most, and of equal size. In each, clips have the tokens that
  token dropping leaves them (`dropping.py`; all, as a rule). Each is packed by itself, so that a plan is at hand for
  any place in an epoch, however long the epoch is; the price is a pack of each window that is not full. Clips of more
  than half a pack are few, and no pack has two of them. Those of an epoch that are most alike, one for each pack of a
  step, are in one window, which is drawn for each such group.
- steps: attention makes two full packs cost differently, the sum of l (a + l) over their clips of l tokens. Packing
  makes most packs of a window cost the same (`balance.py`); the others are dearer, by their longest clip. So packs are
  sorted by cost and cut into steps of equal packs; the order of the steps is drawn. Steps go on over the ends of
  windows and epochs: such a step takes packs from the middle of both, which are alike too.
- deal: of a step's packs, every rank gets equally many, of equal cost. The number of ranks changes nothing before.

All of it is a pure function of (seed, epoch, window), so the state of a run is a cursor.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megasora.config import DropConfig
from megasora.data.dropping import kept_tokens, rate_at
from megasora.data.packing import Packs, pack_clips
from megasora.data.shuffle import GROUPS, INTERLEAVE, ORDER, STEPS, shuffled

PART = 64  # a pack with more room than budget / PART is not full


@dataclass(frozen=True)
class Cursor:
    """The first pack that is not used yet."""

    epoch: int = 0
    window: int = 0  # of the epoch
    pack: int = 0  # of the window, in the order of the plan


class PlannedPack(NamedTuple):
    clips: np.ndarray  # int64: numbers, counted through all datasets
    tokens: np.ndarray  # int64: how many of each clip's tokens are kept
    cost: int  # tokens squared
    epoch: int  # in which the clips are seen: what is kept of them is drawn anew in each


@dataclass(frozen=True)
class PlannedStep:
    packs: list[PlannedPack]
    after: Cursor

    @property
    def costs(self) -> np.ndarray:
        return np.array([pack.cost for pack in self.packs])


@dataclass(frozen=True)
class Window:
    packs: Packs
    tokens: np.ndarray  # int64, of each of the packs' clips, one after the other, how many are kept
    cuts: list[int]  # where the clips of each pack begin and end
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
        drop: DropConfig | None = None,
    ):
        """`tokens`: of each dataset, int64, of each of its clips, at most `budget`. `weights`: how often each is seen.

        `attention_length`: tokens of a clip whose attention to itself costs as much as all else. `drop`: None drops
        no token. Raises ValueError where a dataset is empty or a weight is not positive.
        """
        if not tokens or len(tokens) != len(weights) or not all(len(t) for t in tokens):
            raise ValueError(f"{len(weights)} weights for datasets of {[len(t) for t in tokens]} clips")
        if not all(0 < w < float("inf") for w in weights):
            raise ValueError(f"weights={weights} must be positive numbers")
        self.tokens = np.concatenate(tokens)
        self.sizes = [len(t) for t in tokens]
        self.counts = clips_of_an_epoch(self.sizes, weights)
        self.attention_length, self.drop = attention_length, drop or DropConfig()
        self.budget, self.packs_per_step, self.seed = budget, packs_per_step, seed
        self.windows = -(-sum(self.counts) // window)  # of an epoch
        self.divided: tuple[int, list[np.ndarray]] | None = None  # the epoch that was divided last
        self.latest: tuple[tuple[int, int, int], Window] | None = None  # the window that was arranged last

    def steps(self, cursor: Cursor) -> Iterator[PlannedStep]:
        """Endless, from `cursor` on."""
        while True:
            packs: list[PlannedPack] = []
            while len(packs) < self.packs_per_step:
                missing = self.packs_per_step - len(packs)
                begins = (cursor.pack + missing) % self.packs_per_step  # the first step that is of this window alone
                window = self.arranged(cursor.epoch, cursor.window, begins)
                chosen = window.order[cursor.pack : cursor.pack + missing]
                for m in chosen:
                    part = slice(window.cuts[m], window.cuts[m + 1])
                    clips, tokens = window.packs.clip_N[part], window.tokens[part]
                    packs.append(PlannedPack(clips, tokens, window.costs[m], cursor.epoch))
                cursor = self.move(cursor, len(chosen), len(window.order))
            yield PlannedStep(packs, cursor)

    def move(self, cursor: Cursor, packs: int, of: int) -> Cursor:
        if cursor.pack + packs < of:
            return Cursor(cursor.epoch, cursor.window, cursor.pack + packs)
        if cursor.window + 1 < self.windows:
            return Cursor(cursor.epoch, cursor.window + 1)
        return Cursor(cursor.epoch + 1)

    def arranged(self, epoch: int, window: int, begins: int) -> Window:
        """A window whose first own step begins at place `begins`."""
        if self.latest is None or self.latest[0] != (epoch, window, begins):
            tokens = self.kept(epoch, window)
            packs = self.packs(epoch, window)
            costs = packs.sums(tokens * (self.attention_length + tokens))
            full = packs.sums(tokens) > self.budget - self.budget // PART
            order = arrange(costs, full, self.packs_per_step, begins, self.seed, epoch, window)
            cuts, costs = packs.cu_M1.tolist(), costs.tolist()
            self.latest = (epoch, window, begins), Window(packs, tokens[packs.clip_N], cuts, costs, order.tolist())
        return self.latest[1]

    def packs(self, epoch: int, window: int) -> Packs:
        """Of clips as they are numbered through all datasets."""
        clip_N = self.clips(epoch)[window]
        packs = pack_clips(self.kept(epoch, window)[clip_N], self.budget, self.packs_per_step)
        return Packs(clip_N[packs.clip_N], packs.cu_M1)

    def kept(self, epoch: int, window: int) -> np.ndarray:
        """int64: how many tokens of each clip are seen in a window."""
        rate = rate_at(self.drop, epoch + window / self.windows)
        return kept_tokens(self.tokens, rate) if rate else self.tokens

    def clips(self, epoch: int) -> list[np.ndarray]:
        """int64, of each window: the clips of an epoch, one after the other."""
        if self.divided is None or self.divided[0] != epoch:
            clip_N = self.order(epoch)
            window_N = self.windows_of(epoch, clip_N)
            self.divided = epoch, [clip_N[window_N == w] for w in range(self.windows)]
        return self.divided[1]

    def windows_of(self, epoch: int, clip_N: np.ndarray) -> np.ndarray:
        """int64: the window of each clip of an epoch."""
        tokens_N = self.tokens[clip_N]
        long_N = tokens_N > self.budget // 2
        rest, window_N = np.count_nonzero(~long_N), np.empty_like(clip_N)
        window_N[~long_N] = np.arange(rest) * self.windows // max(rest, 1)
        long = np.flatnonzero(long_N)
        long = long[np.argsort(-tokens_N[long], kind="stable")]
        drawn = shuffled(-(-len(long) // self.packs_per_step), self.seed, GROUPS, epoch) % self.windows
        window_N[long] = np.repeat(drawn, self.packs_per_step)[: len(long)]
        return window_N

    def order(self, epoch: int) -> np.ndarray:
        """int64: the clips of an epoch, one after the other."""
        dataset_N = np.repeat(np.arange(len(self.sizes)), self.counts)
        if len(self.sizes) > 1:
            dataset_N = dataset_N[shuffled(len(dataset_N), self.seed, INTERLEAVE, epoch)]
        clip_N = np.empty_like(dataset_N)
        for k, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            clip_N[dataset_N == k] = sum(self.sizes[:k]) + self.stream(k, size, epoch * count, count)
        return clip_N

    def stream(self, dataset: int, size: int, first: int, count: int) -> np.ndarray:
        """Places `first .. first + count - 1` of the endless line of permutations of a dataset."""
        passes = range(first // size, (first + count - 1) // size + 1)
        line = np.concatenate([shuffled(size, self.seed, ORDER, dataset, p) for p in passes])
        return line[first - passes[0] * size :][:count]


def arrange(
    costs_M: np.ndarray, full_M: np.ndarray, packs_per_step: int, begins: int, seed: int, epoch: int, window: int
) -> np.ndarray:
    """int64 [M]: the order in which the packs of a window are used; its steps begin at place `begins` and so on.

    What is before the first and behind the last of its steps belongs to steps that it shares with other windows. The
    few packs that are cheaper than all full ones go into different steps.
    """
    by_cost = np.argsort(costs_M, kind="stable")
    cheap = int(np.argmax(np.append(full_M[by_cost], True)))
    if cheap < packs_per_step:
        places = np.minimum(np.arange(cheap) * (packs_per_step - 1), len(by_cost) - cheap)
        by_cost = np.insert(by_cost[cheap:], places, by_cost[:cheap])
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

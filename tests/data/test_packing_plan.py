"""The plan of a run: every clip as often as it should be, steps of equal packs, the same from any cursor."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.config import TokenDropConfig
from megasora.data.packing_plan import Cursor, PackingPlan, order_packs, clips_per_epoch, assign_packs_to_ranks
from megasora.data.shuffle import permutation
from megasora.testing.mixes import heavy_mix

WAN_14B = 29_000  # tokens of a clip whose attention to itself costs as much as all else
SMALL = np.array([1 + (7 * i) % 40 for i in range(50)])


def make_plan(tokens=(SMALL,), weights=None, budget=64, packs_per_step=4, window=20, length=30, seed=7):
    return PackingPlan(list(tokens), weights or [1.0] * len(tokens), budget, packs_per_step, window, length, seed)


def steps(plan, count, cursor=Cursor()):  # noqa: B008 frozen
    return list(itertools.islice(plan.steps(cursor), count))


def ids(step):
    return [pack.clips.tolist() for pack in step.packs]


def packs_of_epoch(plan, epoch):
    """The same packs without their order."""
    return [sorted(pack.tolist()) for w in range(plan.num_windows) for packs in [plan.pack_window(epoch, w)] for pack in packs]


def epochs(plan, count):
    """Clips in the order of the steps, cut at the ends of epochs."""
    lengths = [len(packs_of_epoch(plan, epoch)) for epoch in range(count)]
    flow = (pack for step in plan.steps(Cursor()) for pack in ids(step))
    return [list(itertools.chain(*itertools.islice(flow, length))) for length in lengths]


# ---- exactly once


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=150),
    packs_per_step=st.integers(1, 9),
    window=st.integers(1, 60),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_clip_once_and_all_in_packs_that_fit(lengths, packs_per_step, window, seed):
    tokens = np.array(lengths)
    plan = make_plan([tokens], packs_per_step=packs_per_step, window=window, seed=seed)
    for epoch in epochs(plan, 3):
        assert sorted(epoch) == list(range(len(tokens)))
    for step in steps(plan, 5):
        assert len(step.packs) == packs_per_step
        assert all(0 < tokens[pack.clips].sum() <= 64 for pack in step.packs)


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=120),
    packs_per_step=st.integers(1, 9),
    window=st.integers(1, 60),
    stops=st.lists(st.integers(1, 12), min_size=1, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_stops_at_any_steps_change_nothing(lengths, packs_per_step, window, stops):
    tokens = [np.array(lengths)]
    whole = steps(make_plan(tokens, packs_per_step=packs_per_step, window=window), sum(stops))
    cursor, pieces = Cursor(), []
    for count in stops:  # each with a plan that knows nothing of the one before
        pieces += steps(make_plan(tokens, packs_per_step=packs_per_step, window=window), count, cursor)
        cursor = pieces[-1].next_cursor
    assert [(ids(step), step.next_cursor) for step in pieces] == [(ids(step), step.next_cursor) for step in whole]


def test_another_epoch_or_seed_is_another_order_and_the_same_the_same():
    plan = make_plan()
    assert packs_of_epoch(plan, 0) == packs_of_epoch(make_plan(), 0)
    assert packs_of_epoch(plan, 0) != packs_of_epoch(plan, 1)
    assert packs_of_epoch(plan, 0) != packs_of_epoch(make_plan(seed=8), 0)
    assert [ids(s) for s in steps(plan, 9)] != [ids(s) for s in steps(make_plan(seed=8), 9)]


def test_the_order_of_a_seed_is_the_same_for_ever():
    # a run may go on with another version of numpy, whose own shuffles may differ
    assert permutation(10, 7, 0, 0, 3).tolist() == [2, 5, 3, 1, 8, 9, 7, 6, 4, 0]
    assert sorted(permutation(1000, 2**63 - 1, 1).tolist()) == list(range(1000)) and not len(permutation(0, 1))


# ---- mixtures


def test_an_epoch_of_a_mixture_has_clips_by_weight_and_as_many_as_there_are():
    sizes, weights = [300, 50, 650], [1.0, 1.0, 2.0]
    tokens = [np.full(n, 1 + k) for k, n in enumerate(sizes)]
    plan = make_plan(tokens, weights, window=300)
    assert plan.clips_per_epoch == [250, 250, 500]
    for epoch in epochs(plan, 2):
        assert Counter(plan.tokens_I[epoch].tolist()) == {1: 250, 2: 250, 3: 500}


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_when_an_epoch_ends_no_clip_of_a_dataset_was_seen_twice_more_than_another(sizes, weights):
    plan = make_plan([np.ones(n, dtype=np.int64) for n in sizes], weights[: len(sizes)], budget=8)
    assert all(count >= 1 for count in plan.clips_per_epoch)
    seen = np.zeros(sum(sizes), dtype=int)
    for epoch in epochs(plan, 3):
        np.add.at(seen, epoch, 1)
        for part, count in zip(np.split(seen, np.cumsum(sizes)[:-1]), plan.clips_per_epoch, strict=True):
            assert part.max() - part.min() <= 1 and part.sum() % count == 0


def test_a_dataset_goes_on_where_the_epoch_before_left_it():
    big, small = np.full(100, 1), np.full(100, 2)
    plan = make_plan([big, small], [3.0, 1.0], window=1000)  # 150 and 50 of 200
    first, second = epochs(plan, 2)
    assert sorted(i for i in first + second if i >= 100) == list(range(100, 200))  # half of it, then the other half
    assert Counter(i for i in first + second if i < 100) == dict.fromkeys(range(100), 3)


def test_one_dataset_is_seen_whole_whatever_its_weight():
    assert clips_per_epoch([17], [0.3]) == [17]


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -2.0], [1.0, float("nan")], [1.0]])
def test_bad_weights_and_empty_datasets_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        make_plan([SMALL, SMALL], weights)
    with pytest.raises(ValueError, match=r"datasets of \[50, 0\] clips"):
        make_plan([SMALL, np.zeros(0, dtype=np.int64)])


# ---- balance


def imbalance(plan, ranks):
    """max / mean of the ranks' costs, of each step of two epochs; the second begins within a step."""
    found = []
    for step in plan.steps(Cursor()):
        sums = step.costs[assign_packs_to_ranks(step.costs, ranks)].sum(1)
        found.append(sums.max() / sums.mean())
        if step.next_cursor.epoch > 1:
            return np.array(found)


@pytest.mark.parametrize(
    ("budget", "packs_per_step", "median", "high"),
    [(8192, 64, 1.0005, 1.01), (65_536, 64, 1.001, 1.02), (262_144, 64, 1.003, 1.1), (8192, 256, 1.0001, 1.001),
     (65_536, 256, 1.0003, 1.012), (262_144, 256, 1.002, 1.03), (1_048_576, 256, 1.004, 1.05)],
)  # fmt: skip
def test_ranks_have_equal_costs(budget, packs_per_step, median, high):
    """All but the few steps that have the clips nearly as long as a pack: with a pack a rank, nothing is like them."""
    tokens = heavy_mix(budget, 100_000, seed=0)
    plan = make_plan([tokens], budget=budget, packs_per_step=packs_per_step, window=262_144, length=WAN_14B)
    found = imbalance(plan, 64)
    assert np.median(found) <= median and np.quantile(found, 0.97) <= high


@pytest.mark.parametrize("budget", [65_536, 1_048_576])
def test_no_step_is_much_worse_than_the_longest_clips_must_make_one(budget):
    """The longest clip of an epoch at its best: beside the next in length, each with one clip that fills its pack."""
    tokens = heavy_mix(budget, 100_000, seed=0)
    plan = make_plan([tokens], budget=budget, packs_per_step=64, window=30_000, length=WAN_14B)
    longest = np.sort(tokens)[:-65:-1]
    rest = budget - longest
    best = longest * (WAN_14B + longest) + rest * (WAN_14B + rest)
    forced = longest[0] * (WAN_14B + longest[0]) / np.minimum(best, best[0]).mean()
    assert forced > 1.1 and imbalance(plan, 64).max() <= 1.02 * forced


def test_long_clips_that_are_alike_are_in_one_window_and_all_windows_have_some():
    tokens = heavy_mix(65_536, 50_000, seed=2)
    plan = make_plan([tokens], budget=65_536, packs_per_step=8, window=10_000)
    longest = np.argsort(-tokens, kind="stable")[: (tokens > 32_768).sum() // 8 * 8]
    window = {clip: w for w in range(5) for clip in plan.window_clips(0)[w].tolist()}
    groups = np.array([window[clip] for clip in longest.tolist()]).reshape(-1, 8)
    alike = np.ptp(groups, axis=1) == 0  # clips of one length come as they are drawn: two groups may share it
    assert alike.mean() > 0.8
    counts = np.bincount(groups[:, 0], minlength=5)
    assert counts.max() - counts.min() <= 3 and (np.diff(groups[:, 0]) != 0).mean() > 0.5


def test_steps_are_alike_in_how_much_of_them_is_short_clips():
    """Were packs as drawn sorted by their cost, the spread would be 0.45: some steps had long clips alone."""
    tokens = heavy_mix(65_536, 200_000, seed=4)
    plan = make_plan([tokens], budget=65_536, packs_per_step=64, window=262_144, length=WAN_14B)
    found = [np.concatenate([pack.tokens for pack in step.packs]) for step in steps(plan, 200)]
    share = np.array([kept[kept <= 4096].sum() / kept.sum() for kept in found])
    assert share.std() < 0.3 * share.mean()


def test_packs_that_are_not_full_go_into_different_steps():
    costs, full = np.array([100] * 30 + [40, 60]), np.array([True] * 30 + [False] * 2)
    found = costs[order_packs(costs, full, 8, 0, 0, 0, 0)].reshape(4, 8).sum(1)
    assert sorted(found.tolist()) == [740, 760, 800, 800]
    dear = np.array([100] * 30 + [200, 200])  # a clip that leaves room for none is no cheap pack
    found = dear[order_packs(dear, full, 8, 0, 0, 0, 0)].reshape(4, 8).sum(1)
    assert sorted(found.tolist()) == [800, 800, 800, 1000]


def test_costs_are_linear_and_quadratic_in_the_clips_of_a_pack():
    for step in steps(make_plan(length=30), 3):
        assert step.costs.tolist() == [int((SMALL[p.clips] * (30 + SMALL[p.clips])).sum()) for p in step.packs]


def test_steps_come_in_no_order_of_cost():
    tokens = heavy_mix(65_536, 50_000, seed=5)
    plan = make_plan([tokens], budget=65_536, packs_per_step=64, window=100_000, length=1000)
    costs = np.array([step.costs.mean() for step in steps(plan, 40)])
    assert abs(np.corrcoef(costs, np.arange(40))[0, 1]) < 0.4 and costs.max() > 1.5 * costs.min()


@given(
    costs=st.lists(st.integers(1, 10**12), min_size=1, max_size=12).map(lambda c: c * 12),
    ranks=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
@settings(max_examples=50, deadline=None)
def test_a_deal_gives_every_pack_to_one_rank_and_all_ranks_equally_many(costs, ranks):
    dealt = assign_packs_to_ranks(np.array(costs), ranks)
    assert dealt.shape == (ranks, len(costs) // ranks)
    assert sorted(dealt.ravel().tolist()) == list(range(len(costs)))


def test_a_deal_evens_out_what_can_be_evened_out():
    assert sorted(np.array([9, 8, 2, 1])[assign_packs_to_ranks(np.array([9, 8, 2, 1]), 2)].sum(1)) == [10, 10]
    with pytest.raises(ValueError, match="4 packs for 3 ranks"):
        assign_packs_to_ranks(np.array([1, 1, 1, 1]), 3)


# ---- time


def test_the_time_to_plan_grows_with_the_number_of_clips_and_no_faster():
    def seconds(clips):
        tokens = heavy_mix(8192, clips, seed=6)
        start = time.process_time()
        plan = make_plan([tokens], budget=8192, packs_per_step=64, window=262_144, length=WAN_14B)
        assert sum(1 for _ in itertools.takewhile(lambda step: step.next_cursor.epoch == 0, plan.steps(Cursor()))) > 50
        return time.process_time() - start

    assert seconds(400_000) < 20 * min(seconds(40_000) for _ in range(3))  # 10 times the clips


def test_dropped_tokens_make_room_and_the_rate_falls_by_windows():
    """Rate 0.5 at the start, 0 after two epochs of four windows: each stair is an eighth of the way."""
    tokens = np.arange(1000) % 50 + 1
    plan = PackingPlan([tokens], [1.0], 64, 4, 250, 30, 0, TokenDropConfig(start=0.5, end=0.0, epochs=2.0))
    whole = PackingPlan([tokens], [1.0], 64, 4, 250, 30, 0)
    packs = [[len(p.pack_window(e, w)) for e in range(3) for w in range(4)] for p in (plan, whole)]
    assert sum(packs[0][:4]) < 0.65 * sum(packs[1][:4]) and packs[0][8:] == packs[1][8:]
    for step in itertools.islice(plan.steps(Cursor()), 300):
        for pack in step.packs:
            assert pack.tokens.sum() <= 64 and pack.cost == (pack.tokens * (30 + pack.tokens)).sum()
            rates = {0.5 - (pack.epoch + w / 4) / 4 if pack.epoch < 2 else 0.0 for w in range(4)}
            kept = [tokens[pack.clips] - np.floor(tokens[pack.clips] * rate) for rate in rates]
            assert any((pack.tokens == k).all() for k in kept)
    for epoch in range(2):
        seen = np.concatenate([plan.pack_window(epoch, w).clip_I for w in range(4)])
        assert sorted(seen.tolist()) == list(range(1000))

"""The packing plan: every clip as often as it should be seen, steps of equal packs, the same from any cursor."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.config import TokenDropConfig
from megasora.data.packing_plan import Cursor, PackingPlan, assign_packs_to_ranks, clips_per_epoch, order_packs
from megasora.data.shuffle import permutation
from megasora.testing.mixes import heavy_mix

WAN_14B = 29_000  # break-even tokens: a clip's self-attention costs as much as everything else
SMALL = np.array([1 + (7 * i) % 40 for i in range(50)])


def make_plan(
    tokens=(SMALL,), weights=None, tokens_per_pack=64, packs_per_step=4, window=20, break_even=30, seed=7
) -> PackingPlan:
    weights = weights or [1.0] * len(tokens)
    return PackingPlan(list(tokens), weights, tokens_per_pack, packs_per_step, window, break_even, seed)


def first_steps(plan, count, cursor=Cursor()):  # noqa: B008 frozen
    return list(itertools.islice(plan.steps(cursor), count))


def clips_of(step):
    return [pack.clips.tolist() for pack in step.packs]


def packs_of_epoch(plan, epoch):
    """The packs of an epoch without the order of their clips."""
    windows = [plan.pack_window(epoch, window) for window in range(plan.num_windows)]
    return [sorted(pack.tolist()) for packs in windows for pack in packs]


def clips_by_epoch(plan, count):
    """The clips of the first `count` epochs, in the order of the steps."""
    lengths = [len(packs_of_epoch(plan, epoch)) for epoch in range(count)]
    packs = (pack for step in plan.steps(Cursor()) for pack in clips_of(step))
    return [list(itertools.chain(*itertools.islice(packs, length))) for length in lengths]


# ---- exactly once


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=150),
    packs_per_step=st.integers(1, 9),
    window=st.integers(1, 60),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_clip_once_and_all_packs_fit(lengths, packs_per_step, window, seed):
    tokens = np.array(lengths)
    plan = make_plan([tokens], packs_per_step=packs_per_step, window=window, seed=seed)
    for clips in clips_by_epoch(plan, 3):
        assert sorted(clips) == list(range(len(tokens)))
    for step in first_steps(plan, 5):
        assert len(step.packs) == packs_per_step
        assert all(0 < tokens[pack.clips].sum() <= 64 for pack in step.packs)


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=120),
    packs_per_step=st.integers(1, 9),
    window=st.integers(1, 60),
    stops=st.lists(st.integers(1, 12), min_size=1, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_resuming_at_any_steps_changes_nothing(lengths, packs_per_step, window, stops):
    tokens = [np.array(lengths)]
    expected = first_steps(make_plan(tokens, packs_per_step=packs_per_step, window=window), sum(stops))
    cursor, resumed = Cursor(), []
    for count in stops:  # each with a new plan
        resumed += first_steps(make_plan(tokens, packs_per_step=packs_per_step, window=window), count, cursor)
        cursor = resumed[-1].next_cursor
    assert [(clips_of(s), s.next_cursor) for s in resumed] == [(clips_of(s), s.next_cursor) for s in expected]


def test_the_order_depends_on_the_epoch_and_the_seed_alone():
    plan = make_plan()
    assert packs_of_epoch(plan, 0) == packs_of_epoch(make_plan(), 0)
    assert packs_of_epoch(plan, 0) != packs_of_epoch(plan, 1)
    assert packs_of_epoch(plan, 0) != packs_of_epoch(make_plan(seed=8), 0)
    assert [clips_of(s) for s in first_steps(plan, 9)] != [clips_of(s) for s in first_steps(make_plan(seed=8), 9)]


def test_permutations_of_a_seed_are_the_same_in_every_version():
    # a run may be resumed with another version of numpy, whose own shuffles may differ
    assert permutation(10, 7, 0, 0, 3).tolist() == [2, 5, 3, 1, 8, 9, 7, 6, 4, 0]
    assert sorted(permutation(1000, 2**63 - 1, 1).tolist()) == list(range(1000)) and not len(permutation(0, 1))


# ---- mixtures


def test_an_epoch_of_a_mixture_has_clips_in_proportion_to_the_weights():
    sizes, weights = [300, 50, 650], [1.0, 1.0, 2.0]
    tokens = [np.full(size, 1 + dataset) for dataset, size in enumerate(sizes)]
    plan = make_plan(tokens, weights, window=300)
    assert plan.clips_per_epoch == [250, 250, 500]
    for clips in clips_by_epoch(plan, 2):
        assert Counter(plan.tokens_I[clips].tolist()) == {1: 250, 2: 250, 3: 500}


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_at_the_end_of_an_epoch_the_clips_of_a_dataset_were_seen_equally_often_up_to_one(sizes, weights):
    tokens = [np.ones(size, dtype=np.int64) for size in sizes]
    plan = make_plan(tokens, weights[: len(sizes)], tokens_per_pack=8)
    assert all(count >= 1 for count in plan.clips_per_epoch)
    seen = np.zeros(sum(sizes), dtype=int)
    for clips in clips_by_epoch(plan, 3):
        np.add.at(seen, clips, 1)
        for of_dataset, count in zip(np.split(seen, np.cumsum(sizes)[:-1]), plan.clips_per_epoch, strict=True):
            assert of_dataset.max() - of_dataset.min() <= 1 and of_dataset.sum() % count == 0


def test_a_dataset_resumes_where_the_previous_epoch_stopped():
    plan = make_plan([np.full(100, 1), np.full(100, 2)], [3.0, 1.0], window=1000)  # 150 and 50 of 200
    first, second = clips_by_epoch(plan, 2)
    assert sorted(i for i in first + second if i >= 100) == list(range(100, 200))  # one half, then the other
    assert Counter(i for i in first + second if i < 100) == dict.fromkeys(range(100), 3)


def test_a_single_dataset_is_seen_whole_whatever_its_weight():
    assert clips_per_epoch([17], [0.3]) == [17]


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -2.0], [1.0, float("nan")], [1.0]])
def test_bad_weights_and_empty_datasets_raise(weights):
    with pytest.raises(ValueError, match="weights"):
        make_plan([SMALL, SMALL], weights)
    with pytest.raises(ValueError, match=r"datasets of \[50, 0\] clips"):
        make_plan([SMALL, np.zeros(0, dtype=np.int64)])


# ---- balance


def imbalance(plan, num_ranks):
    """max / mean of the costs per rank, for each step of two epochs; the second epoch begins within a step."""
    ratios = []
    for step in plan.steps(Cursor()):
        costs = step.costs[assign_packs_to_ranks(step.costs, num_ranks)].sum(1)
        ratios.append(costs.max() / costs.mean())
        if step.next_cursor.epoch > 1:
            return np.array(ratios)


@pytest.mark.parametrize(
    ("tokens_per_pack", "packs_per_step", "median", "high"),
    [(8192, 64, 1.0005, 1.01), (65_536, 64, 1.001, 1.02), (262_144, 64, 1.003, 1.1), (8192, 256, 1.0001, 1.001),
     (65_536, 256, 1.0003, 1.012), (262_144, 256, 1.002, 1.03), (1_048_576, 256, 1.004, 1.05)],
)  # fmt: skip
def test_ranks_have_equal_costs(tokens_per_pack, packs_per_step, median, high):
    """Except in the few steps with clips nearly as long as a pack: with one pack per rank, nothing balances them."""
    tokens = heavy_mix(tokens_per_pack, 100_000, seed=0)
    plan = make_plan([tokens], None, tokens_per_pack, packs_per_step, window=262_144, break_even=WAN_14B)
    ratios = imbalance(plan, 64)
    assert np.median(ratios) <= median and np.quantile(ratios, 0.97) <= high


@pytest.mark.parametrize("tokens_per_pack", [65_536, 1_048_576])
def test_no_step_is_much_worse_than_its_longest_clips_enforce(tokens_per_pack):
    """The best step for the longest clip: with the next 63 in length, each with one clip that fills its pack."""
    tokens = heavy_mix(tokens_per_pack, 100_000, seed=0)
    plan = make_plan([tokens], None, tokens_per_pack, packs_per_step=64, window=30_000, break_even=WAN_14B)
    longest = np.sort(tokens)[:-65:-1]
    rest = tokens_per_pack - longest
    best = longest * (WAN_14B + longest) + rest * (WAN_14B + rest)
    least = longest[0] * (WAN_14B + longest[0]) / np.minimum(best, best[0]).mean()
    assert least > 1.1 and imbalance(plan, 64).max() <= 1.02 * least


def test_long_clips_of_similar_length_are_in_one_window_and_all_windows_have_some():
    tokens = heavy_mix(65_536, 50_000, seed=2)
    plan = make_plan([tokens], tokens_per_pack=65_536, packs_per_step=8, window=10_000)
    longest = np.argsort(-tokens, kind="stable")[: (tokens > 32_768).sum() // 8 * 8]
    window = {clip: w for w in range(5) for clip in plan.window_clips(0)[w].tolist()}
    groups = np.array([window[clip] for clip in longest.tolist()]).reshape(-1, 8)
    in_one_window = np.ptp(groups, axis=1) == 0  # clips of one length are in random order: groups may share them
    assert in_one_window.mean() > 0.8
    counts = np.bincount(groups[:, 0], minlength=5)
    assert counts.max() - counts.min() <= 3 and (np.diff(groups[:, 0]) != 0).mean() > 0.5


def test_all_steps_have_a_similar_fraction_of_short_clips():
    """With random packs sorted by cost, the deviation would be 0.45 of the mean: some steps had no short clips."""
    tokens = heavy_mix(65_536, 200_000, seed=4)
    plan = make_plan([tokens], tokens_per_pack=65_536, packs_per_step=64, window=262_144, break_even=WAN_14B)
    tokens_of_steps = [np.concatenate([pack.tokens for pack in step.packs]) for step in first_steps(plan, 200)]
    fractions = np.array([tokens[tokens <= 4096].sum() / tokens.sum() for tokens in tokens_of_steps])
    assert fractions.std() < 0.3 * fractions.mean()


def test_underfilled_packs_go_into_different_steps():
    costs, is_filled = np.array([100] * 30 + [40, 60]), np.array([True] * 30 + [False] * 2)
    of_steps = costs[order_packs(costs, is_filled, 8, 0, 0, 0, 0)].reshape(4, 8).sum(1)
    assert sorted(of_steps.tolist()) == [740, 760, 800, 800]
    expensive = np.array([100] * 30 + [200, 200])  # underfilled because of one long clip: not cheap
    of_steps = expensive[order_packs(expensive, is_filled, 8, 0, 0, 0, 0)].reshape(4, 8).sum(1)
    assert sorted(of_steps.tolist()) == [800, 800, 800, 1000]


def test_costs_are_linear_and_quadratic_in_the_clips_of_a_pack():
    for step in first_steps(make_plan(break_even=30), 3):
        assert step.costs.tolist() == [int((SMALL[p.clips] * (30 + SMALL[p.clips])).sum()) for p in step.packs]


def test_steps_are_in_no_order_of_cost():
    tokens = heavy_mix(65_536, 50_000, seed=5)
    plan = make_plan([tokens], tokens_per_pack=65_536, packs_per_step=64, window=100_000, break_even=1000)
    costs = np.array([step.costs.mean() for step in first_steps(plan, 40)])
    assert abs(np.corrcoef(costs, np.arange(40))[0, 1]) < 0.4 and costs.max() > 1.5 * costs.min()


@given(
    costs=st.lists(st.integers(1, 10**12), min_size=1, max_size=12).map(lambda c: c * 12),
    num_ranks=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
@settings(max_examples=50, deadline=None)
def test_every_pack_is_assigned_to_one_rank_and_all_ranks_get_equally_many(costs, num_ranks):
    assigned = assign_packs_to_ranks(np.array(costs), num_ranks)
    assert assigned.shape == (num_ranks, len(costs) // num_ranks)
    assert sorted(assigned.ravel().tolist()) == list(range(len(costs)))


def test_the_assignment_balances_costs():
    costs = np.array([9, 8, 2, 1])
    assert sorted(costs[assign_packs_to_ranks(costs, 2)].sum(1)) == [10, 10]
    with pytest.raises(ValueError, match="4 packs for 3 ranks"):
        assign_packs_to_ranks(np.array([1, 1, 1, 1]), 3)


# ---- time


def test_the_time_to_plan_is_about_linear_in_the_number_of_clips():
    def seconds(clips):
        tokens = heavy_mix(8192, clips, seed=6)
        start = time.process_time()
        plan = make_plan([tokens], tokens_per_pack=8192, packs_per_step=64, window=262_144, break_even=WAN_14B)
        first_epoch = itertools.takewhile(lambda step: step.next_cursor.epoch == 0, plan.steps(Cursor()))
        assert sum(1 for _ in first_epoch) > 50
        return time.process_time() - start

    assert seconds(400_000) < 20 * min(seconds(40_000) for _ in range(3))  # 10 times the clips


# ---- token dropping


def test_dropped_tokens_free_space_and_the_fraction_falls_by_windows():
    """The fraction is 0.5 at first and 0 after two epochs of four windows: it falls by an eighth of 0.5 per window."""
    tokens = np.arange(1000) % 50 + 1
    plan = PackingPlan([tokens], [1.0], 64, 4, 250, 30, 0, TokenDropConfig(start=0.5, end=0.0, epochs=2.0))
    without = PackingPlan([tokens], [1.0], 64, 4, 250, 30, 0)
    packs = [[len(p.pack_window(e, w)) for e in range(3) for w in range(4)] for p in (plan, without)]
    assert sum(packs[0][:4]) < 0.65 * sum(packs[1][:4]) and packs[0][8:] == packs[1][8:]
    for step in itertools.islice(plan.steps(Cursor()), 300):
        for pack in step.packs:
            assert pack.tokens.sum() <= 64 and pack.cost == (pack.tokens * (30 + pack.tokens)).sum()
            fractions = {0.5 - (pack.epoch + w / 4) / 4 if pack.epoch < 2 else 0.0 for w in range(4)}
            kept = [tokens[pack.clips] - np.floor(tokens[pack.clips] * fraction) for fraction in fractions]
            assert any((pack.tokens == k).all() for k in kept)
    for epoch in range(2):
        seen = np.concatenate([plan.pack_window(epoch, w).clip_I for w in range(4)])
        assert sorted(seen.tolist()) == list(range(1000))

"""The plan of a pack over ranks: nothing lost, everything even, little to send."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.batch import PackPlan
from megasora.parallel.plan import attention_work, plan_pack, sent_tokens, tokens

LENGTHS = st.one_of(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.lists(st.sampled_from([1, 7, 8, 300]), min_size=1, max_size=20),
    st.builds(lambda images, clip: [*images, clip], st.lists(st.integers(1, 9), max_size=40), st.integers(100, 20_000)),
    st.lists(st.integers(0, 11).map(lambda k: 3 * 2**k), min_size=1, max_size=30),
)


def fitting(lengths, ranks):
    """The plan with the fewest slots that hold the pack."""
    return plan_pack(lengths, ranks, -(-int(sum(lengths)) // ranks))


def heavy_tailed(num_tokens, seed):
    """Images and clips of 64 to 1,000,000 tokens, log-normal, up to `num_tokens` in all."""
    drawn = np.exp(np.random.default_rng(seed).normal(np.log(8000), 1.61, 20_000)).astype(np.int64)
    chosen = []
    for l in drawn[(drawn >= 64) & (drawn <= 1_000_000)].tolist():
        if l <= num_tokens:
            chosen.append(l)
            num_tokens -= l
    return np.array(chosen)


def max_over_mean(x):
    return x.max() / x.mean()


def pieces_of(plan, segment):
    pieces = plan.pieces_Q4.numpy()
    return pieces[pieces[:, 1] == segment]


# ---- nothing lost


@settings(deadline=None, max_examples=300)
@given(LENGTHS, st.integers(1, 24))
def test_each_token_is_on_one_rank_in_one_piece_of_its_segment_there(lengths, ranks):
    plan = fitting(lengths, ranks)
    seen = [np.zeros(l, dtype=int) for l in lengths]
    for _, segment, first, last in plan.pieces_Q4.tolist():
        assert 0 <= first < last <= lengths[segment]
        seen[segment][first:last] += 1
    assert all((count == 1).all() for count in seen)
    places = [(rank, segment) for rank, segment, _, _ in plan.pieces_Q4.tolist()]
    assert places == sorted(set(places))
    assert 0 <= places[0][0] and places[-1][0] < ranks
    assert plan.pieces_Q4.dtype == torch.int64


@settings(deadline=None, max_examples=300)
@given(LENGTHS, st.integers(1, 24))
def test_tokens_differ_by_one_and_work_by_that_of_two_tokens(lengths, ranks):
    plan = fitting(lengths, ranks)
    assert tokens(plan).max() - tokens(plan).min() <= 1
    assert tokens(plan).max() <= plan.tokens_per_rank
    work = attention_work(plan)
    assert work.sum() == sum(l * l for l in lengths)
    assert np.abs(work - work.mean()).max() < 2 * max(lengths)


@settings(deadline=None, max_examples=100)
@given(LENGTHS, st.integers(1, 24))
def test_at_most_two_cuts_for_each_place_where_ranks_meet(lengths, ranks):
    assert len(fitting(lengths, ranks).pieces_Q4) <= len(lengths) + 2 * (ranks - 1)


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(1, 24))
def test_the_plan_is_a_function_of_the_numbers(lengths, ranks):
    a, b = fitting(lengths, ranks), fitting(np.array(lengths, dtype=np.int32), ranks)
    assert torch.equal(a.pieces_Q4, b.pieces_Q4)
    assert (a.ranks, a.tokens_per_rank) == (b.ranks, b.tokens_per_rank)


# ---- known answers


def test_one_rank_has_every_segment_whole_and_in_order():
    plan = plan_pack([5, 900, 2, 30], 1, 1000)
    assert plan.pieces_Q4.tolist() == [[0, 0, 0, 5], [0, 1, 0, 900], [0, 2, 0, 2], [0, 3, 0, 30]]
    assert sent_tokens(plan).tolist() == [0]


def test_one_segment_is_cut_evenly():
    plan = plan_pack([1000], 8, 128)
    assert tokens(plan).tolist() == [125] * 8
    assert sent_tokens(plan).tolist() == [125 * 7] * 8


@pytest.mark.parametrize("ranks, copies", [(4, 3), (16, 1), (7, 20)])
def test_equal_segments_that_fit_are_not_cut(ranks, copies):
    plan = plan_pack([64] * ranks * copies, ranks, 64 * copies)
    assert len(plan.pieces_Q4) == ranks * copies
    assert sent_tokens(plan).sum() == 0


def test_a_long_segment_and_a_short_one_share_a_rank():
    # 4 x 30^2 + 4 x 10^2 = 4000 work on 4 ranks: one of each is exactly a rank's share of tokens and of work.
    plan = plan_pack([10, 30, 10, 30, 30, 10, 30, 10], 4, 40)
    assert attention_work(plan).tolist() == [1000] * 4
    assert sent_tokens(plan).sum() == 0


def test_fewer_tokens_than_ranks_leaves_ranks_empty():
    plan = plan_pack([2, 1], 8, 4)
    assert sorted(tokens(plan).tolist()) == [0] * 5 + [1] * 3


def test_one_giant_among_thousands_of_images():
    lengths = [256] * 2000 + [1_000_000] + [1024] * 2000
    plan = plan_pack(lengths, 64, 56_000)
    assert max_over_mean(tokens(plan)) <= 1.0001 and max_over_mean(attention_work(plan)) <= 1.001
    whole = sum(len(pieces_of(plan, segment)) == 1 for segment in range(len(lengths)))
    assert whole >= len(lengths) - 64
    assert sent_tokens(plan).sum() == pytest.approx(63 * 1_000_000, rel=0.001)


# ---- the mix of the goal


@pytest.mark.parametrize("ranks, slots", [(32, 131_072), (128, 131_072), (256, 16_384), (1024, 16_384)])
@pytest.mark.parametrize("seed", range(3))
def test_a_heavy_tailed_pack_is_even_within_one_percent(ranks, slots, seed):
    plan = plan_pack(heavy_tailed(ranks * slots, seed), ranks, slots)
    assert max_over_mean(tokens(plan)) <= 1.0001
    assert max_over_mean(attention_work(plan)) <= 1.001


@pytest.mark.parametrize("seed", range(3))
def test_traffic_is_near_the_least_that_even_ranks_allow(seed):
    # l tokens of l work each need l / T of the tokens' R ranks and l^2 / W of the work's: no plan gets by with fewer.
    lengths = heavy_tailed(1024 * 16_384, seed)
    fewest = 1024 * np.maximum(lengths / lengths.sum(), lengths**2 / (lengths**2).sum())
    least = (lengths * np.maximum(fewest - 1, 0)).sum()
    sent = sent_tokens(plan_pack(lengths, 1024, 16_384)).sum()
    assert least < sent < 1.5 * least


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_a_segment_are_on_consecutive_ranks(seed):
    lengths = heavy_tailed(256 * 16_384, seed)
    plan = plan_pack(lengths, 256, 16_384)
    cut = 0
    for segment in range(len(lengths)):
        ranks = pieces_of(plan, segment)[:, 0]
        assert ranks.max() - ranks.min() == len(ranks) - 1
        cut += len(ranks) > 1
    assert cut > 10


# ---- the counts


def by_hand():
    return PackPlan(3, 10, torch.tensor([[0, 0, 0, 4], [0, 1, 0, 6], [1, 1, 6, 9], [2, 1, 9, 10], [2, 2, 0, 5]]))


def test_counts_of_a_plan_made_by_hand():
    assert tokens(by_hand()).tolist() == [10, 3, 6]
    assert attention_work(by_hand()).tolist() == [4 * 4 + 6 * 10, 3 * 10, 1 * 10 + 5 * 5]
    assert sent_tokens(by_hand()).tolist() == [6 * 2, 3 * 2, 1 * 2]


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(1, 8))
def test_sent_tokens_are_those_that_a_ring_of_direct_hops_passes(lengths, ranks):
    plan = fitting(lengths, ranks)
    held = [{} for _ in range(ranks)]
    for rank, segment, first, last in plan.pieces_Q4.tolist():
        held[rank][segment] = last - first
    sent = [
        sum(n for hop in range(1, ranks) for segment, n in held[r].items() if segment in held[(r + hop) % ranks])
        for r in range(ranks)
    ]
    assert sent_tokens(plan).tolist() == sent


def test_counts_are_exact_beyond_the_precision_of_float64():
    plan = PackPlan(1, 2**30, torch.tensor([[0, 0, 0, 2**28 + 1], [0, 1, 0, 3]]))
    assert attention_work(plan).tolist() == [(2**28 + 1) ** 2 + 9]


# ---- what is refused


@pytest.mark.parametrize(
    "lengths, ranks, slots, words",
    [
        ([3, 0, 5], 2, 8, r"lengths\[1\]=0 must be at least 1"),
        ([3, -4], 2, 8, r"lengths\[1\]=-4"),
        ([10, 7], 2, 8, "17 tokens are more than 2 ranks x 8 tokens = 16"),
        ([2**31, 1], 2, 2**31, "2147483649 tokens are more than a pack can have, 2147483648"),
        ([], 2, 8, "one or more integers"),
        ([1.5, 2.0], 2, 8, "one or more integers, not float64"),
        ([[1, 2]], 2, 8, r"of shape \[1, 2\]"),
        ([1], 0, 8, "ranks=0"),
        ([1], 2, 0, "tokens_per_rank=0"),
    ],
)
def test_what_is_no_pack_is_refused_with_its_numbers(lengths, ranks, slots, words):
    with pytest.raises(ValueError, match=words):
        plan_pack(lengths, ranks, slots)


def test_a_full_pack_of_the_most_tokens_is_planned_exactly():
    plan = plan_pack([2**30, 2**30 - 1, 1], 3, 2**30)
    assert tokens(plan).sum() == 2**31 and attention_work(plan).sum() == 2**60 + (2**30 - 1) ** 2 + 1
    assert max_over_mean(attention_work(plan)) <= 1 + 1e-8

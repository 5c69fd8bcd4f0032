"""split_pack: every token is assigned once, tokens and work are balanced, little is sent."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.batch import ContextSplit
from megasora.parallel.context_split import (
    attention_work_per_rank,
    received_tokens_per_rank,
    sent_tokens_per_rank,
    split_pack,
    tokens_per_rank,
)

LENGTHS = st.one_of(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.lists(st.sampled_from([1, 7, 8, 300]), min_size=1, max_size=20),
    st.builds(lambda images, clip: [*images, clip], st.lists(st.integers(1, 9), max_size=40), st.integers(100, 20_000)),
    st.lists(st.integers(0, 11).map(lambda k: 3 * 2**k), min_size=1, max_size=30),
)


def tightest_split(lengths, ranks):
    """The split with the fewest slots that hold the pack."""
    return split_pack(lengths, ranks, -(-int(sum(lengths)) // ranks))


def heavy_tailed(num_tokens, seed):
    """Lengths of images and clips, log-normal, 64 to 1,000,000 tokens, at most `num_tokens` in total."""
    drawn = np.exp(np.random.default_rng(seed).normal(np.log(8000), 1.61, 20_000)).astype(np.int64)
    chosen = []
    for l in drawn[(drawn >= 64) & (drawn <= 1_000_000)].tolist():
        if l <= num_tokens:
            chosen.append(l)
            num_tokens -= l
    return np.array(chosen)


def max_over_mean(x):
    return x.max() / x.mean()


def pieces_of(split, segment):
    pieces = split.pieces_Q4.numpy()
    return pieces[pieces[:, 1] == segment]


# ---- every token once, balanced


@settings(deadline=None, max_examples=300)
@given(LENGTHS, st.integers(1, 24))
def test_each_token_is_on_one_rank_which_has_one_piece_of_its_segment(lengths, ranks):
    split = tightest_split(lengths, ranks)
    seen = [np.zeros(l, dtype=int) for l in lengths]
    for _, segment, start, stop in split.pieces_Q4.tolist():
        assert 0 <= start < stop <= lengths[segment]
        seen[segment][start:stop] += 1
    assert all((count == 1).all() for count in seen)
    pairs = [(rank, segment) for rank, segment, _, _ in split.pieces_Q4.tolist()]
    assert pairs == sorted(set(pairs))
    assert 0 <= pairs[0][0] and pairs[-1][0] < ranks
    assert split.pieces_Q4.dtype == torch.int64


@settings(deadline=None, max_examples=300)
@given(LENGTHS, st.integers(1, 24))
def test_token_counts_differ_by_one_and_work_by_that_of_two_tokens(lengths, ranks):
    split = tightest_split(lengths, ranks)
    assert tokens_per_rank(split).max() - tokens_per_rank(split).min() <= 1
    assert tokens_per_rank(split).max() <= split.slots_per_rank
    work = attention_work_per_rank(split)
    assert work.sum() == sum(l * l for l in lengths)
    assert np.abs(work - work.mean()).max() < 2 * max(lengths)


@settings(deadline=None, max_examples=100)
@given(LENGTHS, st.integers(1, 24))
def test_at_most_two_segments_are_split_at_each_border_of_two_ranks(lengths, ranks):
    assert len(tightest_split(lengths, ranks).pieces_Q4) <= len(lengths) + 2 * (ranks - 1)


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(1, 24))
def test_the_split_depends_on_the_lengths_only(lengths, ranks):
    a, b = tightest_split(lengths, ranks), tightest_split(np.array(lengths, dtype=np.int32), ranks)
    assert torch.equal(a.pieces_Q4, b.pieces_Q4)
    assert (a.ranks, a.slots_per_rank) == (b.ranks, b.slots_per_rank)


# ---- known answers


def test_one_rank_has_every_segment_whole_and_in_order():
    split = split_pack([5, 900, 2, 30], 1, 1000)
    assert split.pieces_Q4.tolist() == [[0, 0, 0, 5], [0, 1, 0, 900], [0, 2, 0, 2], [0, 3, 0, 30]]
    assert sent_tokens_per_rank(split).tolist() == [0]


def test_one_segment_is_split_evenly():
    split = split_pack([1000], 8, 128)
    assert tokens_per_rank(split).tolist() == [125] * 8
    assert sent_tokens_per_rank(split).tolist() == [125 * 7] * 8


@pytest.mark.parametrize("ranks, copies", [(4, 3), (16, 1), (7, 20)])
def test_equal_segments_that_fit_are_not_split(ranks, copies):
    split = split_pack([64] * ranks * copies, ranks, 64 * copies)
    assert len(split.pieces_Q4) == ranks * copies
    assert sent_tokens_per_rank(split).sum() == 0


def test_a_rank_gets_a_long_segment_and_a_short_one():
    # 4 x 30^2 + 4 x 10^2 = 4000 work on 4 ranks: one of each is exactly one rank's fraction of tokens and of work.
    split = split_pack([10, 30, 10, 30, 30, 10, 30, 10], 4, 40)
    assert attention_work_per_rank(split).tolist() == [1000] * 4
    assert sent_tokens_per_rank(split).sum() == 0


def test_fewer_tokens_than_ranks_leaves_ranks_empty():
    split = split_pack([2, 1], 8, 4)
    assert sorted(tokens_per_rank(split).tolist()) == [0] * 5 + [1] * 3


def test_one_giant_clip_among_thousands_of_images():
    lengths = [256] * 2000 + [1_000_000] + [1024] * 2000
    split = split_pack(lengths, 64, 56_000)
    assert max_over_mean(tokens_per_rank(split)) <= 1.0001 and max_over_mean(attention_work_per_rank(split)) <= 1.001
    whole = sum(len(pieces_of(split, segment)) == 1 for segment in range(len(lengths)))
    assert whole >= len(lengths) - 64
    assert sent_tokens_per_rank(split).sum() == pytest.approx(63 * 1_000_000, rel=0.001)


# ---- a heavy-tailed mix


@pytest.mark.parametrize("ranks, slots", [(32, 131_072), (128, 131_072), (256, 16_384), (1024, 16_384)])
@pytest.mark.parametrize("seed", range(3))
def test_a_heavy_tailed_pack_is_balanced_within_a_thousandth(ranks, slots, seed):
    split = split_pack(heavy_tailed(ranks * slots, seed), ranks, slots)
    assert max_over_mean(tokens_per_rank(split)) <= 1.0001
    assert max_over_mean(attention_work_per_rank(split)) <= 1.001


@pytest.mark.parametrize("seed", range(3))
def test_traffic_is_near_the_minimum_of_any_balanced_split(seed):
    # l tokens of l work each need l / T of the R ranks for the tokens and l^2 / W for the work: no split needs fewer.
    lengths = heavy_tailed(1024 * 16_384, seed)
    fewest = 1024 * np.maximum(lengths / lengths.sum(), lengths**2 / (lengths**2).sum())
    least = (lengths * np.maximum(fewest - 1, 0)).sum()
    sent = sent_tokens_per_rank(split_pack(lengths, 1024, 16_384)).sum()
    assert least < sent < 1.5 * least


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_a_segment_are_on_consecutive_ranks(seed):
    lengths = heavy_tailed(256 * 16_384, seed)
    split = split_pack(lengths, 256, 16_384)
    num_split = 0
    for segment in range(len(lengths)):
        ranks = pieces_of(split, segment)[:, 0]
        assert ranks.max() - ranks.min() == len(ranks) - 1
        num_split += len(ranks) > 1
    assert num_split > 10


# ---- the counts


def split_by_hand():
    return ContextSplit(3, 10, torch.tensor([[0, 0, 0, 4], [0, 1, 0, 6], [1, 1, 6, 9], [2, 1, 9, 10], [2, 2, 0, 5]]))


def test_counts_of_a_split_written_by_hand():
    assert tokens_per_rank(split_by_hand()).tolist() == [10, 3, 6]
    assert attention_work_per_rank(split_by_hand()).tolist() == [4 * 4 + 6 * 10, 3 * 10, 1 * 10 + 5 * 5]
    assert sent_tokens_per_rank(split_by_hand()).tolist() == [6 * 2, 3 * 2, 1 * 2]
    assert received_tokens_per_rank(split_by_hand()).tolist() == [4, 7, 9]


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(1, 8))
def test_sent_tokens_are_those_of_direct_exchanges_at_every_distance(lengths, ranks):
    split = tightest_split(lengths, ranks)
    lengths_by_rank = [{} for _ in range(ranks)]
    for rank, segment, start, stop in split.pieces_Q4.tolist():
        lengths_by_rank[rank][segment] = stop - start
    sent = [
        sum(
            length
            for distance in range(1, ranks)
            for segment, length in lengths_by_rank[r].items()
            if segment in lengths_by_rank[(r + distance) % ranks]
        )
        for r in range(ranks)
    ]
    assert sent_tokens_per_rank(split).tolist() == sent


def test_counts_are_exact_beyond_the_precision_of_float64():
    split = ContextSplit(1, 2**30, torch.tensor([[0, 0, 0, 2**28 + 1], [0, 1, 0, 3]]))
    assert attention_work_per_rank(split).tolist() == [(2**28 + 1) ** 2 + 9]


# ---- invalid arguments


@pytest.mark.parametrize(
    "lengths, ranks, slots, message",
    [
        ([3, 0, 5], 2, 8, r"lengths\[1\]=0 must be at least 1"),
        ([3, -4], 2, 8, r"lengths\[1\]=-4"),
        ([10, 7], 2, 8, "17 tokens are more than the 2 ranks x 8 slots = 16"),
        ([2**31, 1], 2, 2**31, "2147483649 tokens are more than a pack can have, 2147483648"),
        ([], 2, 8, "one or more integers"),
        ([1.5, 2.0], 2, 8, "one or more integers, not float64"),
        ([[1, 2]], 2, 8, r"of shape \[1, 2\]"),
        ([1], 0, 8, "ranks=0"),
        ([1], 2, 0, "slots_per_rank=0"),
    ],
)
def test_invalid_lengths_raise_an_error_with_the_numbers(lengths, ranks, slots, message):
    with pytest.raises(ValueError, match=message):
        split_pack(lengths, ranks, slots)


def test_a_full_pack_of_max_tokens_is_split_exactly():
    split = split_pack([2**30, 2**30 - 1, 1], 3, 2**30)
    assert (
        tokens_per_rank(split).sum() == 2**31 and attention_work_per_rank(split).sum() == 2**60 + (2**30 - 1) ** 2 + 1
    )
    assert max_over_mean(attention_work_per_rank(split)) <= 1 + 1e-8

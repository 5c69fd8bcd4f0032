"""Planned ring exchanges: both ends agree, every needed key is received once, and no other is sent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.batch import ContextSplit
from megasora.parallel.context_split import received_tokens_per_rank, sent_tokens_per_rank, split_pack
from megasora.parallel.ring_exchanges import build_context_segments, slice_or_index

LENGTHS = st.lists(st.one_of(st.integers(1, 9), st.integers(50, 300)), min_size=1, max_size=12)


def split_and_plans(lengths, ranks):
    split = split_pack(lengths, ranks, -(-sum(lengths) // ranks))
    return split, [build_context_segments(split, rank, "cpu") for rank in range(ranks)]


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 9))
def test_both_ends_of_an_exchange_agree_on_peers_and_tokens(lengths, ranks):
    _, plans = split_and_plans(lengths, ranks)
    for rank, plan in enumerate(plans):
        assert [x.distance for x in plan.exchanges] == [x.distance for x in plans[0].exchanges]
        for i, exchange in enumerate(plan.exchanges):
            receiver = plans[exchange.dst].exchanges[i]
            assert (receiver.src, receiver.num_received) == (rank, exchange.num_sent)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 9))
def test_exchanged_tokens_are_those_that_the_split_counts(lengths, ranks):
    split, plans = split_and_plans(lengths, ranks)
    assert [sum(x.num_sent for x in plan.exchanges) for plan in plans] == sent_tokens_per_rank(split).tolist()
    assert [sum(x.num_received for x in plan.exchanges) for plan in plans] == received_tokens_per_rank(split).tolist()


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 9))
def test_each_query_meets_every_key_of_its_segment_once(lengths, ranks):
    split, plans = split_and_plans(lengths, ranks)
    for rank, plan in enumerate(plans):
        keys_of_slot = torch.zeros(plan.num_slots, dtype=torch.int64)
        for slots, segments in [(slice(None), plan.local), *((x.query_slots, x.segments) for x in plan.exchanges)]:
            keys = torch.zeros(len(keys_of_slot[slots]), dtype=torch.int64)
            for (start, length), (_, num_keys) in zip(segments.queries, segments.keys, strict=True):
                keys[start : start + length] += num_keys
            keys_of_slot[slots] += keys
        pieces = split.pieces_Q4[split.pieces_Q4[:, 0] == rank].tolist()
        expected = [lengths[segment] for _, segment, start, stop in pieces for _ in range(start, stop)]
        assert keys_of_slot.tolist() == expected + [0] * (plan.num_slots - len(expected))


def test_ranks_without_a_common_segment_exchange_nothing():
    split = ContextSplit(3, 9, torch.tensor([[0, 0, 0, 9], [1, 1, 0, 4], [2, 1, 4, 9]]))
    exchanges = build_context_segments(split, 0, "cpu").exchanges
    assert [x.distance for x in exchanges] == [1, 2]  # made by the other two ranks
    assert all(x.num_sent == x.num_received == 0 for x in exchanges)


def test_adjacent_ranges_are_a_slice_and_others_an_index():
    assert slice_or_index([(2, 3), (5, 1)], "cpu") == slice(2, 6)
    assert slice_or_index([], "cpu") == slice(0, 0)
    assert slice_or_index([(0, 2), (4, 2)], "cpu").tolist() == [0, 1, 4, 5]


def test_two_pieces_of_a_segment_on_one_rank_raise_an_error():
    split = ContextSplit(2, 4, torch.tensor([[0, 0, 0, 4], [1, 0, 4, 6], [1, 0, 8, 9]]))
    with pytest.raises(ValueError, match="rank 1 has two pieces of segment 0; a split may give it one"):
        build_context_segments(split, 0, "cpu")

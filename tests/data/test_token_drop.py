"""Token dropping: the fraction per epoch, how many tokens are kept, and which, drawn by (seed, epoch, sample id)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasora.config import TokenDropConfig
from megasora.data.token_drop import draw_positions, drop_fraction_at, kept_token_counts


def test_the_fraction_changes_linearly_and_stays_at_its_end():
    config = TokenDropConfig(start=0.5, end=0.1, epochs=4.0)
    assert [drop_fraction_at(config, e) for e in (0, 1, 2, 4, 9)] == pytest.approx([0.5, 0.4, 0.3, 0.1, 0.1])
    assert drop_fraction_at(TokenDropConfig(), 0) == drop_fraction_at(TokenDropConfig(), 3) == 0
    assert drop_fraction_at(TokenDropConfig(start=0.3, end=0.3), 0) == 0.3


@given(st.integers(1, 1 << 40), st.floats(0, 1, exclude_max=True))
def test_the_kept_tokens_are_the_fraction_rounded_up_and_at_least_one(tokens, fraction):
    (kept,) = kept_token_counts(np.array([tokens]), fraction)
    assert 1 <= kept <= tokens
    assert (1 - fraction) * tokens - 1e-3 <= kept < (1 - fraction) * tokens + 1 + 1e-3


@given(st.integers(0, 1 << 31), st.integers(0, 50), st.integers(0, 1 << 44), st.integers(0, 1000), st.data())
def test_positions_are_distinct_within_the_part_and_a_function_of_their_key(seed, epoch, sample_id, start, data):
    tokens = data.draw(st.integers(1, 300))
    kept = data.draw(st.integers(1, tokens))
    positions = draw_positions(seed, epoch, sample_id, start, tokens, kept)
    assert len(positions) == kept and start <= positions[0] and positions[-1] < start + tokens
    assert (np.diff(positions) > 0).all()
    assert np.array_equal(positions, draw_positions(seed, epoch, sample_id, start, tokens, kept))
    if 30 < tokens and tokens // 4 < kept < 3 * tokens // 4:
        for key in ((seed + 1, epoch, sample_id), (seed, epoch + 1, sample_id), (seed, epoch, sample_id + 1)):
            assert not np.array_equal(positions, draw_positions(*key, start, tokens, kept))


def test_a_smaller_fraction_keeps_what_a_larger_one_keeps():
    few, many = (set(draw_positions(0, 1, 7, 0, 100, kept).tolist()) for kept in (20, 60))
    assert few < many


def test_every_position_is_kept_equally_often():
    """10 of 40 positions are kept, 4,000 times: 1,000 each, with a standard deviation of 27."""
    counts = np.zeros(40)
    for sample_id in range(2000):
        for epoch in (0, 1):
            counts[draw_positions(3, epoch, sample_id, 0, 40, 10)] += 1
    assert counts.sum() == 40_000 and abs(counts - 1000).max() < 5 * 27

"""Token dropping: the rate by epochs, how many tokens stay, and which: drawn evenly, by (seed, epoch, sample id)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasora.config import DropConfig
from megasora.data.dropping import kept_places, kept_tokens, rate_at


def test_the_rate_goes_in_a_straight_line_and_stays_where_it_ends():
    config = DropConfig(start=0.5, end=0.1, epochs=4.0)
    assert [rate_at(config, e) for e in (0, 1, 2, 4, 9)] == pytest.approx([0.5, 0.4, 0.3, 0.1, 0.1])
    assert rate_at(DropConfig(), 0) == rate_at(DropConfig(), 3) == 0
    assert rate_at(DropConfig(start=0.3, end=0.3), 0) == 0.3


@given(st.integers(1, 1 << 40), st.floats(0, 1, exclude_max=True))
def test_what_stays_is_the_fraction_rounded_up_and_never_nothing(tokens, rate):
    (kept,) = kept_tokens(np.array([tokens]), rate)
    assert 1 <= kept <= tokens
    assert (1 - rate) * tokens - 1e-3 <= kept < (1 - rate) * tokens + 1 + 1e-3


@given(st.integers(0, 1 << 31), st.integers(0, 50), st.integers(0, 1 << 44), st.integers(0, 1000), st.data())
def test_kept_places_are_distinct_places_of_the_part_and_follow_from_their_key(seed, epoch, sample_id, first, data):
    tokens = data.draw(st.integers(1, 300))
    kept = data.draw(st.integers(1, tokens))
    places = kept_places(seed, epoch, sample_id, first, tokens, kept)
    assert len(places) == kept and first <= places[0] and places[-1] < first + tokens and (np.diff(places) > 0).all()
    assert np.array_equal(places, kept_places(seed, epoch, sample_id, first, tokens, kept))
    if 30 < tokens and tokens // 4 < kept < 3 * tokens // 4:
        for other in ((seed + 1, epoch, sample_id), (seed, epoch + 1, sample_id), (seed, epoch, sample_id + 1)):
            assert not np.array_equal(places, kept_places(*other, first, tokens, kept))


def test_less_dropping_keeps_what_more_dropping_kept():
    few, many = (set(kept_places(0, 1, 7, 0, 100, kept).tolist()) for kept in (20, 60))
    assert few < many


def test_every_place_stays_equally_often():
    """Of 40 places 10 stay, 4,000 times: 1,000 each, give or take 27 (one standard deviation)."""
    counts = np.zeros(40)
    for sample_id in range(2000):
        for epoch in (0, 1):
            counts[kept_places(3, epoch, sample_id, 0, 40, 10)] += 1
    assert counts.sum() == 40_000 and abs(counts - 1000).max() < 5 * 27

"""Packs contain every clip once and whole, with hardly any padding."""

import numpy as np
import pytest

from megasora.data.packing import best_swaps, pack_clips
from megasora.testing.mixes import heavy_mix


def demo_mix(count=3000, seed=0):
    """Tokens of clips like those of the demo: few lengths, 12 to 216."""
    rng = np.random.default_rng(seed)
    frames = rng.choice([1, 2, 3, 4, 5, 9], count, p=[0.12, 0.13, 0.5, 0.1, 0.1, 0.05])
    return frames * rng.choice([12, 15, 16, 24], count, p=[0.3, 0.24, 0.3, 0.16])


def checked_packs(tokens, capacity):
    """Packs, after checking that they have every clip once and that none is empty or too full."""
    packs = pack_clips(tokens, capacity)
    assert np.array_equal(np.sort(packs.clip_I), np.arange(len(tokens)))
    sums = np.array([tokens[packs[b]].sum() for b in range(len(packs))])
    assert np.array_equal(sums, packs.sums(tokens))
    assert (sums > 0).all() and (sums <= capacity).all()
    return packs


def padding(tokens, capacity):
    return 1 - tokens.sum() / (capacity * len(checked_packs(tokens, capacity)))


@pytest.mark.parametrize("images", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("capacity", [8192, 65_536, 262_144, 1_048_576])
def test_padding_is_at_most_a_thousandth_on_a_heavy_tailed_mix(capacity, images):
    tokens = heavy_mix(capacity, 100_000, seed=1, image_fraction=images)
    assert len(tokens) == 100_000 and tokens.min() >= 256 and tokens.max() > 0.7 * capacity
    assert padding(tokens, capacity) <= 0.001


@pytest.mark.parametrize("seed", range(3))
def test_padding_is_small_with_few_lengths_and_few_clips(seed):
    assert padding(demo_mix(seed=seed), 1024) <= 0.01  # two packs of 150


def test_all_but_a_few_packs_of_a_window_are_full():
    tokens = heavy_mix(16_384, 30_000, seed=2)
    sums = checked_packs(tokens, 16_384).sums(tokens)
    assert len(sums) > 4000 and (sums < 0.999 * 16_384).sum() <= 20


@pytest.mark.parametrize("capacity", [216, 217, 431, 1024, 10_000, 1_000_000])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 200, 1000])
def test_every_clip_is_in_exactly_one_pack_within_the_capacity(count, capacity):
    checked_packs(demo_mix(count), capacity)


@pytest.mark.parametrize(
    ("tokens", "packs"),
    [([], 0), ([7], 1), ([10, 10], 2), ([5, 5, 10], 2), ([1] * 30, 3), ([1] * 1000, 100), ([10] * 300, 300),
     ([6] * 200, 200), ([6, 4] * 200, 200), ([9, 1] * 500, 500)],
)  # fmt: skip
def test_known_cases_have_the_least_number_of_packs(tokens, packs):
    assert len(checked_packs(np.array(tokens, dtype=np.int64), 10)) == packs


def test_clips_of_all_lengths_are_in_early_and_late_packs():
    """If short clips, which fill any gap, were used up early, the last clips would not fit together."""
    tokens = heavy_mix(65_536, 50_000, seed=3)
    packs = pack_clips(tokens, 65_536)
    order = np.argsort(packs.clip_I[packs.cu_packs[:-1]])  # packs in the order in which most were filled
    halves = [np.concatenate([packs[b] for b in half]) for half in np.array_split(order, 2)]
    short = [np.sort(tokens[half])[: 3 * len(half) // 4] for half in halves]
    for quantile in (0.1, 0.5, 0.9):
        low, high = sorted(np.quantile(half, quantile) for half in short)
        assert high / low < 1.25


def test_clips_that_do_not_fit_together_get_separate_packs():
    assert len(checked_packs(np.full(1000, 6000), 8192)) == 1000
    assert len(checked_packs(np.array([6000, 3000] * 500), 8192)) == 500 + 250


def test_full_packs_are_preferred_to_balanced_ones():
    """Two clips of each length fill a pack; one long clip per pack, which would balance the costs, does not."""
    tokens = np.array([3000, 1096] * 500)
    assert (checked_packs(tokens, 8192).sums(tokens) == 8192).all()


def test_if_many_packs_want_the_same_few_clips_the_first_packs_get_them():
    no_tokens, packs = np.zeros(8, dtype=np.int64), np.arange(8)
    clips_out, clips_in = best_swaps(no_tokens, packs, np.full(8, 5), np.array([5, 5, 5]))
    assert clips_out.tolist() == [0, 1, 2] and sorted(clips_in.tolist()) == [0, 1, 2]


def test_packs_depend_on_the_tokens_alone():
    tokens = heavy_mix(8192, 5000, seed=4)
    first, second = pack_clips(tokens, 8192), pack_clips(tokens.copy(), 8192)
    assert np.array_equal(first.clip_I, second.clip_I) and np.array_equal(first.cu_packs, second.cu_packs)


@pytest.mark.parametrize("tokens", [[3, 11, 4], [3, 0, 4]])
def test_clips_that_are_empty_or_too_long_raise(tokens):
    with pytest.raises(ValueError, match=f"clips of {min(tokens)} to {max(tokens)} tokens in packs of 10"):
        pack_clips(np.array(tokens), 10)

"""Which clips share a pack: all of them, once, whole, and with hardly any padding."""

import numpy as np
import pytest

from megasora.data.packing import best_trades, pack_clips
from megasora.testing.mixes import heavy_mix


def demo_mix(count=3000, seed=0):
    """Tokens of clips like the demo's: few sizes, 12 to 216."""
    rng = np.random.default_rng(seed)
    frames = rng.choice([1, 2, 3, 4, 5, 9], count, p=[0.12, 0.13, 0.5, 0.1, 0.1, 0.05])
    return frames * rng.choice([12, 15, 16, 24], count, p=[0.3, 0.24, 0.3, 0.16])


def check(tokens, budget):
    """Every clip once, no pack too full or empty; gives the packs."""
    packs = pack_clips(tokens, budget)
    assert np.array_equal(np.sort(packs.clip_N), np.arange(len(tokens)))
    sums = np.array([tokens[packs[m]].sum() for m in range(len(packs))])
    assert np.array_equal(sums, packs.sums(tokens))
    assert (sums > 0).all() and (sums <= budget).all()
    return packs


def padding(tokens, budget):
    return 1 - tokens.sum() / (budget * len(check(tokens, budget)))


@pytest.mark.parametrize("images", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("budget", [8192, 65_536, 262_144, 1_048_576])
def test_padding_is_at_most_a_thousandth_on_a_heavy_tailed_mix(budget, images):
    tokens = heavy_mix(budget, 100_000, seed=1, images=images)
    assert len(tokens) == 100_000 and tokens.min() >= 256 and tokens.max() > 0.7 * budget
    assert padding(tokens, budget) <= 0.001


@pytest.mark.parametrize("seed", range(3))
def test_padding_is_small_with_few_sizes_and_few_clips(seed):
    assert padding(demo_mix(seed=seed), 1024) <= 0.01  # two packs of 150


def test_all_but_a_few_packs_of_a_window_are_full():
    tokens = heavy_mix(16_384, 30_000, seed=2)
    sums = check(tokens, 16_384).sums(tokens)
    assert len(sums) > 4000 and (sums < 0.999 * 16_384).sum() <= 20


@pytest.mark.parametrize("budget", [216, 217, 431, 1024, 10_000, 1_000_000])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 200, 1000])
def test_every_clip_is_in_exactly_one_pack_within_the_budget(count, budget):
    check(demo_mix(count), budget)


@pytest.mark.parametrize(
    ("tokens", "packs"),
    [([], 0), ([7], 1), ([10, 10], 2), ([5, 5, 10], 2), ([1] * 30, 3), ([1] * 1000, 100), ([10] * 300, 300),
     ([6] * 200, 200), ([6, 4] * 200, 200), ([9, 1] * 500, 500)],
)  # fmt: skip
def test_known_cases_have_the_least_number_of_packs(tokens, packs):
    assert len(check(np.array(tokens, dtype=np.int64), 10)) == packs


def test_clips_of_all_sizes_come_throughout():
    """Short clips fill every gap: were they used up first, what is left at the end would not fit together."""
    tokens = heavy_mix(65_536, 50_000, seed=3)
    packs = pack_clips(tokens, 65_536)
    drawn = np.argsort(packs.clip_N[packs.cu_M1[:-1]])  # packs in the order in which most were filled
    halves = [np.concatenate([packs[m] for m in half]) for half in np.array_split(drawn, 2)]
    fill = [np.sort(tokens[half])[: 3 * len(half) // 4] for half in halves]
    for quantile in (0.1, 0.5, 0.9):
        low, high = sorted(np.quantile(half, quantile) for half in fill)
        assert high / low < 1.25


def test_clips_that_do_not_go_together_have_packs_of_their_own():
    assert len(check(np.full(1000, 6000), 8192)) == 1000
    assert len(check(np.array([6000, 3000] * 500), 8192)) == 500 + 250


def test_packs_are_full_before_they_are_balanced():
    """Two of each size fill a pack; one long clip in each pack, which would balance them, does not."""
    tokens = np.array([3000, 1096] * 500)
    assert (check(tokens, 8192).sums(tokens) == 8192).all()


def test_where_many_packs_want_the_same_few_clips_the_first_get_them():
    nothing, packs = np.zeros(8, dtype=np.int64), np.arange(8)
    given, taken = best_trades(nothing, packs, np.full(8, 5), np.array([5, 5, 5]))
    assert given.tolist() == [0, 1, 2] and sorted(taken.tolist()) == [0, 1, 2]


def test_packs_depend_on_nothing_but_the_tokens():
    tokens = heavy_mix(8192, 5000, seed=4)
    first, again = pack_clips(tokens, 8192), pack_clips(tokens.copy(), 8192)
    assert np.array_equal(first.clip_N, again.clip_N) and np.array_equal(first.cu_M1, again.cu_M1)


@pytest.mark.parametrize("tokens", [[3, 11, 4], [3, 0, 4]])
def test_a_clip_that_does_not_fit_is_refused(tokens):
    with pytest.raises(ValueError, match=f"clips of {min(tokens)} to {max(tokens)} tokens in packs of 10"):
        pack_clips(np.array(tokens), 10)

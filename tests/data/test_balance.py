"""Packs cost the same, or come in groups that do, and none is made of long clips or of short ones alone."""

import numpy as np
import pytest

from megasora.data.balance import lead_packs, served, targets
from megasora.data.packing import pack_clips
from megasora.testing.mixes import heavy_mix

BUDGETS = [16_384, 65_536, 1_048_576]


def squares(tokens, budget, together=64):
    """Packs, and what makes one full pack dearer than another: sum of l^2 of each, the dearest first."""
    packs = pack_clips(tokens, budget, together)
    return packs, -np.sort(-packs.sums(tokens**2))


@pytest.mark.parametrize("budget", BUDGETS)
def test_most_packs_cost_the_same_whatever_their_clips(budget):
    """As many clips laid into packs as they come make squares of very different sums."""
    tokens = heavy_mix(budget, 100_000, seed=0)
    packs, found = squares(tokens, budget)
    cheaper = found[len(found) // 2 :]
    assert np.quantile(cheaper, 0.99) / np.quantile(cheaper, 0.01) < 1.3  # by best fit alone 2 to 3.1
    drawn = np.add.reduceat(tokens**2, np.arange(0, len(tokens), len(tokens) // len(packs)))
    assert np.quantile(drawn, 0.45) / np.quantile(drawn, 0.05) > 1.5


@pytest.mark.parametrize("budget", BUDGETS)
def test_packs_that_are_dearer_come_in_groups_that_cost_the_same(budget):
    tokens = heavy_mix(budget, 100_000, seed=0)
    grouped, alone = (squares(tokens, budget, together)[1][64:512].reshape(-1, 64) for together in (64, 1))
    ratio, ratio_alone = (np.mean(of[:, 0] / of.mean(1)) - 1 for of in (grouped, alone))
    assert ratio < 0.04 and ratio < 0.85 * ratio_alone


@pytest.mark.parametrize("budget", BUDGETS)
def test_short_clips_come_in_all_kinds_of_packs(budget):
    """Behind its first clip, every pack has room for the shorter three quarters of the clips."""
    tokens = heavy_mix(budget, 100_000, seed=0)
    packs = pack_clips(tokens, budget, 64)
    short = packs.sums(tokens * (tokens <= np.quantile(tokens, 0.75)))
    first = np.array([tokens[packs[m]].max() for m in range(len(packs))])
    share = short.sum() / tokens.sum()
    assert (short >= 0.5 * np.minimum(share * budget, (budget - first) / 4)).mean() > 0.98


def test_long_clips_have_packs_with_room_for_fill():
    tokens = heavy_mix(65_536, 20_000, seed=1)
    pack_N, packs = lead_packs(tokens, 65_536, 64)
    assert packs == -(-tokens.sum() // 65_536) and pack_N.max() < packs
    assert (pack_N >= 0).sum() == len(tokens) // 4 and tokens[pack_N >= 0].min() >= tokens[pack_N < 0].max()
    assert np.bincount(pack_N[pack_N >= 0], tokens[pack_N >= 0]).max() <= 65_536


@pytest.mark.parametrize("tokens", [[], [5], [5, 5, 5], [1] * 1000])
def test_few_clips_and_very_short_ones_are_all_fill(tokens):
    pack_N, packs = lead_packs(np.array(tokens, dtype=np.int64), 256, 4)
    assert (pack_N == -1).all() and packs == -(-sum(tokens) // 256)


def test_targets_are_those_of_the_dearest_of_each_group_and_an_equal_share_of_the_rest():
    surplus = np.array([90, 80, 50, 45, 8, 6, 4, 2, 1, 1])
    # two groups of two: 90 and 50 are above (287 - 0) / 6 and (287 - 180) / 4, 8 is not above (287 - 280) / 2 ...
    target, led = targets(surplus, 6, 2)
    assert led == 6 and target.tolist() == [90, 90, 50, 50, 8, 8]
    target, led = targets(np.array([9, 8, 7, 6, 5, 4]), 3, 2)
    assert led == 0 and target.tolist() == [13, 13, 13]
    target, led = targets(np.array([30, 4, 4, 4]), 3, 1)
    assert led == 1 and target.tolist() == [30, 6, 6]


def test_the_pack_with_room_for_the_longest_chooses_first():
    # pack 2 can take clip 0 or any behind, packs 0 and 3 clip 1; 3 has more to go than 0; nothing is left for pack 1
    pack, taken = served(np.array([1, 3, 0, 1]), np.array([5, 5, 5, 6]), 3)
    assert pack.tolist() == [2, 3, 0] and taken.tolist() == [0, 1, 2]


def test_very_many_clips_in_very_few_packs_do_not_take_a_round_each():
    tokens = np.random.default_rng(0).integers(1, 25, 100_000)
    assert (lead_packs(tokens, 1_048_576, 64)[0] == -1).all()

"""Packs have equal costs, or come in groups of equal cost, and long and short clips are spread over all packs."""

import numpy as np
import pytest

from megasora.data.long_clips import match_clips_to_packs, place_long_clips, surplus_targets
from megasora.data.packing import pack_clips
from megasora.testing.mixes import heavy_mix

CAPACITIES = [16_384, 65_536, 1_048_576]


def pack_costs(tokens, capacity, packs_per_step=64):
    """Packs, and their attention costs, the sum of l^2, in descending order."""
    packs = pack_clips(tokens, capacity, packs_per_step)
    return packs, -np.sort(-packs.sums(tokens**2))


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_most_packs_have_the_same_cost(capacity):
    """As many clips per pack in random order have very different costs."""
    tokens = heavy_mix(capacity, 100_000, seed=0)
    packs, costs = pack_costs(tokens, capacity)
    cheaper = costs[len(costs) // 2 :]
    assert np.quantile(cheaper, 0.99) / np.quantile(cheaper, 0.01) < 1.3  # with best fit alone, 2 to 3.1
    random = np.add.reduceat(tokens**2, np.arange(0, len(tokens), len(tokens) // len(packs)))
    assert np.quantile(random, 0.45) / np.quantile(random, 0.05) > 1.5


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_more_expensive_packs_come_in_groups_of_equal_cost(capacity):
    tokens = heavy_mix(capacity, 100_000, seed=0)
    grouped, single = (pack_costs(tokens, capacity, size)[1][64:512].reshape(-1, 64) for size in (64, 1))
    excess, excess_of_single = (np.mean(costs[:, 0] / costs.mean(1)) - 1 for costs in (grouped, single))
    assert excess < 0.04 and excess < 0.85 * excess_of_single


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_all_kinds_of_packs_have_short_clips(capacity):
    """After its first clip, every pack has space for the shorter three quarters of the clips."""
    tokens = heavy_mix(capacity, 100_000, seed=0)
    packs = pack_clips(tokens, capacity, 64)
    short = packs.sums(tokens * (tokens <= np.quantile(tokens, 0.75)))
    longest = np.array([tokens[packs[b]].max() for b in range(len(packs))])
    fraction = short.sum() / tokens.sum()
    assert (short >= 0.5 * np.minimum(fraction * capacity, (capacity - longest) / 4)).mean() > 0.98


def test_long_clips_are_a_quarter_of_all_and_fit_into_the_least_number_of_packs():
    tokens = heavy_mix(65_536, 20_000, seed=1)
    pack_I, num_packs = place_long_clips(tokens, 65_536, 64)
    assert num_packs == -(-tokens.sum() // 65_536) and pack_I.max() < num_packs
    assert (pack_I >= 0).sum() == len(tokens) // 4 and tokens[pack_I >= 0].min() >= tokens[pack_I < 0].max()
    assert np.bincount(pack_I[pack_I >= 0], tokens[pack_I >= 0]).max() <= 65_536


@pytest.mark.parametrize("tokens", [[], [5], [5, 5, 5], [1] * 1000])
def test_few_clips_and_very_short_ones_are_all_short(tokens):
    pack_I, num_packs = place_long_clips(np.array(tokens, dtype=np.int64), 256, 4)
    assert (pack_I == -1).all() and num_packs == -(-sum(tokens) // 256)


def test_targets_are_the_largest_surplus_of_each_group_and_the_average_of_the_rest():
    surplus = np.array([90, 80, 50, 45, 8, 6, 4, 2, 1, 1])
    # groups of two: 90 > (287 - 0) / 6, 50 > (287 - 180) / 4, 8 > (287 - 280) / 2
    target, num_expensive = surplus_targets(surplus, 6, 2)
    assert num_expensive == 6 and target.tolist() == [90, 90, 50, 50, 8, 8]
    target, num_expensive = surplus_targets(np.array([9, 8, 7, 6, 5, 4]), 3, 2)
    assert num_expensive == 0 and target.tolist() == [13, 13, 13]
    target, num_expensive = surplus_targets(np.array([30, 4, 4, 4]), 3, 1)
    assert num_expensive == 1 and target.tolist() == [30, 6, 6]


def test_the_pack_that_can_take_the_longest_clip_chooses_first():
    # pack 2 can take clip 0 or any later one, packs 0 and 3 clip 1; 3 has the larger target; pack 1 gets none
    packs, taken = match_clips_to_packs(np.array([1, 3, 0, 1]), np.array([5, 5, 5, 6]), 3)
    assert packs.tolist() == [2, 3, 0] and taken.tolist() == [0, 1, 2]


def test_very_many_short_clips_in_very_few_packs_are_not_placed_one_per_round():
    tokens = np.random.default_rng(0).integers(1, 25, 100_000)
    assert (place_long_clips(tokens, 1_048_576, 64)[0] == -1).all()

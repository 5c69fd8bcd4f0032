"""EMA weights: the recurrence in float64, and that sharding and a resume do not change it."""

from __future__ import annotations

import copy

import pytest
import torch

from megasora.fragment import Fragment
from megasora.optim.ema import ShardedEMA
from megasora.placement import Placement


def walk(steps: int, size: int = 12, seed: int = 0) -> list[torch.Tensor]:
    """Weights after each step of a random walk."""
    g = torch.Generator().manual_seed(seed)
    return list(torch.randn(steps, size, generator=g).cumsum(0))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_ema_is_the_recurrence_with_a_decay_that_grows_to_its_limit(decay):
    weights = torch.zeros(12)
    ema = ShardedEMA([weights], decay)
    expected = torch.zeros(12, dtype=torch.float64)
    for n, point in enumerate(walk(50)):
        weights.copy_(point)
        ema.update()
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * point.double()
        torch.testing.assert_close(ema.ema_weights[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert ema.updates == 50


def test_the_ema_of_constant_weights_is_these_weights_bit_for_bit():
    weights = torch.randn(100)
    ema = ShardedEMA([weights], 0.999)
    for _ in range(30):
        ema.update()
    assert torch.equal(ema.ema_weights[0], weights)


def test_initial_weights_lose_their_influence_early():
    """Weights jump from 0 to 1: after 50 updates the EMA is above 0.99; a constant decay of 0.9999 would give 0.005."""
    weights = torch.zeros(1)
    ema = ShardedEMA([weights], 0.9999)
    weights.fill_(1.0)
    for _ in range(50):
        ema.update()
    assert float(ema.ema_weights[0]) > 0.99


def test_ema_weights_change_only_in_update_and_weights_never():
    weights = torch.ones(3)
    ema = ShardedEMA([weights], 0.9)
    weights.mul_(5.0)
    assert torch.equal(ema.ema_weights[0], torch.ones(3))
    ema.update()
    assert torch.equal(weights, torch.full((3,), 5.0))
    torch.testing.assert_close(ema.ema_weights[0], torch.full((3,), 0.1 * 1 + 0.9 * 5))


def test_the_ema_of_shards_is_the_shards_of_the_ema():
    full, shards = torch.zeros(12), [torch.zeros(5), torch.zeros(0), torch.zeros(7)]
    one, many = ShardedEMA([full], 0.95), ShardedEMA(shards, 0.95)
    for point in walk(20):
        full.copy_(point)
        for shard, values in zip(shards, point.split([5, 0, 7]), strict=True):
            shard.copy_(values)
        one.update()
        many.update()
    assert torch.equal(torch.cat(many.ema_weights), one.ema_weights[0])


def test_a_resume_from_ema_weights_and_their_number_of_updates_is_bit_exact():
    points, weights = walk(20), torch.zeros(12)
    ema = ShardedEMA([weights], 0.95)
    for n, point in enumerate(points):
        if n == 8:
            saved, updates = copy.deepcopy(ema.ema_weights), ema.updates
        weights.copy_(point)
        ema.update()
    resumed_weights = torch.zeros(12)
    resumed = ShardedEMA([resumed_weights], 0.95)
    resumed.ema_weights[0].copy_(saved[0])
    resumed.updates = updates
    for point in points[8:]:
        resumed_weights.copy_(point)
        resumed.update()
    assert torch.equal(resumed.ema_weights[0], ema.ema_weights[0])


def test_ema_weights_have_no_autograd_graph():
    weights = torch.ones(3, requires_grad=True)
    ema = ShardedEMA([weights], 0.9)
    ema.update()
    assert not ema.ema_weights[0].requires_grad


def test_weights_are_exchanged_for_their_ema_and_come_back_bit_for_bit():
    masters = [torch.randn(7), torch.tensor([1e-40, 1e30, -0.0])]
    ema = ShardedEMA(masters, 0.9)
    for weights in masters:
        weights.add_(1)
    ema.update()
    before, averages = [w.clone() for w in masters], [w.clone() for w in ema.ema_weights]
    computed = []  # what the model would compute with
    with ema.in_place_of_weights(lambda: computed.append([w.clone() for w in masters])):
        assert all(torch.equal(w, a) for w, a in zip(masters, averages, strict=True))
    assert all(torch.equal(w, b) for w, b in zip(masters, before, strict=True))
    assert all(torch.equal(w, a) for w, a in zip(ema.ema_weights, averages, strict=True))
    assert len(computed) == 2 and torch.equal(computed[0][0], averages[0]) and torch.equal(computed[1][0], before[0])
    assert not torch.equal(averages[0], before[0])


def test_after_an_error_no_rank_waits_for_the_others():
    ema, calls = ShardedEMA([torch.zeros(2)], 0.9), []
    with pytest.raises(OSError, match="full"), ema.in_place_of_weights(lambda: calls.append(1)):
        raise OSError("full")
    assert len(calls) == 1


def test_fragments_are_extended_by_the_live_ema():
    weights = torch.zeros(3)
    ema = ShardedEMA([weights], 0.0)
    (fragment,) = ema.extend([Fragment("w", torch.Size([3]), Placement(), 0, 1, 0, {"weights": weights})])
    weights.fill_(2)
    ema.update()
    assert torch.equal(fragment.values["ema"], torch.full((3,), 2.0)) and fragment.values["weights"] is weights

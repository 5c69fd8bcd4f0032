"""Averaged weights: the recurrence by hand, and that slices over ranks and a resume do not change it."""

from __future__ import annotations

import copy

import pytest
import torch

from megasora.optim.ema import ShardedEMA


def walk(steps: int, size: int = 12, seed: int = 0) -> list[torch.Tensor]:
    """Weights after each step of a random walk."""
    g = torch.Generator().manual_seed(seed)
    return list(torch.randn(steps, size, generator=g).cumsum(0))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_the_average_is_the_recurrence_with_a_decay_that_grows_to_its_limit(decay):
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


def test_the_weights_of_an_average_sum_to_one():
    """A constant is its own average, bit for bit, whatever the decay."""
    weights = torch.randn(100)
    ema = ShardedEMA([weights], 0.999)
    for _ in range(30):
        ema.update()
    assert torch.equal(ema.ema_weights[0], weights)


def test_the_start_fades_instead_of_holding_the_average_back():
    """From 0 to 1 in one step: after 50 updates the average has arrived, where a decay of 0.9999 would be at 0.005."""
    weights = torch.zeros(1)
    ema = ShardedEMA([weights], 0.9999)
    weights.fill_(1.0)
    for _ in range(50):
        ema.update()
    assert float(ema.ema_weights[0]) > 0.99


def test_averages_change_only_at_an_update_and_weights_never():
    weights = torch.ones(3)
    ema = ShardedEMA([weights], 0.9)
    weights.mul_(5.0)
    assert torch.equal(ema.ema_weights[0], torch.ones(3))
    ema.update()
    assert torch.equal(weights, torch.full((3,), 5.0))
    torch.testing.assert_close(ema.ema_weights[0], torch.full((3,), 0.1 * 1 + 0.9 * 5))


def test_slices_average_to_the_slices_of_the_average():
    whole, parts = torch.zeros(12), [torch.zeros(5), torch.zeros(0), torch.zeros(7)]
    one, many = ShardedEMA([whole], 0.95), ShardedEMA(parts, 0.95)
    for point in walk(20):
        whole.copy_(point)
        for part, piece in zip(parts, point.split([5, 0, 7]), strict=True):
            part.copy_(piece)
        one.update()
        many.update()
    assert torch.equal(torch.cat(many.ema_weights), one.ema_weights[0])


def test_a_resume_from_averages_and_their_count_continues_bit_for_bit():
    points, weights = walk(20), torch.zeros(12)
    ema = ShardedEMA([weights], 0.95)
    for n, point in enumerate(points):
        if n == 8:
            saved, updates = copy.deepcopy(ema.ema_weights), ema.updates
        weights.copy_(point)
        ema.update()
    again = torch.zeros(12)
    resumed = ShardedEMA([again], 0.95)
    resumed.ema_weights[0].copy_(saved[0])
    resumed.updates = updates
    for point in points[8:]:
        again.copy_(point)
        resumed.update()
    assert torch.equal(resumed.ema_weights[0], ema.ema_weights[0])


def test_averaging_keeps_no_graph():
    weights = torch.ones(3, requires_grad=True)
    ema = ShardedEMA([weights], 0.9)
    ema.update()
    assert not ema.ema_weights[0].requires_grad

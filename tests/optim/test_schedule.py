"""The learning rate: its corners are known, between them it moves one way."""

from __future__ import annotations

import math

import pytest

from megasora.config import OptimConfig
from megasora.optim.schedule import lr_at

CONFIG = OptimConfig(lr=2e-3, warmup_steps=10, min_lr_ratio=0.1)
STEPS = 110


def rates(config: OptimConfig = CONFIG, steps: int = STEPS) -> list[float]:
    return [lr_at(step, steps, config) for step in range(steps)]


def test_the_warm_up_is_a_line_that_does_not_start_at_zero():
    assert rates()[:10] == pytest.approx([2e-3 * (i + 1) / 10 for i in range(10)], rel=1e-12)


def test_the_full_rate_is_reached_at_the_end_of_the_warm_up_and_never_exceeded():
    assert rates()[9] == rates()[10] == max(rates()) == 2e-3


@pytest.mark.parametrize(("share", "height"), [(0, 1.0), (0.25, 0.5 + math.sqrt(0.5) / 2), (0.5, 0.5), (1, 0.0)])
def test_the_cosine_passes_through_its_known_points(share, height):
    step = 10 + round(share * 100)
    assert lr_at(step, STEPS, CONFIG) == pytest.approx(2e-3 * (0.1 + 0.9 * height), rel=1e-12)


def test_the_rate_falls_after_the_warm_up_down_to_its_final_fraction():
    after = rates()[10:]
    assert all(a > b for a, b in zip(after[:-1], after[1:], strict=True))
    assert 2e-4 < after[-1] < 2e-4 * 1.01
    assert lr_at(10 * STEPS, STEPS, CONFIG) == pytest.approx(2e-4, rel=1e-12)  # and does not rise again


def test_a_final_fraction_of_one_is_a_constant_rate_and_of_zero_ends_at_zero():
    assert rates(OptimConfig(lr=1e-3, warmup_steps=0, min_lr_ratio=1.0)) == [1e-3] * STEPS
    assert lr_at(STEPS, STEPS, OptimConfig(lr=1e-3, warmup_steps=0, min_lr_ratio=0.0)) == pytest.approx(0.0, abs=1e-18)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 9), (1, 1000)])
def test_runs_as_short_as_their_warm_up_have_positive_rates(steps, warmup):
    config = OptimConfig(lr=1e-3, warmup_steps=warmup, min_lr_ratio=0.05)
    assert all(0 < rate <= 1e-3 for rate in [*rates(config, steps), lr_at(steps, steps, config)])


def test_the_rate_scales_with_the_configured_one():
    doubled = rates(OptimConfig(lr=4e-3, warmup_steps=10, min_lr_ratio=0.1))
    assert doubled == pytest.approx([2 * rate for rate in rates()], rel=1e-12)

"""The learning rate schedule: known values, and monotonic between them."""

from __future__ import annotations

import math

import pytest

from megasora.config import OptimConfig
from megasora.optim.schedule import lr_at

CONFIG = OptimConfig(lr=2e-3, warmup_steps=10, min_lr_ratio=0.1)
STEPS = 110


def lrs(config: OptimConfig = CONFIG, steps: int = STEPS) -> list[float]:
    return [lr_at(step, steps, config) for step in range(steps)]


def test_warm_up_is_linear_and_does_not_start_at_zero():
    assert lrs()[:10] == pytest.approx([2e-3 * (i + 1) / 10 for i in range(10)], rel=1e-12)


def test_the_full_lr_is_reached_at_the_end_of_the_warm_up_and_never_exceeded():
    assert lrs()[9] == lrs()[10] == max(lrs()) == 2e-3


@pytest.mark.parametrize(("fraction", "height"), [(0, 1.0), (0.25, 0.5 + math.sqrt(0.5) / 2), (0.5, 0.5), (1, 0.0)])
def test_the_cosine_has_its_known_values(fraction, height):
    step = 10 + round(fraction * 100)
    assert lr_at(step, STEPS, CONFIG) == pytest.approx(2e-3 * (0.1 + 0.9 * height), rel=1e-12)


def test_the_lr_falls_after_the_warm_up_to_min_lr_ratio():
    decay = lrs()[10:]
    assert all(a > b for a, b in zip(decay[:-1], decay[1:], strict=True))
    assert 2e-4 < decay[-1] < 2e-4 * 1.01
    assert lr_at(10 * STEPS, STEPS, CONFIG) == pytest.approx(2e-4, rel=1e-12)  # and does not rise again


def test_min_lr_ratio_one_is_a_constant_lr_and_zero_ends_at_zero():
    assert lrs(OptimConfig(lr=1e-3, warmup_steps=0, min_lr_ratio=1.0)) == [1e-3] * STEPS
    assert lr_at(STEPS, STEPS, OptimConfig(lr=1e-3, warmup_steps=0, min_lr_ratio=0.0)) == pytest.approx(0.0, abs=1e-18)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 9), (1, 1000)])
def test_runs_as_short_as_their_warm_up_have_a_positive_lr(steps, warmup):
    config = OptimConfig(lr=1e-3, warmup_steps=warmup, min_lr_ratio=0.05)
    assert all(0 < lr <= 1e-3 for lr in [*lrs(config, steps), lr_at(steps, steps, config)])


def test_the_lr_is_proportional_to_the_configured_one():
    doubled = lrs(OptimConfig(lr=4e-3, warmup_steps=10, min_lr_ratio=0.1))
    assert doubled == pytest.approx([2 * lr for lr in lrs()], rel=1e-12)

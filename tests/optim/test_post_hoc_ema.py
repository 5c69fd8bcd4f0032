"""Averages after training: against averages that were tracked during it, and least squares on a fine grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megasora.optim.ema import ShardedEMA
from megasora.optim.ema_decays import gamma_of, power_decay, sigma_of_kind
from megasora.optim.post_hoc_ema import Profile, combine_profiles, inner_product
from megasora.optim.update import Update

SIGMAS = (0.05, 0.10)


def track(points: list[torch.Tensor], sigmas: tuple[float, ...], every: int) -> dict[Profile, torch.Tensor]:
    """Power-function averages of a trajectory, at each `every`-th update and the last one."""
    weights = torch.zeros_like(points[0])
    ema = ShardedEMA([weights], {str(sigma): power_decay(sigma) for sigma in sigmas})
    saved = {}
    for update, point in enumerate(points, 1):
        weights.copy_(point)
        ema.update(Update(lr=0.0, number=ema.updates))
        ema.updates += 1
        if update % every == 0 or update == len(points):
            saved |= {Profile(update, sigma): ema.averages[str(sigma)][0].clone() for sigma in sigmas}
    return saved


def training(steps: int, size: int = 64) -> list[torch.Tensor]:
    """Weights of a training: they move to a place, ever more slowly, with noise."""
    g = torch.Generator().manual_seed(1)
    goal = torch.randn(size, generator=g)
    return [
        goal * (1 - np.exp(-4 * t / steps)) + 0.3 * torch.randn(size, generator=g) / (1 + 3 * t / steps)
        for t in range(1, steps + 1)
    ]


@pytest.mark.parametrize("sigma", [0.05, 0.07, 0.12, 0.2])
def test_a_reconstruction_agrees_with_the_average_that_was_tracked(sigma):
    points = training(600)
    saved = track(points, SIGMAS, every=60)
    (expected,) = (x for p, x in track(points, (sigma,), every=600).items())
    x, error = combine_profiles(list(saved), Profile(600, sigma))
    made = sum(c * values for c, values in zip(x, saved.values(), strict=True))
    others = [torch.linalg.norm(values - expected) for p, values in saved.items() if p.update == 600]
    distance = torch.linalg.norm(made - expected)
    assert distance < 0.003 * torch.linalg.norm(expected)
    assert error < (0.02 if sigma < 0.2 else 0.06)
    assert sum(x) == pytest.approx(1, abs=1e-9)
    if sigma not in SIGMAS:
        assert distance < 0.25 * min(others)  # than the nearest average that was saved


def test_one_of_the_saved_averages_is_reconstructed_as_it_is():
    saved = [Profile(t, s) for t in (100, 200, 300) for s in SIGMAS]
    x, error = combine_profiles(saved, Profile(200, 0.05))
    assert np.allclose(x, [p == Profile(200, 0.05) for p in saved], atol=1e-6) and error < 1e-6


def test_weights_that_did_not_change_are_reproduced_even_by_one_average():
    x, error = combine_profiles([Profile(100, 0.05)], Profile(100, 0.2))
    assert x == [1.0] and error > 0.5
    x, _ = combine_profiles([Profile(t, s) for t in range(10, 110, 10) for s in SIGMAS], Profile(100, 0.22))
    assert sum(x) == pytest.approx(1, abs=1e-9)


def test_more_saved_averages_are_never_worse():
    errors = []
    for count in (1, 2, 4, 8):
        saved = [Profile(1000 * (i + 1) // count, s) for i in range(count) for s in SIGMAS]
        errors.append(combine_profiles(saved, Profile(1000, 0.15)).error)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


def test_coefficients_minimise_the_distance_of_profiles_on_a_fine_grid():
    saved, wanted = [Profile(t, s) for t in (50, 75, 100) for s in SIGMAS], Profile(100, 0.15)
    grid = (np.arange(200_000) + 0.5) / 2000  # updates 0 to 100

    def values(profile: Profile) -> np.ndarray:
        gamma, end = gamma_of(profile.sigma), profile.update
        return np.where(grid <= end, (gamma + 1) / end * (grid / end) ** gamma, 0)

    basis, target = np.stack([values(p) for p in saved], 1), values(wanted)
    x, error = combine_profiles(saved, wanted)

    def distance(coefficients) -> float:
        return np.linalg.norm(basis @ coefficients - target) / np.linalg.norm(target)

    assert distance(np.array(x)) == pytest.approx(error, rel=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(50):
        step = rng.normal(size=len(x)) * 0.01
        assert distance(np.array(x) + step - step.mean()) >= error - 1e-9
    assert inner_product(saved[0], saved[3]) == pytest.approx((basis[:, 0] @ basis[:, 3]) / 2000, rel=1e-3)


def test_many_updates_and_narrow_averages_stay_finite():
    saved = [Profile(t, s) for t in range(50_000, 1_050_000, 50_000) for s in (0.001, 0.25)]
    x, error = combine_profiles(saved, Profile(1_000_000, 0.05))
    assert np.isfinite(x).all() and sum(x) == pytest.approx(1, abs=1e-6) and 0 <= error < 1


@pytest.mark.parametrize(
    ("kind", "sigma"),
    [
        ("ema_sigma_0.05", 0.05), ("ema_sigma_0.1", 0.1), ("ema", None), ("ema_0.999", None), ("ema_sigma_", None),
        ("ema_sigma_x", None), ("ema_sigma_nan", None), ("ema_sigma_0.9", None), ("weights", None),
    ],
)  # fmt: skip
def test_the_name_of_a_kind_says_its_width(kind, sigma):
    assert sigma_of_kind(kind) == sigma

"""Timesteps: known values of the shift, distribution of the logit-normal."""

import pytest
import torch

from megasora.config import ObjectiveConfig
from megasora.diffusion.timesteps import logit_normal, shift, shift_factor

TIMESTEPS = torch.linspace(0, 1, 101, dtype=torch.float64)


@pytest.mark.parametrize("factor", [1.0, 1.7, 3.0, 12.0])
def test_shift_fixes_zero_and_one_and_is_increasing(factor):
    shifted = shift(TIMESTEPS, factor)
    assert shifted[0] == 0 and shifted[-1] == pytest.approx(1, abs=1e-15)
    assert (shifted.diff() > 0).all()
    assert (shifted >= TIMESTEPS - 1e-15).all()  # towards noise


def test_shift_by_one_is_the_identity_and_by_three_moves_one_half_to_three_quarters():
    assert torch.equal(shift(TIMESTEPS, 1.0), TIMESTEPS)
    assert float(shift(torch.tensor(0.5), 3.0)) == pytest.approx(0.75)
    assert float(shift(torch.tensor(0.2), 4.0)) == pytest.approx(0.5)


def test_shifts_compose_and_invert():
    torch.testing.assert_close(shift(shift(TIMESTEPS, 2.0), 3.0), shift(TIMESTEPS, 6.0))
    torch.testing.assert_close(shift(shift(TIMESTEPS, 5.0), 1 / 5.0), TIMESTEPS)


def test_shift_scales_the_ratio_of_noise_to_signal():
    t = TIMESTEPS[1:-1]
    shifted = shift(t, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), 3.0 * t / (1 - t))


def test_factor_grows_with_the_root_of_the_tokens_and_is_at_least_one():
    tokens = torch.tensor([1, 64, 256, 1024, 25_600])
    config = ObjectiveConfig(shift=1.0, shift_tokens=256)
    torch.testing.assert_close(shift_factor(tokens, config), torch.tensor([1, 1, 1, 2, 10], dtype=torch.float64))
    config = ObjectiveConfig(shift=3.0, shift_tokens=256)
    torch.testing.assert_close(shift_factor(tokens, config), torch.tensor([1, 1.5, 3, 6, 30], dtype=torch.float64))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.0, 2.0)])
def test_logit_of_the_timestep_is_normal_with_the_configured_mean_and_std(mean, std):
    n = 100_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    t = logit_normal(u, mean, std)
    assert ((t > 0) & (t < 1)).all() and (t.diff() > 0).all()
    logit = torch.logit(t)
    assert float(logit.mean()) == pytest.approx(mean, abs=1e-6)
    assert float(logit.std()) == pytest.approx(std, rel=1e-3)
    assert float(t[n // 2]) == pytest.approx(float(torch.sigmoid(torch.tensor(mean))), abs=1e-4)
    # 84.13 % of a normal distribution are below one standard deviation
    assert float((logit < mean + std).double().mean()) == pytest.approx(0.8413447, abs=1e-4)

"""Solvers of dx/dt = v(x, t) from t = 1 to t = 0, on equations with known solutions."""

import math

import pytest
import torch

from megasora.diffusion.samplers import integrate, timestep_grid

SOLVERS = ("euler", "heun")


def grid(steps, factor=1.0, shape=()):
    return timestep_grid(steps, torch.full(shape, factor, dtype=torch.float64))


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_timesteps_fall_from_one_to_zero_and_are_shifted_as_in_training(factor):
    timesteps = torch.stack(grid(8, factor))
    assert len(timesteps) == 9 and float(timesteps[0]) == pytest.approx(1, abs=1e-15) and timesteps[-1] == 0
    assert (timesteps.diff() < 0).all()
    plain = 1 - torch.arange(9, dtype=torch.float64) / 8
    torch.testing.assert_close(timesteps, factor * plain / (1 + (factor - 1) * plain))


def test_each_element_has_the_timesteps_of_its_own_factor():
    timesteps = timestep_grid(5, torch.tensor([[1.0], [4.0]], dtype=torch.float64))
    for t, plain, shifted in zip(timesteps, grid(5), grid(5, 4.0), strict=True):
        assert torch.equal(t, torch.stack((plain, shifted))[:, None])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_order_of_convergence_on_a_linear_equation(solver, order, factor):
    rate = 1.3  # dx/dt = rate x + t, from x(1) = 2

    def velocity(x, t):
        return rate * x + t

    exact = math.exp(-rate) * (2 + 1 / rate + 1 / rate**2) - 1 / rate**2
    start = torch.tensor([2.0], dtype=torch.float64)
    errors = [abs(float(integrate(velocity, start, grid(n, factor), solver)) - exact) for n in (32, 64, 128)]
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_straight_path_to_a_single_datum_is_integrated_exactly(solver, steps):
    generator = torch.Generator().manual_seed(0)
    datum, start = torch.randn(2, 20, 4, generator=generator, dtype=torch.float64)
    # the velocity of a data set of one datum is (x - datum) / t
    end = integrate(lambda x, t: (x - datum) / t, start, grid(steps, 2.0, (20, 1)), solver)
    torch.testing.assert_close(end, datum, rtol=0, atol=1e-13)


@pytest.mark.parametrize("solver", SOLVERS)
def test_elements_at_timestep_zero_do_not_change(solver):
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    is_noised = torch.tensor([[1.0], [0.0], [1.0], [1.0], [0.0], [0.0]])
    timesteps = [t * is_noised for t in timestep_grid(9, torch.full((6, 1), 3.0))]
    end = integrate(lambda x, t: x * 3 + t.sin() - 7e3, start, timesteps, solver)
    clean = (is_noised == 0)[:, 0]
    assert torch.equal(end[clean], start[clean])
    assert not torch.isclose(end[~clean], start[~clean]).any()


@pytest.mark.parametrize(("solver", "calls"), [("euler", 5), ("heun", 9)])
def test_number_of_model_calls(solver, calls):
    seen = []

    def velocity(x, t):
        seen.append(float(t))
        return x

    integrate(velocity, torch.ones(1, dtype=torch.float64), grid(5), solver)
    assert len(seen) == calls
    assert min(seen) > 0  # training has no noised token at t = 0

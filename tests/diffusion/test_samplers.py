"""Solvers of dx/dt = v(x, t) from t = 1 to t = 0: known solutions, elements with their own timesteps, diffusers."""

import math

import pytest
import torch

from megasora.config import load
from megasora.diffusion.samplers import SOLVERS, corrector_weights, integrate, num_model_calls, timestep_grid
from megasora.errors import MegaSoraError

MEAN, STD = 0.7, 0.4  # of Gaussian data
each_solver = pytest.mark.parametrize("solver", SOLVERS)


def grid(steps, factor=1.0, shape=()):
    return timestep_grid(steps, torch.full(shape, factor, dtype=torch.float64))


def gaussian_std(t):
    """Of x_t = (1 - t) x + t noise, x from N(MEAN, STD)."""
    return (((1 - t) * STD) ** 2 + t**2).sqrt()


def gaussian_velocity(x, t):
    """E[noise - x | x_t]."""
    slope = (t - (1 - t) * STD**2) / gaussian_std(t) ** 2
    return slope * (x - (1 - t) * MEAN) - MEAN


def gaussian_solution(start, start_t, t):
    """The distance from the mean, in units of the std, stays the same."""
    return (1 - t) * MEAN + gaussian_std(t) / gaussian_std(start_t) * (start - (1 - start_t) * MEAN)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def gaussian_error(solver, timesteps):
    start = normal(50)
    exact = gaussian_solution(start, timesteps[0], timesteps[-1])
    return float((integrate(gaussian_velocity, start, timesteps, solver) - exact).abs().max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_order_of_convergence_on_gaussian_data(solver, order):
    """Away from t = 0 and 1, where the log signal-to-noise ratio has no bound."""
    timesteps = [torch.linspace(0.95, 0.05, n + 1, dtype=torch.float64) for n in (64, 128, 256)]
    errors = [gaussian_error(solver, list(t)) for t in timesteps]
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@each_solver
@pytest.mark.parametrize(("factor", "first"), [(1.0, 1.0), (3.0, 1.0), (1.0, 0.6)])
def test_the_whole_path_converges(solver, factor, first):
    coarse, fine = (gaussian_error(solver, [first * t for t in grid(n, factor)]) for n in (64, 256))
    assert coarse / fine > 3.8 and fine < (1.7e-2 if solver == "euler" else 2.1e-3)


def test_multistep_solvers_have_smaller_errors_with_as_many_model_calls():
    steps = {solver: 20 if solver == "heun" else 40 for solver in SOLVERS}
    for factor in (1.0, 3.0):
        error = {solver: gaussian_error(solver, grid(n, factor)) for solver, n in steps.items()}
        assert error["unipc"] < error["dpmpp_2m"] < error["heun"] * 1.01 < error["euler"]


@each_solver
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_straight_path_to_a_single_datum_is_integrated_exactly(solver, steps):
    datum, start = normal(2, 20, 4)
    # the velocity of a data set of one datum is (x - datum) / t
    end = integrate(lambda x, t: (x - datum) / t, start, grid(steps, 2.0, (20, 1)), solver)
    torch.testing.assert_close(end, datum, rtol=0, atol=1e-13)


@each_solver
@pytest.mark.parametrize("steps", [1, 2, 3, 30])
@pytest.mark.parametrize("first", [1.0, 0.35])
def test_a_constant_velocity_is_integrated_exactly(solver, steps, first):
    noise, value = normal(2, 20, 4).float()
    timesteps = [first * t.float() for t in grid(steps, 3.0, (20, 1))]
    start = torch.lerp(value, noise, timesteps[0])
    end = integrate(lambda x, t: noise - value, start, timesteps, solver)
    torch.testing.assert_close(end, value, rtol=0, atol=3e-6)


@each_solver
def test_elements_at_timestep_zero_do_not_change(solver):
    start = normal(6, 4).float()
    is_noised = torch.tensor([[1.0], [0.0], [1.0], [1.0], [0.0], [0.0]])
    timesteps = [t * is_noised for t in timestep_grid(9, torch.full((6, 1), 3.0))]
    end = integrate(lambda x, t: x * 3 + t.sin() - 7e3, start, timesteps, solver)
    clean = (is_noised == 0)[:, 0]
    assert torch.equal(end[clean], start[clean])
    assert not torch.isclose(end[~clean], start[~clean]).any() and end.isfinite().all()


@each_solver
@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_an_undefined_velocity_changes_nothing_at_elements_that_do_not_move(solver, fill):
    """Padding."""
    start, is_moving = normal(4, 3), torch.tensor([[1.0], [0.0], [1.0], [0.0]], dtype=torch.float64)
    timesteps = [t * is_moving for t in grid(6, 2.0, (4, 1))]
    velocities = [
        lambda x, t, other=other: torch.where(is_moving > 0, gaussian_velocity(x, t), other) for other in (0.0, fill)
    ]
    expected, actual = (integrate(velocity, start, timesteps, solver) for velocity in velocities)
    assert torch.equal(actual, expected) and torch.equal(actual[1], start[1]) and actual.isfinite().all()


@each_solver
def test_elements_that_begin_later_keep_their_value_until_then_and_reach_the_solution(solver):
    """As frames that are partly clean: at timestep min(t, level)."""
    level = torch.tensor([1.0, 0.8, 0.51, 0.5, 0.301, 0.0], dtype=torch.float64)
    timesteps, start, seen = [t.minimum(level) for t in grid(100)], normal(6), []

    def velocity(x, t):
        seen.append((x, t))
        return gaussian_velocity(x, t)

    end = integrate(velocity, start, timesteps, solver)
    for x, t in seen:
        assert torch.equal(x[t == level], start[t == level])
    tolerance = {"euler": 4e-2, "heun": 1e-3, "dpmpp_2m": 5e-3, "unipc": 1e-3}[solver]
    torch.testing.assert_close(end, gaussian_solution(start, level, torch.tensor(0.0)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_an_element_that_begins_just_after_a_step_is_not_thrown_off_by_changes_of_the_others(solver):
    """Its first step is tiny, in which the prediction changes with the others: this is no slope to go on along."""
    level, seen = torch.tensor([1.0, 0.5 + 1e-6], dtype=torch.float64), []

    def velocity(x, t):  # the data of both is a function of the first
        seen.append(x)
        return (x - x[:1].tanh()) / t

    integrate(velocity, torch.tensor([3.0, 0.2]).double(), [t.minimum(level) for t in grid(10)], solver)
    assert torch.stack(seen)[:, 1].abs().max() < 1


@each_solver
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_number_of_model_calls(solver, steps):
    seen = []

    def velocity(x, t):
        seen.append(float(t))
        return x

    integrate(velocity, torch.ones(1, dtype=torch.float64), grid(steps), solver)
    assert len(seen) == num_model_calls(solver, steps) == (2 * steps - 1 if solver == "heun" else steps)
    assert min(seen) > 0  # training has no noised token at t = 0


def test_the_corrector_is_exact_for_a_parabola_of_the_log_snr():
    """Averages of m = u and m = u^2 with the weight e^(h u), by quadrature."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for h, q in ((0.01, 1.0), (0.7, 1.3), (3.0, 0.4)):
        weight = (h * u).exp() / (h * u).exp().sum()
        a, b = corrector_weights(torch.tensor(h).double(), torch.tensor(q).double())
        for power in (1, 2):
            m_past, m_start, m_end = (-1 / q) ** power, 0.0, 1.0
            estimate = m_start + a * (m_end - m_start) + b * q * (m_start - m_past)
            assert float(estimate) == pytest.approx(float((weight * u**power).sum()), rel=1e-6)


def test_an_unknown_solver_is_refused():
    with pytest.raises(MegaSoraError, match=f"sample.solver=rk4 must be one of {', '.join(SOLVERS)}"):
        load(None, ["sample.solver=rk4"])
    with pytest.raises(ValueError, match="solver=rk4 must be one of euler, heun, dpmpp_2m, unipc"):
        integrate(gaussian_velocity, torch.ones(1), grid(2), "rk4")


@pytest.fixture(scope="module")
def schedulers():
    """Of diffusers, by solver: functions of the shift of timesteps."""
    diffusers = pytest.importorskip("diffusers", reason="pip install megasora[encoders]")
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 2}
    return {
        "euler": lambda shift: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        "heun": lambda shift: diffusers.FlowMatchHeunDiscreteScheduler(shift=shift),
        "dpmpp_2m": lambda shift: diffusers.DPMSolverMultistepScheduler(flow_shift=shift, **flow),
        "unipc": lambda shift: diffusers.UniPCMultistepScheduler(flow_shift=shift, **flow),
    }


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@each_solver
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samples_are_those_of_diffusers(schedulers, solver, steps, shift):
    """With its sigmas, in fp32. Its Heun divides by sigma = 0.001, which adds a rounding error."""
    scheduler, start = schedulers[solver](shift), normal(1, 50).float()
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    # of its Heun: s_0, s_1, s_1, s_2, s_2, ..., 0, and two calls per step: at s_0, s_1, s_1, s_2, ...
    sigmas = scheduler.sigmas.unique_consecutive()
    evaluated = torch.cat((sigmas[:1], sigmas[1:-1].repeat_interleave(2))) if solver == "heun" else sigmas[:-1]
    x = start
    for sigma, timestep in zip(evaluated, scheduler.timesteps, strict=True):
        x = scheduler.step(gaussian_velocity(x, sigma), timestep, x).prev_sample
    end = integrate(gaussian_velocity, start, list(sigmas), solver)
    torch.testing.assert_close(end, x, rtol=0, atol=3e-5 if solver == "heun" else 1e-5)

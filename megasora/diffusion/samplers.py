"""ODE solvers for sampling: integrate dx/dt = v(x, t), the predicted velocity, from noise (t = 1) to data (t = 0).

    euler       first order: a straight line along v
    heun        second order: the mean of v at both ends of the step (EDM, arXiv 2206.00364, algorithm 1)
    dpmpp_2m    second order, from the predictions of two steps (DPM-Solver++ 2M, arXiv 2211.01095, algorithm 2)
    unipc       third order: dpmpp_2m, and the prediction at the end of a step, which the next step needs anyway,
                corrects its result (UniPC-2 with B(h) = e^h - 1, arXiv 2302.04867, algorithms 1 and 2)

The last two use alpha = 1 - t, sigma = t and the prediction of the data, m. A step from s to t, after one from r to s:

    m_s = x_s - s v(x_s, s)        l(t) = log((1 - t) / t)        h = l(t) - l(s)        q = h / (l(s) - l(r))
    dpmpp_2m:            x_t = (t/s) x_s + (1 - t/s) (m_s + D / 2)                       D = q (m_s - m_r)
    unipc, correction:   x_t = (t/s) x_s + (1 - t/s) (m_s + a (m_t - m_s) + b D)

The weights a and b make the correction exact if m is a parabola in l (`corrector_weights`). D is 0, and the predicted
step that of Euler, where the predictions have no slope: in the first step, in the step to t = 0 (h is infinite), after
a step from t = 1 (infinite too), and where the step before was much shorter, as the element began to move within it.
As l has no bound at t = 0 and 1, steps there never become short in l: the error of a whole path falls by h^2 log(1/h).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megasora.diffusion.timesteps import shift

Velocity = Callable[[Tensor, Tensor], Tensor]
SOLVERS = ("euler", "heun", "dpmpp_2m", "unipc")
MAX_GROWTH = 2.0  # of q; steps that are equal before `shift` have at most log(2) / log(3/2) = 1.7, with any factor


def timestep_grid(steps: int, factor: Tensor) -> list[Tensor]:
    """steps + 1 timesteps from 1 to 0, shifted as in training; each has the shape of `factor`, see `shift_factor`."""
    return [shift(torch.full_like(factor, 1 - i / steps), factor) for i in range(steps + 1)]


def num_model_calls(solver: str, steps: int) -> int:
    """How many times `integrate` evaluates the velocity in so many steps."""
    return 2 * steps - 1 if solver == "heun" else steps


def integrate(velocity: Velocity, x: Tensor, timesteps: Sequence[Tensor], solver: str) -> Tensor:
    """x at the last of `timesteps`, from x at the first. `solver`: one of `SOLVERS`, else ValueError.

    `timesteps[i]` broadcasts with `x` and does not increase with i; each element may have timesteps of its own. In a
    step in which its timestep stays the same, an element keeps its value bit for bit, whatever its velocity.
    """
    if solver in ("euler", "heun"):
        return integrate_velocity(velocity, x, timesteps, is_second_order=solver == "heun")
    if solver in ("dpmpp_2m", "unipc"):
        return integrate_data(velocity, x, timesteps, is_corrected=solver == "unipc")
    raise ValueError(f"solver={solver} must be one of {', '.join(SOLVERS)}")


def integrate_velocity(velocity: Velocity, x: Tensor, timesteps: Sequence[Tensor], is_second_order: bool) -> Tensor:
    """`integrate` with heun if `is_second_order`, else with euler. A step to t = 0 is euler's."""
    for t, next_t in pairwise(timesteps):
        v = velocity(x, t)
        end = move(x, t, next_t, x + (next_t - t) * v)
        is_inner = next_t > 0
        if is_second_order and bool(is_inner.any()):
            mean_end = move(x, t, next_t, x + (next_t - t) * 0.5 * (v + velocity(end, next_t)))
            end = torch.where(is_inner, mean_end, end)
        x = end
    return x


@dataclass(frozen=True)
class Start:
    """The start of a past step."""

    x: Tensor
    t: Tensor
    data: Tensor  # predicted there


def integrate_data(velocity: Velocity, x: Tensor, timesteps: Sequence[Tensor], is_corrected: bool) -> Tensor:
    """`integrate` with unipc if `is_corrected`, else with dpmpp_2m."""
    before, last = None, None  # starts of the step before the last, and of the last
    for t, next_t in pairwise(timesteps):
        data = x - t * velocity(x, t)
        if is_corrected and last is not None:
            x = correct(x, t, data, last, before)
        before, last = last, Start(x, t, data)
        estimate = data if before is None else data + 0.5 * growth(before.t, t, next_t, x) * (data - before.data)
        x = move(x, t, next_t, towards(estimate, x, t, next_t))
    return x


def correct(x: Tensor, t: Tensor, data: Tensor, last: Start, before: Start | None) -> Tensor:
    """x at `t`, where the last step ended and `data` is predicted."""
    if before is None:
        estimate = 0.5 * (last.data + data)
    else:
        q = growth(before.t, last.t, t, x)
        a, b = corrector_weights(log_snr(t) - log_snr(last.t), q)
        slope = q * (last.data - before.data)
        estimate = last.data + a.to(x.dtype) * (data - last.data) + b.to(x.dtype) * slope
    return move(x, last.t, t, towards(estimate, last.x, last.t, t))


def move(x: Tensor, t: Tensor, next_t: Tensor, end: Tensor) -> Tensor:
    """`end`, but `x` where the timestep stays the same."""
    return torch.where(next_t == t, x, end)


def towards(data: Tensor, x: Tensor, t: Tensor, next_t: Tensor) -> Tensor:
    """The point at `next_t` of the straight line from x at `t` to `data` at 0."""
    return data + next_t / t * (x - data)


def log_snr(t: Tensor) -> Tensor:
    """l(t) = log((1 - t) / t), float64; infinite at 0, minus infinity at 1."""
    return torch.log1p(-t.double()) - t.double().log()


def growth(past_t: Tensor, t: Tensor, next_t: Tensor, x: Tensor) -> Tensor:
    """q in the dtype of `x`: the length in l of the step from `t` to `next_t`, divided by that from `past_t` to `t`.

    0 where one of them is infinite or the second much shorter than the first.
    """
    q = (log_snr(next_t) - log_snr(t)) / (log_snr(t) - log_snr(past_t))
    return torch.where(q <= MAX_GROWTH, q, 0.0).to(x.dtype)  # also where q is not a number


def corrector_weights(h: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), float64, of a step of length `h` in l, `q` times the one before; not a number if h = 0.

    With u = (l - l(s)) / h, the solution averages m over u in [0, 1] with the weight e^(h u). Averages of u and u^2 are

        E_1 = 1 / (1 - e^-h) - 1 / h        E_2 = 1 / (1 - e^-h) - 2 E_1 / h

    and a + b = E_1 for m = u, a - b / q = E_2 for m = u^2.
    """
    inverse = -1 / torch.expm1(-h)
    mean = inverse - 1 / h
    mean_square = inverse - 2 * mean / h
    b = (mean - mean_square) * q / (1 + q)
    return mean - b, b

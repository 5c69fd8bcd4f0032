"""ODE solvers for sampling: integrate dx/dt = v(x, t), the predicted velocity, from noise (t = 1) to data (t = 0)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megasora.diffusion.timesteps import shift

Velocity = Callable[[Tensor, Tensor], Tensor]


def timestep_grid(steps: int, factor: Tensor) -> list[Tensor]:
    """steps + 1 timesteps from 1 to 0, shifted as in training; each has the shape of `factor`, see `shift_factor`."""
    return [shift(torch.full_like(factor, 1 - i / steps), factor) for i in range(steps + 1)]


def integrate(velocity: Velocity, x: Tensor, timesteps: Sequence[Tensor], solver: str) -> Tensor:
    """x at the last of `timesteps`, from x at the first; elements whose timesteps are all 0 do not change.

    `timesteps[i]` broadcasts with `x`. `solver`: `euler`, one model call per step, or `heun`, second order, two per
    step except the last (EDM, arXiv 2206.00364, alg. 1).
    """
    last = len(timesteps) - 2
    for i, (t, next_t) in enumerate(zip(timesteps[:-1], timesteps[1:], strict=True)):
        v = velocity(x, t)
        euler = x + (next_t - t) * v
        if solver == "heun" and i < last:
            x = x + (next_t - t) * 0.5 * (v + velocity(euler, next_t))
        else:
            x = euler
    return x

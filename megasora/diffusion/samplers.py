"""From noise to data along the learned velocity: dx/dt = v(x, t), from t = 1 down to t = 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megasora.diffusion.timesteps import shift

Velocity = Callable[[Tensor, Tensor], Tensor]


def timestep_grid(steps: int, factor: Tensor) -> list[Tensor]:
    """steps + 1 levels from 1 to 0, moved towards noise like the training timesteps; each has the shape of `factor`."""
    return [shift(torch.full_like(factor, 1 - i / steps), factor) for i in range(steps + 1)]


def integrate(velocity: Velocity, x: Tensor, levels: Sequence[Tensor], solver: str) -> Tensor:
    """`levels[i]` broadcasts with `x`: each element follows its own; where all of them are 0, `x` stays bit for bit.

    `euler`: one call a step. `heun`: second order, two calls a step but for the last (EDM, arXiv 2206.00364, alg. 1).
    """
    last = len(levels) - 2
    for i, (t, next_t) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        v = velocity(x, t)
        euler = x + (next_t - t) * v
        if solver == "heun" and i < last:
            x = x + (next_t - t) * 0.5 * (v + velocity(euler, next_t))
        else:
            x = euler
    return x

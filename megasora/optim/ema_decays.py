"""Decays of the averages of the weights: constant ones, and those of power functions [Karras et al., arXiv 2312.02696].

A power-function average weights the weights after update `tau` of `t` by (gamma + 1) tau^gamma / t^(gamma + 1). Its
width, the standard deviation of this distribution divided by `t`, is

    sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))                  [eq. 3.3 there]

so it covers the same fraction of a run however long the run is, and forgets the initial weights. The recurrence is that
of a constant decay, with beta(t) = (1 - 1/t)^(gamma + 1) in its place.

Kinds, the names of averages in checkpoints and of --weights: "ema" (optim.ema_decay), "ema_0.999" (optim.ema_decays),
"ema_sigma_0.05" (optim.ema_sigmas).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megasora.config import OptimConfig

Decay = Callable[[int], float]  # update, from 0 -> share of the average that stays
SIGMA_PREFIX = "ema_sigma_"
MAX_GAMMA = 1e9  # above that of any accepted sigma


def ema_decays(optim: OptimConfig) -> dict[str, Decay]:
    """The decay of each average of a run, by its kind."""
    return {
        "ema": constant_decay(optim.ema_decay),
        **{f"ema_{decay!r}": constant_decay(decay) for decay in optim.ema_decays},
        **{f"{SIGMA_PREFIX}{sigma!r}": power_decay(sigma) for sigma in optim.ema_sigmas},
    }


def constant_decay(decay: float) -> Decay:
    """Grows to `decay` over the first updates, so that the initial weights lose their influence early."""
    return lambda update: min(decay, (1 + update) / (10 + update))


def power_decay(sigma: float) -> Decay:
    """beta(t) of the average of relative width `sigma`, t = update + 1; it is 0 at the first update."""
    exponent = gamma_of(sigma) + 1
    return lambda update: (1 - 1 / (update + 1)) ** exponent


def gamma_of(sigma: float) -> float:
    """The exponent gamma >= 0 of the power function of relative width `sigma`, at most 1 / sqrt(12)."""
    if not 0 < sigma <= sigma_of(0):
        raise ValueError(f"sigma={sigma} must be above 0 and at most {sigma_of(0):.4f}")
    low, high = 0.0, MAX_GAMMA  # the width falls with gamma
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if sigma_of(middle) > sigma else (low, middle)
    return low


def sigma_of(gamma: float) -> float:
    """The relative width of a power function, eq. 3.3."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def sigma_of_kind(kind: str) -> float | None:
    """The relative width of the power-function average `kind`; None for another kind of values."""
    try:
        sigma = float(kind.removeprefix(SIGMA_PREFIX)) if kind.startswith(SIGMA_PREFIX) else 0.0
    except ValueError:
        return None
    return sigma if 0 < sigma <= sigma_of(0) else None

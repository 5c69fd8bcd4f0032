"""Timesteps t in [0, 1]: 0 is clean, 1 is noise, x_t = (1 - t) x + t noise."""

from __future__ import annotations

import torch
from torch import Tensor

from megasora.config import ObjectiveConfig


def shift_factor(tokens: Tensor, config: ObjectiveConfig) -> Tensor:
    """The factor `a` of `shift` for a clip of so many tokens: shift * sqrt(tokens / shift_tokens), at least 1.

    At the same t, a clip of more tokens is less destroyed (SD3, arXiv 2403.03206, eq. 23).
    """
    return (config.shift * (tokens.double() / config.shift_tokens).sqrt()).clamp_min(1.0)


def shift(t: Tensor, factor: Tensor | float) -> Tensor:
    """Moves timesteps towards noise: t' = a t / (1 + (a - 1) t), with a = `factor`; 0 and 1 stay."""
    return factor * t / (1 + (factor - 1) * t)


def unshift(t: Tensor, factor: Tensor | float) -> Tensor:
    """The inverse of `shift`."""
    return t / (factor - (factor - 1) * t)


def logit_normal(uniform_G: Tensor, mean: float, std: float) -> Tensor:
    """Maps uniform numbers in (0, 1) to sigmoid(N(mean, std)), by the inverse normal distribution function."""
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform_G))

"""Noise levels: t = 0 is clean, t = 1 is noise, x_t = (1 - t) x + t noise."""

from __future__ import annotations

import torch
from torch import Tensor

from megasora.config import ObjectiveConfig


def shift_factor(tokens: Tensor, config: ObjectiveConfig) -> Tensor:
    """How far a clip's timesteps move towards noise: shift * sqrt(tokens / shift_tokens), at least 1.

    More tokens keep more of the picture visible at the same t (SD3, arXiv 2403.03206, eq. 23).
    """
    return (config.shift * (tokens.double() / config.shift_tokens).sqrt()).clamp_min(1.0)


def shift(t: Tensor, factor: Tensor | float) -> Tensor:
    """t' = a t / (1 + (a - 1) t); keeps 0 and 1."""
    return factor * t / (1 + (factor - 1) * t)


def logit_normal(uniform_G: Tensor, mean: float, std: float) -> Tensor:
    """Uniforms in (0, 1) to sigmoid(N(mean, std)), by the inverse of the normal's distribution function."""
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform_G))

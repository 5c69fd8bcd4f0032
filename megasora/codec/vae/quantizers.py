"""The latents of the autoencoder: from the encoder's output to what the decoder gets.

    kl    mean and log-variance per latent; z = mean + exp(logvar / 2) noise
    vq    the nearest code of a codebook
    fsq   each channel rounded to a few levels
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megasora.config import VAEConfig


@dataclass(frozen=True)
class Latents:
    """`z`: [B, channels, T, H, W], what is decoded. `penalty_sum`: KL or commitment, summed over all latents."""

    z: Tensor
    penalty_sum: Tensor
    codes: Tensor | None = None  # vq, fsq: int64 [B, T, H, W]
    details: dict[str, Tensor] = field(default_factory=dict)


class DiagonalGaussian(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.in_channels = 2 * channels

    def forward(self, moments: Tensor, noise: Tensor) -> Latents:
        mean, logvar = moments.float().chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()
        return Latents((mean + (0.5 * logvar).exp() * noise).to(moments.dtype), kl)

    def mode(self, moments: Tensor) -> Tensor:
        return moments.chunk(2, dim=1)[0]


def build_quantizer(vae: VAEConfig, channels: int) -> nn.Module:
    if vae.kind == "kl":
        return DiagonalGaussian(channels)
    raise NotImplementedError(vae.kind)

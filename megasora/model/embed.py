"""Embeddings of what conditions a row: its timestep, and its clip's size, length and frame rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TIMESTEP_SCALE = 1000.0  # t in [0, 1] is embedded as [0, 1000], DDPM's range, as in DiT and SD3


def sinusoid(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """[R] -> fp32 [R, dim]: cos and sin at dim/2 frequencies from 1 to 1/max_period (DiT, eq. of GLIDE)."""
    frequency = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(max_period) / (dim // 2)))
    angles = t.float()[:, None] * frequency
    return torch.cat((angles.cos(), angles.sin()), -1)


class TimestepEmbedding(nn.Module):
    """Timesteps [R] in [0, 1] -> [R, D]."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps_R: Tensor) -> Tensor:
        return self.mlp(sinusoid(timesteps_R * TIMESTEP_SCALE, self.frequencies).to(self.mlp[0].weight.dtype))


class NativeEmbedding(nn.Module):
    """Height and width (pixels), frames and frames per second of each clip, [G, 4] -> [G, D].

    From their logarithms, so that doubling any of them has the same effect at all sizes; scaled to about -1 .. 1 for
    common clips.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, native_size_G4: Tensor) -> Tensor:
        height, width, frames, fps = native_size_G4.float().clamp_min(1e-3).log2().unbind(-1)
        features = torch.stack(
            (
                (height - 8) / 4,
                (width - 8) / 4,
                (width - height) / 2,
                frames / 4 - 1,
                (fps - 4) / 2,
                (frames - fps) / 4,
            ),
            -1,
        )
        return self.mlp(features.to(self.mlp[0].weight.dtype))

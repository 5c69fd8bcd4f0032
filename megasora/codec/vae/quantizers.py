"""The latents of the autoencoder: from the encoder's output to what the decoder gets.

kl    mean and log-variance per latent; z = mean + exp(logvar / 2) noise     [LDM, arXiv 2112.10752]
vq    the nearest code of a codebook, codebook.py                            [VQ-VAE, arXiv 1711.00937]
fsq   each channel rounded to a few levels                                   [arXiv 2309.15505]

All are pointwise in space and time, so pieces of a clip are exact. They compute in fp32 at least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megasora.codec.vae.codebook import Codebook
from megasora.config import VAEConfig
from megasora.errors import MegaSoraError

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0
INITIAL_LOGVAR = -6.0  # of an encoder that returns zeros: with noise of variance 1 the first steps would learn little
MAX_CODES = 1 << 62  # of fsq: the index of a code is an int64


@dataclass(frozen=True)
class Latents:
    """What is decoded, and what the loss and the log need of it."""

    z: Tensor  # [B, channels, T, H, W]
    penalty_sum: Tensor  # KL (kl) or squared commitment error (vq), summed over all z.numel() latents; fsq: 0
    codes: Tensor | None = None  # vq, fsq: int64 [B, T, H, W]
    counts: Tensor | None = None  # vq: [1, codes], fsq: [channels, most levels]; for `perplexity`; sums over pieces


class DiagonalGaussian(nn.Module):
    """Moments [B, 2 channels, T, H, W] -> latents. The penalty is the KL divergence from a standard normal, in nats."""

    num_codes = 0

    def __init__(self, channels: int):
        super().__init__()
        self.in_channels = 2 * channels

    def forward(self, moments: Tensor, noise: Tensor) -> Latents:
        mean, logvar = at_least_fp32(moments).chunk(2, dim=1)
        logvar = (logvar + INITIAL_LOGVAR).clamp(MIN_LOGVAR, MAX_LOGVAR)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()
        return Latents((mean + (0.5 * logvar).exp() * noise).to(moments.dtype), kl)

    def mode(self, moments: Tensor) -> Tensor:
        """The mean."""
        return moments.chunk(2, dim=1)[0]


class VectorQuantizer(nn.Module):
    """[B, channels, T, H, W] -> the nearest codes. The gradient of z goes straight to the encoder; the codes follow
    moving averages, see codebook.py. The penalty is (x - code)^2, which pulls the encoder to its codes."""

    def __init__(self, channels: int, vae: VAEConfig):
        super().__init__()
        self.in_channels, self.num_codes = channels, vae.codebook_size
        self.codebook = Codebook(vae.codebook_size, channels, vae.codebook_decay, vae.dead_code_usage)

    def forward(self, x: Tensor, noise: Tensor) -> Latents:
        """`noise`: the standard normal values that `kl` would add; here they choose vectors for dead codes."""
        vectors = at_least_fp32(x)
        codes = self.codebook.nearest(vectors.detach())
        quantized = self.codebook.vectors(codes)
        if self.training:
            self.codebook.collect(vectors.detach(), codes, noise)
        counts = torch.bincount(codes.flatten(), minlength=self.num_codes)[None]
        return Latents(straight_through(quantized.to(x.dtype), x), (vectors - quantized).square().sum(), codes, counts)

    def mode(self, x: Tensor) -> Tensor:
        """The vectors of the nearest codes."""
        return self.codebook.vectors(self.codebook.nearest(at_least_fp32(x))).to(x.dtype)


class FiniteScalarQuantizer(nn.Module):
    """[B, channels, T, H, W] -> tanh(x) rounded to `levels[c]` equidistant values from -1 to 1.

    With h = (levels - 1) / 2 the values of h tanh(x) are rounded to integers for an odd number of levels and to
    half-integers for an even one, so that the levels are symmetric about 0 (the paper instead shifts the tanh).
    """

    def __init__(self, levels: list[int]):
        super().__init__()
        self.in_channels, self.levels, self.num_codes = len(levels), list(levels), math.prod(levels)
        if self.num_codes > MAX_CODES:
            raise MegaSoraError(
                f"vae.fsq_levels={levels} make {self.num_codes:.2g} codes, more than {MAX_CODES:.2g}; use fewer levels "
                "or codec.channels, or vae.kind=kl"
            )

    def forward(self, x: Tensor, noise: Tensor) -> Latents:
        """`noise` is not used."""
        bounded, rounded, half = self.quantize(x)
        z = straight_through(rounded, bounded) / half
        indices = (rounded + half).long()  # of the levels, from 0
        levels = torch.tensor(self.levels, device=x.device)
        place_values = torch.cat([levels.new_ones(1), levels.cumprod(0)[:-1]]).view(-1, 1, 1, 1)
        most = max(self.levels)
        rows = most * torch.arange(self.in_channels, device=x.device).view(-1, 1, 1, 1)
        counts = torch.bincount((indices + rows).flatten(), minlength=most * self.in_channels)
        codes = (indices * place_values).sum(1)
        return Latents(z.to(x.dtype), z.new_zeros(()), codes, counts.view(self.in_channels, most))

    def mode(self, x: Tensor) -> Tensor:
        """The rounded values, from -1 to 1."""
        _, rounded, half = self.quantize(x)
        return (rounded / half).to(x.dtype)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h tanh(x), the same rounded, and h [channels, 1, 1, 1]."""
        x = at_least_fp32(x)
        levels = torch.tensor(self.levels, device=x.device).view(-1, 1, 1, 1)
        half, shift = (levels - 1).to(x.dtype) / 2, (1 - levels % 2).to(x.dtype) / 2
        bounded = half * x.tanh()
        return bounded, torch.round(bounded.detach() - shift) + shift, half


def build_quantizer(vae: VAEConfig, channels: int) -> nn.Module:
    """A module with `in_channels`, `num_codes` (kl: 0), `forward(x, noise) -> Latents` and `mode(x)`, which is what
    ingest stores."""
    if vae.kind == "vq":
        return VectorQuantizer(channels, vae)
    return FiniteScalarQuantizer(vae.fsq_levels) if vae.kind == "fsq" else DiagonalGaussian(channels)


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """Exactly `value`, with the gradient of x [arXiv 1308.3432]; NaN where x is not finite."""
    return value.detach() + (x - x.detach())


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of the frequencies in counts [N, K], fp64 []; of several rows the product, as if independent.

    For fsq this bounds the perplexity of its codes from above: they are far too many to be counted in a batch.
    """
    p = counts.double() / counts.sum(-1, keepdim=True).clamp_min(1)
    return torch.special.entr(p).sum().exp()

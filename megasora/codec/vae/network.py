"""VideoVAE: a causal 3D convolutional autoencoder.

    frames [B, 3, T, H, W] --Encoder--> moments or codes [B, M, 1 + (T-1)/ft, H/fh, W/fw] --Decoder--> frames

A stage has residual blocks of one width; between two stages the sides are halved (Downsample) or doubled (Upsample),
in the last ones also time. The patch of the first convolution holds the remaining strides. Images are clips of one
frame. The path through the shortcuts is linear from pixels to latents and back: there is no norm before the last
convolutions, with which training took several times as many steps. The latents are those of `quantizers.py`; the
network knows only their number of channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megasora.codec.vae.boundary import Boundary, ClipBoundary
from megasora.codec.vae.layers import (
    CausalConv3d,
    Downsample,
    ResidualBlock,
    Upsample,
    depth_to_space,
    space_to_depth,
)
from megasora.codec.vae.quantizers import Latents, build_quantizer
from megasora.config import VAEConfig

COLORS = 3


@dataclass(frozen=True)
class Strides:
    """How codec.factors are divided over the network: `patch` and between two stages, each (frames, sides)."""

    patch: tuple[int, int]
    stages: list[tuple[int, int]]


def strides(vae: VAEConfig, factors: list[int]) -> Strides:
    """Sides are halved between any two stages, time between the last ones; the patch takes what remains of time."""
    steps, halvings = len(vae.multipliers) - 1, factors[0].bit_length() - 1
    in_time = [index >= steps - halvings for index in range(steps)]
    return Strides((1 << max(0, halvings - steps), vae.patch), [(2 if time else 1, 2) for time in in_time])


class Encoder(nn.Module):
    """[B, 3, T, H, W] -> [B, out_channels, T', H/fh, W/fw]."""

    def __init__(self, vae: VAEConfig, factors: list[int], out_channels: int):
        super().__init__()
        plan, kernel = strides(vae, factors), kernel_of(vae)
        widths = [vae.width * m for m in vae.multipliers]
        self.patch = plan.patch
        self.conv_in = CausalConv3d(COLORS * plan.patch[0] * plan.patch[1] ** 2, widths[0], kernel)
        layers: list[nn.Module] = []
        for index, width in enumerate(widths):
            layers += [ResidualBlock(width, kernel) for _ in range(vae.blocks)]
            if index < len(plan.stages):
                layers.append(Downsample(width, widths[index + 1], plan.stages[index]))
        self.layers = nn.ModuleList(layers)
        self.conv_out = CausalConv3d(widths[-1], out_channels, kernel)

    def forward(self, frames: Tensor, boundary: Boundary) -> Tensor:
        x = self.conv_in(space_to_depth(frames, self.patch, boundary.starts_clip), boundary)
        for layer in self.layers:
            x = layer(x, boundary)
        return self.conv_out(x, boundary)


class Decoder(nn.Module):
    """[B, in_channels, T', h, w] -> [B, 3, T, H, W]."""

    def __init__(self, vae: VAEConfig, factors: list[int], in_channels: int):
        super().__init__()
        plan, kernel = strides(vae, factors), kernel_of(vae)
        widths = [(vae.decoder_width or vae.width) * m for m in reversed(vae.multipliers)]
        self.patch, stages = plan.patch, plan.stages[::-1]
        self.conv_in = CausalConv3d(in_channels, widths[0], kernel)
        layers: list[nn.Module] = []
        for index, width in enumerate(widths):
            layers += [ResidualBlock(width, kernel) for _ in range(vae.blocks + 1)]
            if index < len(stages):
                layers.append(Upsample(width, widths[index + 1], stages[index]))
        self.layers = nn.ModuleList(layers)
        self.conv_out = CausalConv3d(widths[-1], COLORS * plan.patch[0] * plan.patch[1] ** 2, kernel)

    def forward(self, latents: Tensor, boundary: Boundary) -> Tensor:
        x = self.conv_in(latents, boundary)
        for layer in self.layers:
            x = layer(x, boundary)
        return depth_to_space(self.conv_out(x, boundary), self.patch, boundary.starts_clip)


def kernel_of(vae: VAEConfig) -> tuple[int, int]:
    """(frames, rows and columns) of the convolutions."""
    return (3 if vae.time == "causal" else 1, 3)


@dataclass(frozen=True)
class Reconstruction:
    """What a forward pass returns."""

    frames: Tensor  # [B, 3, T, H, W]
    latents: Latents


class VideoVAE(nn.Module):
    """Encoder, quantizer, decoder. Parameters are not initialised."""

    def __init__(self, vae: VAEConfig, factors: list[int], channels: int):
        super().__init__()
        self.factors, self.channels = tuple(factors), channels
        self.quantizer = build_quantizer(vae, channels)
        self.encoder = Encoder(vae, factors, self.quantizer.in_channels)
        self.decoder = Decoder(vae, factors, channels)

    def forward(self, frames: Tensor, noise: Tensor, boundary: Boundary | None = None) -> Reconstruction:
        """Reconstructs clips of [-1, 1]. `noise`: standard normal [B, channels, T', h, w], which `kl` samples with.

        T must be 1 + a multiple of ft (a multiple, if the piece does not start its clip), H and W of fh and fw.
        """
        boundary = boundary or ClipBoundary()
        latents = self.quantizer(self.encoder(frames, boundary), noise)
        return Reconstruction(self.decoder(latents.z, boundary), latents)

    def encode(self, frames: Tensor, boundary: Boundary | None = None) -> Tensor:
        """Latents without sampling noise, [B, channels, T', h, w], not normalised."""
        return self.quantizer.mode(self.encoder(frames, boundary or ClipBoundary()))

    def decode(self, latents: Tensor, boundary: Boundary | None = None) -> Tensor:
        return self.decoder(latents, boundary or ClipBoundary())


@torch.no_grad()
def init_weights(model: nn.Module, draw) -> None:
    """Initialises all parameters, and the codes of vq. `draw(name, shape)`: a standard normal tensor, keyed by name.

    Convolutions divide the variance of their input by three, as PyTorch's own initialisation does, so that the
    shortcuts are what the network begins with.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(draw(name, parameter.shape) * (3 * parameter[0].numel()) ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("codebook.codes"):
            buffer.copy_(draw(name, buffer.shape))

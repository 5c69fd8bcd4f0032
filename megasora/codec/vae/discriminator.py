"""The discriminator of the adversarial loss: a 3D PatchGAN [arXiv 1611.07004] of causal convolutions.

frames [B, 3, T, H, W] -> logits [B, 1, T', H / 2^layers, W / 2^layers], each of a patch of space and time: positive for
original frames, negative for reconstructions. Like the autoencoder's, its layers take the boundary of a piece, and the
sides and frames are reduced by space-to-depth: pieces of a clip give the logits of the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megasora.codec.vae.boundary import Boundary, ClipBoundary
from megasora.codec.vae.layers import CausalConv3d, ChannelNorm, space_to_depth
from megasora.config import AdversarialConfig
from megasora.errors import MegaSoraError

COLORS = 3
SLOPE = 0.2  # of LeakyReLU below 0
MAX_MULTIPLIER = 8  # channels of the last layers / width
MAX_WEIGHT = 1e4  # of `adaptive_weight`
EPS = 1e-6


class Block(nn.Module):
    """Space-to-depth by `stride` = (frames, sides), a convolution, RMSNorm over channels except in the first block,
    LeakyReLU."""

    def __init__(self, in_channels: int, channels: int, stride: tuple[int, int], kernel: tuple[int, int], norm: bool):
        super().__init__()
        self.stride = stride
        self.conv = CausalConv3d(in_channels * stride[0] * stride[1] ** 2, channels, kernel)
        self.norm = ChannelNorm(channels) if norm else nn.Identity()

    def forward(self, x: Tensor, boundary: Boundary) -> Tensor:
        x = self.conv(space_to_depth(x, self.stride, boundary.starts_clip), boundary)
        return F.leaky_relu(self.norm(x), SLOPE)


class Discriminator(nn.Module):
    """`layers` blocks that halve the sides, the first of them also time while codec.factors allow it; one more block;
    a convolution to one channel. Parameters are not initialised, see network.init_weights."""

    def __init__(self, adversarial: AdversarialConfig, factors: list[int], time: str = "causal"):
        """`factors`: codec.factors, of which frames and sides are multiples. `time`: vae.time."""
        super().__init__()
        if factors[1] % 2**adversarial.layers:
            raise MegaSoraError(
                f"reconstruction.adversarial.layers={adversarial.layers} halve the sides to 1/{2**adversarial.layers}, "
                f"but they are multiples of codec.factors[1]={factors[1]}; "
                f"use at most {factors[1].bit_length() - 1} layers"
            )
        kernel = (3 if time == "causal" else 1, 3)
        widths = [adversarial.width * min(2**index, MAX_MULTIPLIER) for index in range(adversarial.layers + 1)]
        blocks, channels, frames = [], COLORS, factors[0]
        for index, width in enumerate(widths):
            last = index == adversarial.layers
            stride = (1 if last or frames % 2 else 2, 1 if last else 2)
            blocks.append(Block(channels, width, stride, kernel, norm=index > 0))
            channels, frames = width, frames // stride[0]
        self.blocks = nn.ModuleList(blocks)
        self.conv_out = CausalConv3d(channels, 1, kernel)

    def forward(self, frames: Tensor, boundary: Boundary | None = None) -> Tensor:
        """T must be 1 + a multiple of ft (a multiple, if the piece does not start its clip), H and W of fh and fw."""
        boundary = boundary or ClipBoundary()
        x = frames
        for block in self.blocks:
            x = block(x, boundary)
        return self.conv_out(x, boundary)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator for each frame of logits, [B, T'], a mean over patches; both [B, 1, T', h, w].

    (relu(1 - real) + relu(1 + fake)) / 2 [arXiv 1705.02894, with LDM's factor]. It is 1 where all logits are 0.
    """
    return 0.5 * (F.relu(1 - real_logits) + F.relu(1 + fake_logits)).mean((1, 3, 4))


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Hinge loss of the autoencoder for each frame of logits, [B, T']: minus the mean over patches."""
    return -fake_logits.mean((1, 3, 4))


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    frames: Sequence[Tensor],
    all_reduce_sum: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """The weight of the adversarial loss at which both losses have gradients of equal norm: a number without gradient.

    |d reconstruction / d x| / (|d adversarial / d x| + 1e-6), at most 1e4, where x are the reconstructed frames that
    both scalar losses are computed of; their graphs are kept. VQGAN [arXiv 2012.09841] takes the weights of the last
    layer for x; the frames need no backward pass through the network. `all_reduce_sum` adds up the squared norms of the
    ranks that share the clips.
    """
    squares = []
    for loss in (reconstruction, adversarial):
        gradients = torch.autograd.grad(loss, frames, retain_graph=True)
        squares.append(sum(gradient.square().sum(dtype=torch.float32) for gradient in gradients))
    reconstruction_norm, adversarial_norm = all_reduce_sum(torch.stack(squares)).sqrt()
    return (reconstruction_norm / (adversarial_norm + EPS)).clamp(0, MAX_WEIGHT).detach()

"""The layers of the video autoencoder. All take [B, C, T, H, W] and the boundary of the piece (boundary.py).

Only convolutions of more than one frame or pixel look beyond a position: normalisation is over channels, and
resampling rearranges blocks. So pieces of a clip are computed exactly. Time is causal: a frame does not depend on later
ones. Resampling in time by s keeps the first frame by itself: 1 + s k frames are 1 + k below.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasora.codec.vae.boundary import Boundary

EPS = 1e-6


class ChannelNorm(nn.Module):
    """RMSNorm over channels: x / sqrt(mean over C of x^2) * weight [arXiv 1910.07467]."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(1, keepdim=True, dtype=torch.float32) + EPS).to(x.dtype)
        return x * scale * self.weight.view(-1, 1, 1, 1)


class CausalConv3d(nn.Module):
    """A convolution over `kernel` = (frames, rows and columns): the frames are this one and those before it."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int]):
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel[0], kernel[1], kernel[1]))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def forward(self, x: Tensor, boundary: Boundary) -> Tensor:
        frames, side = self.kernel
        return F.conv3d(boundary.extend(x, frames - 1, side // 2, self), self.weight, self.bias)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, channels: int, kernel: tuple[int, int]):
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(channels), CausalConv3d(channels, channels, kernel)
        self.norm2, self.conv2 = ChannelNorm(channels), CausalConv3d(channels, channels, kernel)

    def forward(self, x: Tensor, boundary: Boundary) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), boundary)
        return x + self.conv2(F.silu(self.norm2(h)), boundary)


class Downsample(nn.Module):
    """Blocks of `stride` = (frames, rows and columns) become channels, then a linear map, plus the mean of groups of
    channels: the residual space-to-channel shortcut of DC-AE [arXiv 2410.10733]."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int]):
        super().__init__()
        self.stride, self.out_channels = stride, out_channels
        self.proj = CausalConv3d(in_channels * stride[0] * stride[1] ** 2, out_channels, (1, 1))

    def forward(self, x: Tensor, boundary: Boundary) -> Tensor:
        x = space_to_depth(x, self.stride, boundary.starts_clip)
        return self.proj(x, boundary) + average_channels(x, self.out_channels)


class Upsample(nn.Module):
    """The inverse of Downsample: a linear map, plus repeated channels, then channels become blocks."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int]):
        super().__init__()
        self.stride, self.block_channels = stride, out_channels * stride[0] * stride[1] ** 2
        self.proj = CausalConv3d(in_channels, self.block_channels, (1, 1))

    def forward(self, x: Tensor, boundary: Boundary) -> Tensor:
        x = self.proj(x, boundary) + x.repeat_interleave(self.block_channels // x.shape[1], dim=1)
        return depth_to_space(x, self.stride, boundary.starts_clip)


def space_to_depth(x: Tensor, stride: tuple[int, int], starts_clip: bool) -> Tensor:
    """[B, C, T, H, W] -> [B, C st s^2, T', H/s, W/s]; T' = T/st, or 1 + (T-1)/st if the piece starts its clip: the first
    frame is then repeated to fill its block. `stride` = (st, s)."""
    st, s = stride
    if starts_clip and st > 1:
        x = torch.cat([x[:, :, :1].expand(-1, -1, st - 1, -1, -1), x], dim=2)
    b, c, t, h, w = x.shape
    blocks = x.view(b, c, t // st, st, h // s, s, w // s, s).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return blocks.reshape(b, t // st, h // s, w // s, c * st * s * s).permute(0, 4, 1, 2, 3)  # channels last in memory


def depth_to_space(x: Tensor, stride: tuple[int, int], starts_clip: bool) -> Tensor:
    """The inverse of `space_to_depth`."""
    st, s = stride
    b, c, t, h, w = x.shape
    c //= st * s * s
    blocks = x.permute(0, 2, 3, 4, 1).reshape(b, t, h, w, c, st, s, s).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = blocks.reshape(b, t * st, h * s, w * s, c).permute(0, 4, 1, 2, 3)
    return x[:, :, st - 1 :] if starts_clip else x


def average_channels(x: Tensor, channels: int) -> Tensor:
    """[B, C, ...] -> [B, channels, ...]: means of C / channels consecutive channels."""
    b, c, *sides = x.shape
    return x.unflatten(1, (channels, c // channels)).mean(2)

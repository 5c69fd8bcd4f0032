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
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale = torch.rsqrt(x.square().mean(1, keepdim=True, dtype=dtype) + EPS).to(x.dtype)
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
        return convolve(boundary.extend(x, frames - 1, side // 2, self), self.weight, self.bias)


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
        self.stride = stride
        self.proj = CausalConv3d(in_channels, out_channels * stride[0] * stride[1] ** 2, (1, 1))

    def forward(self, x: Tensor, boundary: Boundary) -> Tensor:
        grouped = self.proj(x, boundary).unflatten(1, (x.shape[1], -1))
        return depth_to_space((grouped + x.unsqueeze(2)).flatten(1, 2), self.stride, boundary.starts_clip)


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv3d. For one small clip or chunk in fp32 on the CPU, PyTorch chooses an implementation that is 3 to 5 times
    as slow as oneDNN and returns another memory format; so oneDNN is called directly."""
    if x.device.type == "cpu" and x.dtype == torch.float32 == weight.dtype and torch.backends.mkldnn.is_available():
        if not torch.is_autocast_enabled("cpu"):
            return torch.mkldnn_convolution(x, weight, bias, (0, 0, 0), (1, 1, 1), (1, 1, 1), 1)
    return F.conv3d(x, weight, bias)


def space_to_depth(x: Tensor, stride: tuple[int, int], starts_clip: bool) -> Tensor:
    """[B, C, T, H, W] -> [B, C st s^2, T', H/s, W/s]; T' = T/st, or 1 + (T-1)/st if the piece starts its clip: the
    first frame is then repeated to fill its block. `stride` = (st, s)."""
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

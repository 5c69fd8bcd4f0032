"""How much a reconstruction differs from the original: PSNR, SSIM and flicker, in total over clips of any length.

Frames are [F, 3, H, W] in [-1, 1]. Values are per frame, so pieces of clips and clips of several ranks add up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

DATA_RANGE = 2.0  # largest minus smallest value of a pixel
MAX_PSNR = 100.0  # dB, of frames that are equal
WINDOW, SIGMA = 11, 1.5  # of SSIM: side in pixels, standard deviation
C1, C2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2


def psnr(frames: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB, [F]: 10 log10(4 / mean squared error), at most MAX_PSNR."""
    return psnr_of((frames - target).square().mean((1, 2, 3)))


def psnr_of(squared_error: Tensor) -> Tensor:
    """dB of mean squared errors; NaN for NaN."""
    least = DATA_RANGE**2 * 10 ** (-MAX_PSNR / 10)
    return 10 * torch.log10(DATA_RANGE**2 / squared_error.clamp_min(least))


def ssim(frames: Tensor, target: Tensor, stride: int = 1) -> Tensor:
    """Structural similarity of each frame, [F], in [-1, 1] [Wang et al., 2004]; differentiable.

    The mean over the three colours and all positions at which the Gaussian window (11 pixels, sigma 1.5) lies within
    the frame. Along a side shorter than that, the window is the largest odd number of pixels that fits. The brightness
    that it compares is that of [0, 2]: the same value as of frames in [0, 1] or [0, 255]. With `stride`, only every
    stride-th position of each row and column counts.
    """
    kernels = [gaussian(window_side(side), like=frames) for side in frames.shape[-2:]]

    def local_mean(x: Tensor) -> Tensor:
        rows, columns = (kernel.expand(x.shape[1], 1, -1) for kernel in kernels)
        x = F.conv2d(x, rows[..., None], stride=(stride, 1), groups=len(rows))
        return F.conv2d(x, columns[:, :, None], stride=(1, stride), groups=len(columns))

    x, y = (z.contiguous(memory_format=torch.channels_last) for z in (frames, target))
    mean_x, mean_y = local_mean(x), local_mean(y)
    covariance = local_mean(x * y) - mean_x * mean_y
    variances = local_mean(x.square() + y.square()) - mean_x.square() - mean_y.square()
    bright_x, bright_y = mean_x + 1, mean_y + 1
    luminance = (2 * bright_x * bright_y + C1) / (bright_x.square() + bright_y.square() + C1)
    return (luminance * (2 * covariance + C2) / (variances + C2)).mean((1, 2, 3))


def window_side(side: int) -> int:
    """Pixels of SSIM's window along a side of this many."""
    return min(WINDOW, side - (side + 1) % 2)


def gaussian(count: int, like: Tensor) -> Tensor:
    """[count] weights with sum 1."""
    x = torch.arange(count, device=like.device, dtype=like.dtype) - (count - 1) / 2
    weights = torch.exp(-x.square() / (2 * SIGMA**2))
    return weights / weights.sum()


def flicker(frames: Tensor, target: Tensor) -> Tensor:
    """Error of the change from each frame to the next, [F - 1]: mean |(x' - x) - (y' - y)|."""
    return (frames - target).diff(dim=0).abs().mean((1, 2, 3))


class Metrics:
    """Totals over clips that come in pieces. Memory: one frame, whatever the length of a clip.

    `sums`, float64 [6], is all of the state between two clips: add it to that of other clips or ranks.
    """

    def __init__(self):
        self.sums = torch.zeros(6, dtype=torch.float64)  # frames, PSNR, SSIM, squared error; pairs of frames, flicker
        self.last_error: Tensor | None = None  # of the last frame

    @torch.no_grad()
    def add(self, frames: Tensor, target: Tensor, starts_clip: bool = True) -> None:
        """Adds the next frames of a clip, each [F, 3, H, W]; `starts_clip`: they are the first ones of a clip."""
        if starts_clip:
            self.last_error = None
        for x, y in zip(frames.float().split(1), target.float().split(1), strict=True):
            error = x - y
            squared_error = error.square().mean()
            values = torch.stack([torch.ones_like(squared_error), psnr_of(squared_error), ssim(x, y)[0], squared_error])
            self.sums[:4] += values.double().cpu()
            if self.last_error is not None:
                change = torch.cat([self.last_error, error]).diff(dim=0).abs().mean()
                self.sums[4:] += torch.stack([torch.ones_like(change), change]).double().cpu()
            self.last_error = error

    def totals(self) -> dict[str, float]:
        """frames; psnr (dB), ssim and mse, means over frames; flicker, the mean over pairs of frames, 0 without any."""
        frames, *sums, pairs, change = self.sums.tolist()
        means = [total / frames if frames else math.nan for total in sums]
        return {"frames": int(frames), **dict(zip(("psnr", "ssim", "mse"), means, strict=True)),
                "flicker": change / pairs if pairs else 0.0}  # fmt: skip

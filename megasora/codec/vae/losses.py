"""The loss of a reconstruction: how far the decoded frames are from the original ones.

Clips [B, 3, T, H, W] in, one value per frame [B, T] out. A value is a mean over the pixels of its frame and depends on
no other frame: the loss of a step is the sum over the frames of all clips and ranks, divided by their number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megasora.codec.metrics import psnr_of, ssim
from megasora.codec.vae.lpips import LPIPS
from megasora.config import ReconstructionConfig

RECONSTRUCTION_TERMS = ("l1", "mse", "gradient", "ssim", "lpips")  # keys of reconstruction, with the weights
SSIM_STRIDE = 2  # pixels between the windows: half the time, while each pixel is in about 30 of them
SCALES = 3  # of the gradient term: full size, a half, a quarter


def frame_terms(recon: Tensor, target: Tensor, lpips: LPIPS | None = None) -> dict[str, Tensor]:
    """Values of each frame, [B, T], in fp32 at least; recon and target are [B, 3, T, H, W] in [-1, 1], sides >= 1.

    l1        mean |recon - target|
    mse       mean (recon - target)^2
    gradient  the same of the differences of neighbouring pixels, see `gradient_error`
    ssim      structural similarity, 1 for equal frames; of windows at every second position
    psnr      dB, without a gradient
    lpips     perceptual distance, if `lpips` is given
    """
    x, y = as_frames(recon), as_frames(target)
    error = x - y
    mse = error.square().mean((1, 2, 3))
    terms = {
        "l1": error.abs().mean((1, 2, 3)),
        "mse": mse,
        "gradient": gradient_error(error),
        "ssim": ssim(x, y, SSIM_STRIDE),
        "psnr": psnr_of(mse.detach()),
    }
    if lpips is not None:
        terms["lpips"] = lpips(x, y)
    return {name: values.unflatten(0, (recon.shape[0], recon.shape[2])) for name, values in terms.items()}


def reconstruction_loss(terms: dict[str, Tensor], weights: ReconstructionConfig) -> Tensor:
    """The weighted sum of the terms of each frame, [B, T]; `ssim` enters as 1 - SSIM.

    Terms without a weight are left out, so that the backward pass does not compute their gradient.
    """
    names = [name for name in RECONSTRUCTION_TERMS if getattr(weights, name) and name in terms]
    return sum(getattr(weights, name) * (1 - terms[name] if name == "ssim" else terms[name]) for name in names)


def gradient_error(error: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N]: mean absolute horizontal plus vertical difference of the error, mean over three scales.

    The scales are the error and its means over 2 x 2 and 4 x 4 pixels; those at the lower and right border may have
    fewer. A difference is linear, so this is the L1 distance of the gradients of two images, close to the gradient
    difference loss of arXiv 1511.05440. A side of one pixel has no difference.
    """
    total = error.new_zeros(len(error))
    for scale in range(SCALES):
        if scale:
            error = F.avg_pool2d(error, 2, ceil_mode=True, count_include_pad=False)
        for dim in (2, 3):
            if error.shape[dim] > 1:
                total = total + error.diff(dim=dim).abs().mean((1, 2, 3))
    return total / SCALES


def as_frames(clips: Tensor) -> Tensor:
    """[B, 3, T, H, W] -> [B T, 3, H, W], in fp32 at least; channels last in memory where the clips are."""
    return clips.to(torch.promote_types(clips.dtype, torch.float32)).transpose(1, 2).flatten(0, 1)

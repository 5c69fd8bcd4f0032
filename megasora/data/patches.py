"""Conversions between uint8 and float frames, padding of frames, and latents to patches and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def frames_to_float(frames_FHWC: Tensor) -> Tensor:
    """uint8 [F, H, W, 3] -> float32 [F, 3, H, W] in [-1, 1]."""
    return frames_FHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def frames_to_uint8(frames_FCHW: Tensor) -> Tensor:
    """float [F, 3, H, W] in [-1, 1] -> uint8 [F, H, W, 3], clamped."""
    return ((frames_FCHW + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def pad_frames(frames_FCHW: Tensor, multiple: tuple[int, int]) -> Tensor:
    """Repeats the last row and column until height and width are multiples; nothing is cropped or resized."""
    height, width = frames_FCHW.shape[-2:]
    down, right = -height % multiple[0], -width % multiple[1]
    return F.pad(frames_FCHW, (0, right, 0, down), mode="replicate") if down or right else frames_FCHW


def patchify(latents_CTHW: Tensor, patch: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int, int]]:
    """latents [C, T, H, W] -> patches [l, C*pt*ph*pw] in time-major order, and their grid (t, h, w), l = t*h*w."""
    pt, ph, pw = patch
    c, t, h, w = latents_CTHW.shape
    grid = (t // pt, h // ph, w // pw)
    x = latents_CTHW.view(c, grid[0], pt, grid[1], ph, grid[2], pw).permute(1, 3, 5, 0, 2, 4, 6)
    return x.reshape(grid[0] * grid[1] * grid[2], c * pt * ph * pw), grid


def unpatchify(patches_LP: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify`."""
    pt, ph, pw = patch
    x = patches_LP.view(*grid, -1, pt, ph, pw).permute(3, 0, 4, 1, 5, 2, 6)
    return x.reshape(x.shape[0], grid[0] * pt, grid[1] * ph, grid[2] * pw)

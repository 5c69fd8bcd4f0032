"""Padding of a frame to whole latents, without torch. `patches.pad_frames` is the same for tensors."""

from __future__ import annotations

import numpy as np


def pad_frame(frame: np.ndarray, multiple: tuple[int, int]) -> np.ndarray:
    """[H, W, C], whose last row and column are repeated until H and W are multiples."""
    down, right = (-n % m for n, m in zip(frame.shape[:2], multiple, strict=True))
    return np.pad(frame, ((0, down), (0, right), (0, 0)), mode="edge") if down or right else frame

"""Sizes of the clips of a dataset as they are in the wild: images, and clips of very different lengths."""

from __future__ import annotations

import numpy as np

SIDES = 16, 64  # rows and columns of tokens of an image
FRAMES = 16, 32  # and of a clip's frames


def heavy_mix(budget: int, clips: int, seed: int, images: float = 0.5) -> np.ndarray:
    """int64 [clips], each from 256 to `budget`: tokens of the clips of `heavy_grids`."""
    return heavy_grids(budget, clips, seed, images).prod(1)


def heavy_grids(budget: int, clips: int, seed: int, images: float = 0.5) -> np.ndarray:
    """int64 [clips, 3], (t, h, w): images of up to 4,096 tokens, the fraction `images`, and clips of up to `budget`.

    Clips are log-normal, 512 tokens and `budget` three standard deviations off the median, of whole latent frames.
    """
    rng = np.random.default_rng(seed)
    still = np.insert(rng.integers(SIDES[0], SIDES[1] + 1, (2, clips)), 0, 1, axis=0).T
    still = still[still.prod(1) <= budget][: round(clips * images)]
    tokens = np.exp(rng.normal(np.log(512 * budget) / 2, np.log(budget / 512) / 6, 2 * clips)).astype(np.int64)
    sides = rng.integers(FRAMES[0], FRAMES[1] + 1, (2, 2 * clips))
    moving = np.stack([tokens // sides.prod(0), *sides], axis=1)
    fits = (moving.prod(1) > 0) & (moving.prod(1) <= budget)
    return rng.permutation(np.concatenate([still, moving[fits][: clips - len(still)]]))

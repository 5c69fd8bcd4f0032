"""Token counts of a dataset as they are in the wild: images, and clips of very different lengths."""

from __future__ import annotations

import numpy as np

SIDES = 16, 64  # rows and columns of tokens of an image
FRAMES = 16, 32  # and of a clip's frames


def heavy_mix(budget: int, clips: int, seed: int, images: float = 0.5) -> np.ndarray:
    """int64 [clips], each from 256 to `budget`: images of up to 4,096 tokens, the fraction `images`, and clips.

    Clips are log-normal, 512 tokens and `budget` three standard deviations off the median, of whole latent frames.
    """
    rng = np.random.default_rng(seed)
    still = rng.integers(SIDES[0], SIDES[1] + 1, (2, clips)).prod(0)
    still = still[still <= budget][: round(clips * images)]
    moving = np.exp(rng.normal(np.log(512 * budget) / 2, np.log(budget / 512) / 6, 2 * clips)).astype(np.int64)
    frame = rng.integers(FRAMES[0], FRAMES[1] + 1, (2, 2 * clips)).prod(0)
    moving = moving // frame * frame
    moving = moving[(moving > 0) & (moving <= budget)][: clips - len(still)]
    return rng.permutation(np.concatenate([still, moving]))

"""Synthetic datasets with the clip sizes of real ones: images, and clips of very different lengths."""

from __future__ import annotations

import numpy as np

IMAGE_SIDES = 16, 64  # least and greatest number of rows and columns of tokens of an image
FRAME_SIDES = 16, 32  # the same, of the latent frames of a clip


def heavy_mix(tokens_per_pack: int, num_clips: int, seed: int, image_fraction: float = 0.5) -> np.ndarray:
    """int64 [num_clips], each from 256 to `tokens_per_pack`: the tokens of the clips of `heavy_grids`."""
    return heavy_grids(tokens_per_pack, num_clips, seed, image_fraction).prod(1)


def heavy_grids(tokens_per_pack: int, num_clips: int, seed: int, image_fraction: float = 0.5) -> np.ndarray:
    """int64 [num_clips, 3], (t, h, w) in tokens: a heavy-tailed mix in random order.

    The fraction `image_fraction` are images of up to 4,096 tokens, the others clips of up to `tokens_per_pack`, with
    whole latent frames. The lengths of clips are log-normal; 512 tokens and `tokens_per_pack` are three standard
    deviations from the median.
    """
    rng = np.random.default_rng(seed)
    low, high = IMAGE_SIDES
    images = np.insert(rng.integers(low, high + 1, (2, num_clips)), 0, 1, axis=0).T
    images = images[images.prod(1) <= tokens_per_pack][: round(num_clips * image_fraction)]
    log_median, log_std = np.log(512 * tokens_per_pack) / 2, np.log(tokens_per_pack / 512) / 6
    tokens = np.exp(rng.normal(log_median, log_std, 2 * num_clips)).astype(np.int64)
    low, high = FRAME_SIDES
    sides = rng.integers(low, high + 1, (2, 2 * num_clips))
    clips = np.stack([tokens // sides.prod(0), *sides], axis=1)
    fits = (clips.prod(1) > 0) & (clips.prod(1) <= tokens_per_pack)
    return rng.permutation(np.concatenate([images, clips[fits][: num_clips - len(images)]]))

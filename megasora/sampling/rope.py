"""Rotary frequencies of a model while it samples clips larger than those trained on; see `kernels/rope_scaling.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from megasora.kernels.rope_scaling import RopeScaling


@contextmanager
def scaled_rope(
    stages: Iterable[nn.Module], method: str, trained_grid: tuple[int, int, int], grid: tuple[int, int, int]
) -> Iterator[None]:
    """Within this context, the VideoDiTs `stages` rotate for clips of `grid`, and afterwards again as in training.

    `method`: none | ntk | riflex. The grids are latent frames, rows and columns of tokens: the largest trained on, and
    the largest of the clips sampled now. All stages of a pipeline and all ranks must use the same.
    """
    stages = list(stages)
    for stage in stages:
        stage.rope_scaling = None if method == "none" else RopeScaling(method, trained_grid, grid)
    try:
        yield
    finally:
        for stage in stages:
            stage.rope_scaling = None

"""What lies around a piece of a clip: the convolutions ask it for the values that they need beyond its borders.

    whole clip     zeros before the first frame and around each frame                      ClipBoundary
    chunk          the last frames of the chunk before it, kept per convolution            ChunkBoundary (stream.py)
    rank's part    the frames and rows of neighbouring ranks                               megasora.parallel.halo

A network that is called with one of them computes the same as on the whole clip.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn


class Boundary(Protocol):
    """Given to every layer. `starts_clip`: whether the piece begins with the first frame of its clip."""

    starts_clip: bool

    def extend(self, x: Tensor, frames: int, border: int, layer: nn.Module) -> Tensor:
        """[B, C, T, H, W] -> [B, C, frames + T, H + 2 border, W + 2 border]: the values before and around the piece.

        `layer`: the convolution that asks; a chunk's boundary keeps the last frames for each.
        """


class ClipBoundary:
    """The piece is a whole clip: beyond it are zeros."""

    starts_clip = True

    def extend(self, x: Tensor, frames: int, border: int, layer: nn.Module) -> Tensor:
        return F.pad(x, (border, border, border, border, frames, 0)) if frames or border else x

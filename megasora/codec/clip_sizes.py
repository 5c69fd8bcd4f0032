"""Sizes of clips and of their latents, without torch: frames 1 + k ft are latent frames 1 + k, sides are multiples."""

from __future__ import annotations

from collections.abc import Sequence

from megasora.errors import MegaSoraError


def latent_frames(frames: int, ft: int) -> int:
    """Latent frames of a clip: 1 for the first frame, and one for every `ft` further ones, rounded up."""
    return 1 + -(-(frames - 1) // ft)


def num_frames(latent_frames: int, ft: int) -> int:
    """Frames that are decoded of so many latent frames."""
    return 1 + (latent_frames - 1) * ft


def check_sides(height: int, width: int, factors: Sequence[int]) -> None:
    """Raises MegaSoraError where the sides of a frame, in pixels, are not multiples of codec.factors."""
    _, fh, fw = factors
    if height % fh or width % fw:
        raise MegaSoraError(f"frames of {height}x{width} pixels are not multiples of codec.factors={fh}x{fw}")

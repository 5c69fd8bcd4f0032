"""Frames to latents and back. A codec has `encode`, `decode`, `fingerprint`, `factors`, `channels`, and the two counts
`latent_frames` and `num_frames`; `build_codec` is where another one is plugged in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megasora.codec.dct import DCTCodec
    from megasora.config import CodecConfig


def build_codec(config: CodecConfig) -> DCTCodec:
    from megasora.codec.dct import DCTCodec

    return DCTCodec(config)

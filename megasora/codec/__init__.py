"""Frames to latents and back. A codec has `encode`, `decode`, `fingerprint`, `factors`, `channels`, and the two counts
`latent_frames` and `num_frames`; `build_codec` is where another one is plugged in.

A codec's stream is what ingest runs beside the decoder: `encode(frames)` takes frames [H, W, 3] one after the other and
gives latent frames [H/ph, W/pw, C], the same bits as `encode` of the whole clip; `build_stream` makes it without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megasora.codec.dct import DCTCodec
    from megasora.codec.dct_stream import DCTStream
    from megasora.config import CodecConfig


def build_codec(config: CodecConfig) -> DCTCodec:
    from megasora.codec.dct import DCTCodec

    return DCTCodec(config)


def build_stream(config: CodecConfig) -> DCTStream:
    from megasora.codec.dct_stream import DCTStream

    return DCTStream(config)

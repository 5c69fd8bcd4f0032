"""Codecs: map frames to latents and back.

A codec has `encode`, `decode`, `fingerprint`, `factors`, `channels`, `latent_frames` and `num_frames`; a new one is
added to `build_codec`. Its stream encoder is what ingest runs: `encode(frames)` takes frames [H, W, 3] one by one and
yields latent frames [H/ph, W/pw, C], the same bits as `encode` of the whole clip; `build_frame_encoder` makes one
without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megasora.codec.dct import DCTCodec
    from megasora.codec.dct_encoder import DCTEncoder
    from megasora.config import CodecConfig


def build_codec(config: CodecConfig) -> DCTCodec:
    from megasora.codec.dct import DCTCodec

    return DCTCodec(config)


def build_frame_encoder(config: CodecConfig) -> DCTEncoder:
    from megasora.codec.dct_encoder import DCTEncoder

    return DCTEncoder(config)

"""Captions to what the model attends to. An encoder has `encode(captions)` (per caption [S_i, E]), `precomputed`
(whether that is done once, at ingest), `fingerprint`, and `build_embedder`, the trained module that maps [S, E] to
[S, D]."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megasora.config import TextConfig
    from megasora.text.bytes import BytesEncoder
    from megasora.text.pretrained import PretrainedEncoder


def build_text_encoder(config: TextConfig) -> BytesEncoder | PretrainedEncoder:
    if config.name == "bytes":
        from megasora.text.bytes import BytesEncoder

        return BytesEncoder(config)
    from megasora.text.pretrained import PretrainedEncoder

    return PretrainedEncoder(config)

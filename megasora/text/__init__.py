"""Text encoders: map captions to the features that the model's cross-attention reads.

An encoder has `encode(captions)` (a tensor [S_i, E] per caption), `precomputed` (True: encoded once, at ingest),
`fingerprint`, and `build_embedder`, which builds the trained module [S, E] -> [S, D]. A new one is added to
`build_text_encoder`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megasora.config import TextConfig
    from megasora.text.bytes import BytesEncoder
    from megasora.text.pretrained import PretrainedEncoder

    TextEncoder = BytesEncoder | PretrainedEncoder


def build_text_encoder(config: TextConfig) -> TextEncoder:
    if config.name == "bytes":
        from megasora.text.bytes import BytesEncoder

        return BytesEncoder(config)
    from megasora.text.pretrained import PretrainedEncoder

    return PretrainedEncoder(config)

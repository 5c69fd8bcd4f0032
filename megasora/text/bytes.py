"""`bytes`: a caption as words of UTF-8 bytes, embedded by a small module that is trained with the model.

A caption is split at white space, and after every 16 bytes, so that scripts without spaces work. Each word is one text
token: the sum of an embedding for each (position, byte), as in byte-level language models with space-delimited patches
(SpaceByte, arXiv 2404.14408). Nothing has to be downloaded, and no word is out of vocabulary.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from megasora.config import TextConfig
from megasora.errors import MegaSoraError
from megasora.text.embedders import BytesEmbedder

WORD_BYTES = 16
PAD = 256  # the symbol after the end of a word
PAD_BYTE = b"\xff"  # stands for PAD in bytes; it does not occur in UTF-8
SYMBOL_OF_BYTE = np.where(np.arange(256) == PAD_BYTE[0], PAD, np.arange(256))


class BytesEncoder:
    """caption -> int64 [S_i, 16]: the bytes of each word. Not precomputed, because the embedder is trained."""

    precomputed = False
    fingerprint = f"bytes-{WORD_BYTES}"

    def __init__(self, config: TextConfig):
        self.max_tokens = config.max_tokens

    def encode(self, captions: list[str]) -> list[Tensor]:
        """int64 [S_i, 16] per caption, S_i >= 1: an empty caption is one word of PAD.

        Raises MegaSoraError where a caption has more than `text.max_tokens` words; captions are not truncated.
        """
        encoded = [self.words(caption) for caption in captions]
        for caption, words in zip(captions, encoded, strict=True):
            if len(words) > self.max_tokens:
                raise MegaSoraError(
                    f"caption of {len(words)} words ('{caption[:40]}...') is longer than "
                    f"text.max_tokens={self.max_tokens}; shorten the caption or raise text.max_tokens"
                )
        return encoded

    def words(self, caption: str) -> Tensor:
        data = b"".join(map(padded_bytes, caption.lower().split())) or PAD_BYTE * WORD_BYTES
        return torch.from_numpy(SYMBOL_OF_BYTE[np.frombuffer(data, np.uint8)].reshape(-1, WORD_BYTES))

    def build_embedder(
        self, width: int, depth: int, heads: int, backend: str = "auto", deterministic: bool = True
    ) -> nn.Module:
        """`backend`, `deterministic`: of attention."""
        return BytesEmbedder(WORD_BYTES, PAD + 1, width, depth, heads, backend, deterministic)


@lru_cache(maxsize=8192)  # a few words make up most of all captions
def padded_bytes(word: str) -> bytes:
    """The UTF-8 bytes of a word, padded to a multiple of 16."""
    data = word.encode("utf-8")
    return data.ljust(-(-len(data) // WORD_BYTES) * WORD_BYTES, PAD_BYTE)

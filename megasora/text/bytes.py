"""`bytes`: captions as words of UTF-8 bytes, read by a small encoder that is trained with the model.

A caption is split at white space (and every 16 bytes, so that scripts without spaces work); each word becomes one text
token, the sum of an embedding for each (place, byte), as in the space-delimited patches of byte-level language models
(SpaceByte, arXiv 2404.14408). Nothing has to be downloaded, and no word is unknown.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from megasora.config import TextConfig
from megasora.errors import MegaSoraError
from megasora.kernels.attention import Segments, attention

WORD_BYTES = 16
PAD = 256  # behind the end of a word
NO_BYTE = b"\xff"  # UTF-8 has none: it stands for PAD while a caption is bytes
SYMBOLS = np.where(np.arange(256) == NO_BYTE[0], PAD, np.arange(256))


class BytesEncoder:
    """caption -> int64 [S_i, 16]: bytes of each word. Nothing is computed ahead: the embedder is trained."""

    precomputed = False
    fingerprint = f"bytes-{WORD_BYTES}"

    def __init__(self, config: TextConfig):
        self.max_tokens = config.max_tokens

    def encode(self, captions: list[str]) -> list[Tensor]:
        """At least one token a caption: an empty one is one word without bytes.

        Raises MegaSoraError where a caption has more than `text.max_tokens` words; none is cut.
        """
        words = [self.words(caption) for caption in captions]
        for caption, tokens in zip(captions, words, strict=True):
            if len(tokens) > self.max_tokens:
                raise MegaSoraError(
                    f"caption of {len(tokens)} words ('{caption[:40]}...') is longer than "
                    f"text.max_tokens={self.max_tokens}; shorten the caption or raise text.max_tokens"
                )
        return words

    def words(self, caption: str) -> Tensor:
        data = b"".join(map(filled, caption.lower().split())) or NO_BYTE * WORD_BYTES
        return torch.from_numpy(SYMBOLS[np.frombuffer(data, np.uint8)].reshape(-1, WORD_BYTES))

    def build_embedder(self, width: int, depth: int, heads: int) -> nn.Module:
        return BytesEmbedder(width, depth, heads)


@lru_cache(maxsize=8192)  # few words are most of what captions say
def filled(word: str) -> bytes:
    """UTF-8, filled up to whole tokens."""
    data = word.encode("utf-8")
    return data.ljust(-(-len(data) // WORD_BYTES) * WORD_BYTES, NO_BYTE)


class BytesEmbedder(nn.Module):
    """int64 [S, 16] -> [S, D]: words by themselves, then `depth` blocks of attention inside each caption."""

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.byte = nn.Embedding(WORD_BYTES * (PAD + 1), width)
        self.word = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.place = nn.Embedding(512, width)  # of the word in its caption; later words share the last
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, words_SB: Tensor, cu_text: Tensor) -> Tensor:
        length, device = len(words_SB), words_SB.device
        slots = torch.arange(WORD_BYTES, device=device) * (PAD + 1)
        x_SD = self.byte(words_SB + slots).sum(1)
        starts = torch.repeat_interleave(cu_text[:-1].long(), cu_text.diff().long()).to(device)
        place = (torch.arange(length, device=device) - starts).clamp_max(self.place.num_embeddings - 1)
        x_SD = self.word(x_SD) + self.place(place)
        segments = Segments.from_cu_seqlens(cu_text, cu_text, length, device)
        for block in self.blocks:
            x_SD = block(x_SD, segments)
        return self.norm(x_SD)


class TextBlock(nn.Module):
    """A plain pre-norm transformer block inside each caption."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_SD: Tensor, segments: Segments) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x_SD)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        x_SD = x_SD + self.out(attention(q, k, v, segments).flatten(-2))
        return x_SD + self.mlp(self.norm_mlp(x_SD))

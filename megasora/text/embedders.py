"""Text embedders: small modules, trained with the model, that map encoded captions to its width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasora.kernels.attention import Segments, attention

MAX_POSITIONS = 512  # of words in a caption that have an embedding of their own


class TextBlock(nn.Module):
    """A pre-norm transformer block; the tokens of each caption attend to each other."""

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


class BytesEmbedder(nn.Module):
    """Words as symbols, int64 [S, W], -> [S, D]: an MLP on each word, then `depth` TextBlocks."""

    def __init__(self, word_bytes: int, num_symbols: int, width: int, depth: int, heads: int):
        """`word_bytes`: W, symbols per word; `num_symbols`: values of a symbol."""
        super().__init__()
        self.num_symbols = num_symbols
        self.byte = nn.Embedding(word_bytes * num_symbols, width)  # one table per position in the word
        self.word = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.place = nn.Embedding(MAX_POSITIONS, width)  # of the word in its caption; later words share the last
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, words_SW: Tensor, cu_text: Tensor) -> Tensor:
        length, device = len(words_SW), words_SW.device
        tables = torch.arange(words_SW.shape[1], device=device) * self.num_symbols
        x_SD = self.byte(words_SW + tables).sum(1)
        starts = torch.repeat_interleave(cu_text[:-1].long(), cu_text.diff().long()).to(device)
        position = (torch.arange(length, device=device) - starts).clamp_max(self.place.num_embeddings - 1)
        x_SD = self.word(x_SD) + self.place(position)
        segments = Segments.from_cu_seqlens(cu_text, cu_text, length, device)
        for block in self.blocks:
            x_SD = block(x_SD, segments)
        return self.norm(x_SD)


class FeatureEmbedder(nn.Module):
    """Features [S, E] -> [S, D]: an MLP (as in Wan), then `depth` TextBlocks, which help causal encoders most (the
    token refiner of HunyuanVideo, arXiv 2412.03603)."""

    def __init__(self, text_dim: int, width: int, depth: int, heads: int):
        """`text_dim`: E."""
        super().__init__()
        self.up, self.down = nn.Linear(text_dim, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width) if depth else nn.Identity()

    def forward(self, text_SE: Tensor, cu_text: Tensor) -> Tensor:
        x_SD = self.down(F.gelu(self.up(text_SE.to(self.up.weight.dtype)), approximate="tanh"))
        segments = Segments.from_cu_seqlens(cu_text, cu_text, len(x_SD), x_SD.device)
        for block in self.blocks:
            x_SD = block(x_SD, segments)
        return self.norm(x_SD)

"""Text embedders: small modules, trained with the model, that map encoded captions to its width."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasora.kernels.attention import Segments, attention, prepare

MAX_POSITIONS = 512  # of words in a caption that have an embedding of their own


class CaptionPlan(NamedTuple):
    """What an embedder needs of the captions besides their tokens; on the CPU, or moved from there."""

    position_S: Tensor  # int64: of each token in its caption
    segments: Segments  # the tokens of each caption attend to each other


class TextBlock(nn.Module):
    """A pre-norm transformer block; the tokens of each caption attend to each other. `backend`, `deterministic`: as in
    `megasora.kernels.attention.attention`."""

    def __init__(self, width: int, heads: int, backend: str = "auto", deterministic: bool = True):
        super().__init__()
        self.width, self.heads, self.backend, self.deterministic = width, heads, backend, deterministic
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_SD: Tensor, segments: Segments) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x_SD)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        out = attention(q, k, v, segments, backend=self.backend, deterministic=self.deterministic)
        x_SD = x_SD + self.out(out.flatten(-2))
        return x_SD + self.mlp(self.norm_mlp(x_SD))


def plan_captions(cu_text: Tensor, blocks: nn.ModuleList) -> CaptionPlan:
    """`cu_text`: int32 [G + 1], on the CPU. `blocks`: TextBlocks."""
    length = int(cu_text[-1])
    position_S = torch.arange(length) - torch.repeat_interleave(cu_text[:-1].long(), cu_text.diff().long())
    segments = Segments.from_cu_seqlens(cu_text, cu_text, length, "cpu")
    for block in blocks[:1]:  # all are alike
        q = next(block.parameters()).new_empty(0, block.heads, block.width // block.heads)  # see VideoDiT.plan
        prepare(segments, q, block.backend, block.deterministic)
    return CaptionPlan(position_S, segments)


class BytesEmbedder(nn.Module):
    """Words as symbols, int64 [S, W], -> [S, D]: an MLP on each word, then `depth` TextBlocks."""

    def __init__(
        self, word_bytes: int, num_symbols: int, width: int, depth: int, heads: int, backend: str = "auto",
        deterministic: bool = True,
    ):  # fmt: skip
        """`word_bytes`: W, symbols per word; `num_symbols`: values of a symbol; the rest as of TextBlock."""
        super().__init__()
        self.num_symbols = num_symbols
        self.byte = nn.Embedding(word_bytes * num_symbols, width)  # one table per position in the word
        self.word = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.place = nn.Embedding(MAX_POSITIONS, width)  # of the word in its caption; later words share the last
        self.blocks = nn.ModuleList(TextBlock(width, heads, backend, deterministic) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def plan(self, cu_text: Tensor) -> CaptionPlan:
        """For `forward`, on the CPU. `cu_text`: int32 [G + 1], first text token of each caption, then their number."""
        return plan_captions(cu_text, self.blocks)

    def forward(self, words_SW: Tensor, plan: CaptionPlan) -> Tensor:
        tables = torch.arange(words_SW.shape[1], device=words_SW.device) * self.num_symbols
        x_SD = self.byte(words_SW + tables).sum(1)
        x_SD = self.word(x_SD) + self.place(plan.position_S.clamp_max(self.place.num_embeddings - 1))
        for block in self.blocks:
            x_SD = block(x_SD, plan.segments)
        return self.norm(x_SD)


class FeatureEmbedder(nn.Module):
    """Features [S, E] -> [S, D]: an MLP (as in Wan), then `depth` TextBlocks, which help causal encoders most (the
    token refiner of HunyuanVideo, arXiv 2412.03603)."""

    def __init__(
        self, text_dim: int, width: int, depth: int, heads: int, backend: str = "auto", deterministic: bool = True
    ):
        """`text_dim`: E; the rest as of TextBlock."""
        super().__init__()
        self.up, self.down = nn.Linear(text_dim, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(TextBlock(width, heads, backend, deterministic) for _ in range(depth))
        self.norm = nn.LayerNorm(width) if depth else nn.Identity()

    def plan(self, cu_text: Tensor) -> CaptionPlan:
        """As of BytesEmbedder."""
        return plan_captions(cu_text, self.blocks)

    def forward(self, text_SE: Tensor, plan: CaptionPlan) -> Tensor:
        x_SD = self.down(F.gelu(self.up(text_SE.to(self.up.weight.dtype)), approximate="tanh"))
        for block in self.blocks:
            x_SD = block(x_SD, plan.segments)
        return self.norm(x_SD)

"""Self-attention inside each segment, and cross-attention from a segment's tokens to its caption.

Both own an inner callable `(q [Lq,N,K], k [Lk,N,K], v, segments, kept) -> [Lq,N,K]`. It is the place where another
backend, or a context-parallel ring, is put in; the projections around it do not change. N is what the projections give:
all heads, or those of one tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from megasora.config import ModelConfig
from megasora.kernels.attention import Segments, attention
from megasora.kernels.qk_norm_rope3d import qk_norm_rope3d
from megasora.kernels.rms_norm import rms_norm
from megasora.kernels.rope3d import Rope, rope3d

Inner = Callable[..., Tensor]
NORM_EPS = 1e-6


class HeadNorm(nn.Module):
    """RMSNorm of each head's K numbers, at least fp32 inside (QK-norm, arXiv 2302.05442)."""

    def __init__(self, head_dim: int, kernels: str):
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x_LNK: Tensor) -> Tensor:
        return rms_norm(x_LNK, self.weight, NORM_EPS, via=self.kernels)


class WidthNorm(nn.Module):
    """RMSNorm of all heads' numbers together (Wan, arXiv 2503.20314), at least fp32 inside.

    Where ranks hold a part of the heads each, `sum_over_heads` adds up their squares [L, 1].
    """

    def __init__(self, width: int, kernels: str):
        super().__init__()
        self.width, self.kernels = width, kernels
        self.weight = nn.Parameter(torch.ones(width))
        self.sum_over_heads: Callable[[Tensor], Tensor] | None = None

    def forward(self, x_LNK: Tensor) -> Tensor:
        whole = self.width, self.sum_over_heads
        return rms_norm(x_LNK.flatten(-2), self.weight, NORM_EPS, *whole, via=self.kernels).view(x_LNK.shape)


class NoNorm(nn.Module):
    weight = None

    def forward(self, x_LNK: Tensor) -> Tensor:
        return x_LNK


def build_qk_norm(config: ModelConfig) -> nn.Module:
    if config.qk_norm == "head":
        return HeadNorm(config.width // config.heads, config.kernels)
    return WidthNorm(config.width, config.kernels) if config.qk_norm == "width" else NoNorm()


def build_inner(config: ModelConfig) -> Inner:
    return partial(attention, backend=config.attention, deterministic=config.deterministic)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.qk_norm, self.kernels = config.width // config.heads, config.qk_norm, config.kernels
        self.inner = build_inner(config)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_norm = build_qk_norm(config)
        self.k_norm = build_qk_norm(config)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x_LD: Tensor, segments: Segments, rope: Rope | None, kept: list | None = None) -> Tensor:
        q, k, v = self.normed_and_turned(self.qkv(x_LD).unflatten(-1, (3, -1, self.head_dim)), rope)
        return self.out(self.inner(q, k, v, segments, kept).flatten(-2))

    def normed_and_turned(self, qkv_L3NK: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(self.q_norm, WidthNorm) and self.q_norm.sum_over_heads is not None:  # ranks have to speak first
            q, k, v = qkv_L3NK.unbind(1)
            q, k = self.q_norm(q), self.k_norm(k)
            return (q, k, v) if rope is None else (rope3d(q, rope, self.kernels), rope3d(k, rope, self.kernels), v)
        weights = self.q_norm.weight, self.k_norm.weight
        return qk_norm_rope3d(qkv_L3NK, *weights, rope, NORM_EPS, self.qk_norm, self.kernels)


class CrossAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.inner = config.width // config.heads, build_inner(config)
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.q_norm = build_qk_norm(config)
        self.k_norm = build_qk_norm(config)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x_LD: Tensor, text_SD: Tensor, segments: Segments) -> Tensor:
        q = self.q_norm(self.q(x_LD).unflatten(-1, (-1, self.head_dim)))
        k, v = self.kv(text_SD).unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
        return self.out(self.inner(q, self.k_norm(k), v, segments, None).flatten(-2))

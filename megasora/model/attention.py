"""Self-attention inside each segment, and cross-attention from a segment's tokens to its caption.

Both own an inner callable `(q [Lq,N,K], k [Lk,N,K], v, segments, kept) -> [Lq,N,K]`. It is the place where another
backend, or a context-parallel ring, is put in; the projections around it do not change. N is what the projections give:
all heads, or those of one tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megasora.kernels.attention import Segments, attention
from megasora.kernels.rms_norm import rms_norm
from megasora.model.rope import apply_rope

Inner = Callable[..., Tensor]
NORM_EPS = 1e-6


class HeadNorm(nn.Module):
    """RMSNorm of each head's K numbers, at least fp32 inside (QK-norm, arXiv 2302.05442)."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x_LNK: Tensor) -> Tensor:
        return rms_norm(x_LNK, self.weight, NORM_EPS)


class WidthNorm(nn.Module):
    """RMSNorm of all heads' numbers together (Wan, arXiv 2503.20314), at least fp32 inside.

    Where ranks hold a part of the heads each, `sum_over_heads` adds up their squares [L, 1].
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width))
        self.sum_over_heads: Callable[[Tensor], Tensor] | None = None

    def forward(self, x_LNK: Tensor) -> Tensor:
        normed_LD = rms_norm(x_LNK.flatten(-2), self.weight, NORM_EPS, self.width, self.sum_over_heads)
        return normed_LD.view(x_LNK.shape)


def build_qk_norm(kind: str, width: int, heads: int) -> nn.Module:
    """`kind`: head, width or none, as in model.qk_norm."""
    return {"head": lambda: HeadNorm(width // heads), "width": lambda: WidthNorm(width), "none": nn.Identity}[kind]()


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: str, inner: Inner = attention):
        super().__init__()
        self.head_dim, self.inner = width // heads, inner
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = build_qk_norm(qk_norm, width, heads)
        self.k_norm = build_qk_norm(qk_norm, width, heads)
        self.out = nn.Linear(width, width)

    def forward(
        self, x_LD: Tensor, segments: Segments, rope: tuple[Tensor, Tensor] | None, kept: list | None = None
    ) -> Tensor:
        q, k, v = self.qkv(x_LD).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        return self.out(self.inner(q, k, v, segments, kept).flatten(-2))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: str, inner: Inner = attention):
        super().__init__()
        self.head_dim, self.inner = width // heads, inner
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm = build_qk_norm(qk_norm, width, heads)
        self.k_norm = build_qk_norm(qk_norm, width, heads)
        self.out = nn.Linear(width, width)

    def forward(self, x_LD: Tensor, text_SD: Tensor, segments: Segments) -> Tensor:
        q = self.q_norm(self.q(x_LD).unflatten(-1, (-1, self.head_dim)))
        k, v = self.kv(text_SD).unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
        return self.out(self.inner(q, self.k_norm(k), v, segments, None).flatten(-2))

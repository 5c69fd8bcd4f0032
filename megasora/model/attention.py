"""Self-attention inside each segment, and cross-attention from a segment's tokens to its caption.

Both own an inner callable `(q [Lq,N,K], k [Lk,N,K], v, segments) -> [Lq,N,K]`. It is the place where another backend,
or a context-parallel ring, is put in; the projections around it do not change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasora.kernels.attention import Segments, attention
from megasora.model.rope import apply_rope

Inner = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
NORM_EPS = 1e-6


class HeadNorm(nn.Module):
    """RMSNorm of each head's K numbers, at least fp32 inside (QK-norm, arXiv 2302.05442)."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x_LNK: Tensor) -> Tensor:
        dtype = torch.promote_types(x_LNK.dtype, torch.float32)
        return F.rms_norm(x_LNK.to(dtype), self.weight.shape, self.weight.to(dtype), NORM_EPS).type_as(x_LNK)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool, inner: Inner = attention):
        super().__init__()
        self.heads, self.inner = heads, inner
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, x_LD: Tensor, segments: Segments, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self.qkv(x_LD).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        return self.out(self.inner(q, k, v, segments).flatten(-2))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool, inner: Inner = attention):
        super().__init__()
        self.heads, self.inner = heads, inner
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, x_LD: Tensor, text_SD: Tensor, segments: Segments) -> Tensor:
        q = self.q_norm(self.q(x_LD).unflatten(-1, (self.heads, -1)))
        k, v = self.kv(text_SD).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return self.out(self.inner(q, self.k_norm(k), v, segments).flatten(-2))

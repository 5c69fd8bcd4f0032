"""Self-attention within each segment, and cross-attention from a segment's tokens to its caption.

Both call `inner(q [Lq, N, K], k [Lk, N, K], v [Lk, N, K], segments, saved_output) -> [Lq, N, K]`. This attribute can be
replaced, e.g. by context-parallel attention; the projections around it stay. N is the number of heads that the
projections give: all heads, or those of one tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from megasora.config import ModelConfig
from megasora.kernels.attention import Segments, attention
from megasora.kernels.linear import Linear
from megasora.kernels.qk_norm_rope3d import qk_norm_rope3d
from megasora.kernels.rms_norm import rms_norm
from megasora.kernels.rope3d import Rope, rope3d

Inner = Callable[..., Tensor]
NORM_EPS = 1e-6


class PerHeadNorm(nn.Module):
    """RMSNorm over the K features of each head, computed in at least fp32 (QK-norm, arXiv 2302.05442)."""

    def __init__(self, head_dim: int, kernel_backend: str):
        super().__init__()
        self.kernel_backend = kernel_backend
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x_LNK: Tensor) -> Tensor:
        return rms_norm(x_LNK, self.weight, NORM_EPS, backend=self.kernel_backend)


class AcrossHeadsNorm(nn.Module):
    """RMSNorm over the features of all heads together (Wan, arXiv 2503.20314), computed in at least fp32.

    Under tensor parallelism a rank has some of the heads; `sum_over_heads` then sums their squares [L, 1] over ranks.
    """

    def __init__(self, width: int, kernel_backend: str):
        super().__init__()
        self.width, self.kernel_backend = width, kernel_backend
        self.weight = nn.Parameter(torch.ones(width))
        self.sum_over_heads: Callable[[Tensor], Tensor] | None = None

    def forward(self, x_LNK: Tensor) -> Tensor:
        all_heads = self.width, self.sum_over_heads
        return rms_norm(x_LNK.flatten(-2), self.weight, NORM_EPS, *all_heads, backend=self.kernel_backend).view(
            x_LNK.shape
        )


class NoNorm(nn.Module):
    """The identity, for model.qk_norm=none."""

    weight = None

    def forward(self, x_LNK: Tensor) -> Tensor:
        return x_LNK


def build_qk_norm(config: ModelConfig) -> nn.Module:
    if config.qk_norm == "per_head":
        return PerHeadNorm(config.head_dim, config.kernel_backend)
    return AcrossHeadsNorm(config.width, config.kernel_backend) if config.qk_norm == "across_heads" else NoNorm()


def build_inner(config: ModelConfig) -> Inner:
    return partial(attention, backend=config.attention_backend, deterministic=config.deterministic)


class SelfAttention(nn.Module):
    """[L, D] -> [L, D]: each token attends to the tokens of its own segment."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.qk_norm, self.kernel_backend = config.head_dim, config.qk_norm, config.kernel_backend
        self.inner = build_inner(config)
        # whether the kernel of the norm computes the gradient of the bias
        self.bias_with_norm = config.qk_norm != "across_heads"
        self.qkv = Linear(config.width, 3 * config.width, skip_bias_grad=self.bias_with_norm)
        self.q_norm = build_qk_norm(config)
        self.k_norm = build_qk_norm(config)
        self.out = Linear(config.width, config.width)

    def forward(self, x_LD: Tensor, segments: Segments, rope: Rope | None, saved_output: list | None = None) -> Tensor:
        qkv, bias = self.qkv(x_LD) if self.bias_with_norm else (self.qkv(x_LD), None)
        q, k, v = self.apply_qk_norm_and_rope(qkv.unflatten(-1, (3, -1, self.head_dim)), bias, rope)
        return self.out(self.inner(q, k, v, segments, saved_output).flatten(-2))

    def apply_qk_norm_and_rope(
        self, qkv_L3NK: Tensor, bias: Tensor | None, rope: Rope | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(self.q_norm, AcrossHeadsNorm) and self.q_norm.sum_over_heads is not None:  # needs an all-reduce
            q, k, v = qkv_L3NK.unbind(1)
            q, k = self.q_norm(q), self.k_norm(k)
            return (
                (q, k, v)
                if rope is None
                else (rope3d(q, rope, self.kernel_backend), rope3d(k, rope, self.kernel_backend), v)
            )
        weights = self.q_norm.weight, self.k_norm.weight
        return qk_norm_rope3d(qkv_L3NK, *weights, rope, NORM_EPS, self.qk_norm, self.kernel_backend, bias)


class CrossAttention(nn.Module):
    """[L, D], text [S, D] -> [L, D]: each token attends to the text tokens of its own segment's caption."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.inner = config.head_dim, build_inner(config)
        self.q = Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.q_norm = build_qk_norm(config)
        self.k_norm = build_qk_norm(config)
        self.out = Linear(config.width, config.width)

    def forward(self, x_LD: Tensor, text_SD: Tensor, segments: Segments) -> Tensor:
        q = self.q_norm(self.q(x_LD).unflatten(-1, (-1, self.head_dim)))
        k, v = self.kv(text_SD).unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
        return self.out(self.inner(q, self.k_norm(k), v, segments, None).flatten(-2))

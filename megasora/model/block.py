"""One block of the transformer: self-attention, cross-attention to the caption, MLP; adaLN-Zero around the first and
the last (DiT, arXiv 2212.09748).

Shift, scale and gate are computed once a row and meet the row's tokens inside kernels alone: spread over the tokens,
each would be as large as these. Between two branches, one kernel adds the first to the stream and norms the sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasora.config import ModelConfig
from megasora.kernels.adaln_modulate import adaln_modulate
from megasora.kernels.attention import Segments
from megasora.kernels.gated_add import gated_add
from megasora.kernels.gated_residual_adaln import gated_residual_adaln
from megasora.kernels.rope3d import Rope
from megasora.kernels.rows import Rows
from megasora.model.attention import NORM_EPS, CrossAttention, SelfAttention


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class RowModulation(nn.Module):
    """The conditioning of each row, [R, D] -> `count` vectors [R, D].

    `block`: a projection of its own (DiT). `shared`: the model projects once for all blocks, a block only adds
    its table (PixArt-alpha, arXiv 2310.00426; Wan).
    """

    def __init__(self, width: int, count: int, shared: bool):
        super().__init__()
        self.count = count
        self.proj = None if shared else nn.Linear(width, count * width)
        self.table = nn.Parameter(torch.zeros(count, width)) if shared else None

    def forward(self, cond_RD: Tensor, shared_RCD: Tensor | None) -> tuple[Tensor, ...]:
        if self.proj is not None:
            return self.proj(F.silu(cond_RD)).unflatten(-1, (self.count, -1)).unbind(-2)
        return (shared_RCD + self.table).unbind(-2)


class ResidualNorm(nn.Module):
    """x + gate branch, and its LayerNorm with a weight and a bias: both [L, D]."""

    def __init__(self, width: int, kernels: str):
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        affine = {"weight_D": self.weight, "bias_D": self.bias}
        return gated_residual_adaln(x_LD, branch_LD, gate_RD, None, None, rows, NORM_EPS, **affine, via=self.kernels)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kernels = config.kernels
        self.modulation = RowModulation(config.width, 6, config.modulation == "shared")
        self.attention = SelfAttention(config)
        self.cross_norm = ResidualNorm(config.width, config.kernels)
        self.cross = CrossAttention(config)
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio))

    def forward(
        self,
        x_LD: Tensor,
        cond_RD: Tensor,
        shared_RCD: Tensor | None,
        text_SD: Tensor,
        rows: Rows,
        rope: Rope,
        segments: Segments,
        text_segments: Segments,
        kept: list | None = None,
    ) -> Tensor:
        """`kept`: where self-attention leaves its output for a second run of this forward, see kernels.attention."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(cond_RD, shared_RCD)
        h_LD = adaln_modulate(x_LD, shift_a, scale_a, rows, NORM_EPS, via=self.kernels)
        x_LD, h_LD = self.cross_norm(x_LD, self.attention(h_LD, segments, rope, kept), gate_a, rows)
        branch_LD = self.cross(h_LD, text_SD, text_segments)
        x_LD, h_LD = gated_residual_adaln(x_LD, branch_LD, None, shift_m, scale_m, rows, NORM_EPS, via=self.kernels)
        return gated_add(x_LD, self.mlp(h_LD), gate_m, rows, via=self.kernels)

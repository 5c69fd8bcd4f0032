"""One block of the transformer: self-attention, cross-attention to the caption, MLP; adaLN-Zero around the first and
the last (DiT, arXiv 2212.09748).

Shift, scale and gate are computed once a row and meet the row's tokens in kernels.adaln_modulate alone: spread over
the tokens, each would be as large as these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasora.kernels.adaln_modulate import adaln_modulate, gated_add
from megasora.kernels.attention import Segments
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


def modulate(x_LD: Tensor, shift_RD: Tensor, scale_RD: Tensor, row_L: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, with the scale and shift of each token's row."""
    return adaln_modulate(x_LD, shift_RD, scale_RD, row_L, NORM_EPS)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_hidden: int, qk_norm: str, shared_modulation: bool):
        super().__init__()
        self.modulation = RowModulation(width, 6, shared_modulation)
        self.attention = SelfAttention(width, heads, qk_norm)
        self.cross_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross = CrossAttention(width, heads, qk_norm)
        self.mlp = MLP(width, mlp_hidden)

    def forward(
        self,
        x_LD: Tensor,
        cond_RD: Tensor,
        shared_RCD: Tensor | None,
        text_SD: Tensor,
        row_L: Tensor,
        rope: tuple[Tensor, Tensor],
        segments: Segments,
        text_segments: Segments,
        kept: list | None = None,
    ) -> Tensor:
        """`kept`: where self-attention leaves its output for a second run of this forward, see kernels.attention."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(cond_RD, shared_RCD)
        branch = self.attention(modulate(x_LD, shift_a, scale_a, row_L), segments, rope, kept)
        x_LD = gated_add(x_LD, branch, gate_a, row_L)
        x_LD = x_LD + self.cross(self.cross_norm(x_LD), text_SD, text_segments)
        branch = self.mlp(modulate(x_LD, shift_m, scale_m, row_L))
        return gated_add(x_LD, branch, gate_m, row_L)

"""One block of the transformer: self-attention, cross-attention to the caption, MLP; adaLN-Zero on the first and the
last branch (DiT, arXiv 2212.09748).

Shift, scale and gate are computed once per row and broadcast to the row's tokens inside kernels only: expanded, each
would be as large as the hidden states. Between two branches, one kernel adds the first to the residual stream and
normalizes the sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megasora.config import ModelConfig
from megasora.kernels.adaln import adaln_modulate, gated_residual_adaln
from megasora.kernels.attention import Segments
from megasora.kernels.gated_add import gated_add
from megasora.kernels.linear import Linear
from megasora.kernels.rope3d import Rope
from megasora.kernels.rows import Rows
from megasora.model.attention import NORM_EPS, CrossAttention, SelfAttention


class BlockInputs(NamedTuple):
    """What all blocks need of a pack besides its hidden states; computed once per forward pass."""

    cond_RD: Tensor
    shared_RCD: Tensor | None  # shift, scale and gate of both branches, C = 6, with model.modulation=shared
    text_SD: Tensor
    rows: Rows
    rope: Rope
    segments: Segments
    text_segments: Segments


class MLP(nn.Module):
    """Two linear layers with a GELU between them, [L, D] -> [L, D]. The second applies bias and GELU to its input, and
    saves it without them."""

    def __init__(self, width: int, hidden: int, kernel_backend: str):
        super().__init__()
        self.kernel_backend = kernel_backend
        self.up = Linear(width, hidden, skip_bias_add=True)
        self.down = Linear(hidden, width)

    def forward(self, x_LD: Tensor) -> Tensor:
        return self.down(*self.up(x_LD), self.kernel_backend)


class RowModulation(nn.Module):
    """The conditioning of each row, [R, D] -> `count` vectors [R, D].

    Not `shared`: by its own projection (DiT). `shared`: the model projects once for all blocks, and this module adds
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
    """Returns x + gate * branch and the LayerNorm of this sum, with weight and bias; both [L, D]."""

    def __init__(self, width: int, kernel_backend: str):
        super().__init__()
        self.kernel_backend = kernel_backend
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        affine = {"weight_D": self.weight, "bias_D": self.bias}
        return gated_residual_adaln(
            x_LD, branch_LD, gate_RD, None, None, rows, NORM_EPS, **affine, backend=self.kernel_backend
        )


class Block(nn.Module):
    """A transformer block: self-attention, cross-attention and MLP on the hidden states [L, D]. Call it through
    `run_block`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kernel_backend = config.kernel_backend
        self.modulation = RowModulation(config.width, 6, config.modulation == "shared")
        self.attention = SelfAttention(config)
        self.cross_norm = ResidualNorm(config.width, config.kernel_backend)
        self.cross = CrossAttention(config)
        self.mlp = MLP(config.width, config.mlp_hidden, config.kernel_backend)

    def forward(self, x_LD: Tensor, inputs: BlockInputs, saved_output: list | None = None) -> Tensor:
        """Hidden states [L, D] -> [L, D]. `saved_output`: see megasora.kernels.attention.attention."""
        rows, rope = inputs.rows, inputs.rope
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(inputs.cond_RD, inputs.shared_RCD)
        h_LD = adaln_modulate(x_LD, shift_a, scale_a, rows, NORM_EPS, backend=self.kernel_backend)
        x_LD, h_LD = self.cross_norm(x_LD, self.attention(h_LD, inputs.segments, rope, saved_output), gate_a, rows)
        branch_LD = self.cross(h_LD, inputs.text_SD, inputs.text_segments)
        x_LD, h_LD = gated_residual_adaln(
            x_LD, branch_LD, None, shift_m, scale_m, rows, NORM_EPS, backend=self.kernel_backend
        )
        return gated_add(x_LD, self.mlp(h_LD), gate_m, rows, backend=self.kernel_backend)


def compile_block(block: Block, compiler: str = "inductor") -> None:
    """torch.compile of a block, in place. Its weights keep their names, and all blocks share the compiled code.

    Self- and cross-attention are not compiled, so a block is several compiled parts. Sizes that differ between packs
    (rows, text tokens) become variables at the second pack; a pack with one row or one text token has its own version.
    `compiler`: a backend of torch.compile.
    """
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")  # rope3d
    block.attention.inner = torch.compiler.disable(block.attention.inner)  # context-parallel attention communicates
    block.compile(backend=compiler)


def run_block(block: Callable[..., Tensor], x_LD: Tensor, inputs: BlockInputs, recompute: str) -> Tensor:
    """The output of `block`. `recompute`: none | full | keep_attention, what its backward pass computes again."""
    if recompute == "none":
        return block(x_LD, inputs)
    saved_output = [] if recompute == "keep_attention" else None
    return checkpoint(block, x_LD, inputs, saved_output, use_reentrant=False, preserve_rng_state=False)

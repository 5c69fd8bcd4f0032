"""VideoDiT: packed noised patches in, the predicted velocity of every patch out.

    patches [L, P] -> tokens [L, D] -> depth blocks -> [L, P]

Each row (run of tokens with one noise level) has a conditioning vector: timestep + native size + pooled caption. Each
clip attends to itself and to its own caption; where a token is, only the rotary embedding of its coords tells.

A pipeline stage is this same model with some of its blocks: `keep_stage` takes the others away. What conditions the
blocks stays on every stage and is computed there from the pack, so only hidden tokens pass from stage to stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megasora.batch import VideoBatch, owner_of_tokens
from megasora.config import ModelConfig
from megasora.kernels.adaln_modulate import adaln_modulate
from megasora.kernels.attention import Segments
from megasora.kernels.rope3d import Rope
from megasora.kernels.rows import Rows
from megasora.model.attention import NORM_EPS
from megasora.model.block import Block, RowModulation
from megasora.model.embed import NativeEmbedding, TimestepEmbedding
from megasora.model.init import initial_value


def segments_of(batch: VideoBatch) -> Segments:
    """Each segment attends to itself."""
    return Segments.from_cu_seqlens(
        batch.cu_segments, batch.cu_segments, len(batch.patches_LP), batch.patches_LP.device
    )


def unchanged(x: Tensor) -> Tensor:
    return x


class VideoDiT(nn.Module):
    """`text` maps the batch's text to tokens [S, D] and is trained with the model; see `megasora.text`.

    Weights have no meaning before `initialise` or `load_state_dict`. Four callables are identities on one process and
    are replaced where ranks share a pack: `segments_of` (who attends to whom), `split_tokens` and `join_tokens` (from
    the pack's tokens to those whose hidden vectors this rank keeps, and back), and `spread_rows` (row vectors that meet
    those tokens without a projection in between, so that nothing else sums their gradient).
    """

    def __init__(self, config: ModelConfig, patch_dim: int, text: nn.Module):
        super().__init__()
        self.config = config
        width, shared = config.width, config.modulation == "shared"
        self.patch_in: nn.Module | None = nn.Linear(patch_dim, width)
        self.first_frame = nn.Parameter(torch.zeros(width))  # a causal codec's first latent frame is of its own kind
        self.timestep = TimestepEmbedding(width)
        self.native = NativeEmbedding(width)
        self.text = text
        self.null_text = nn.Parameter(torch.zeros(width))  # stands for a hidden caption
        self.pooled_text = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width))
        self.shared_modulation = nn.Linear(width, 6 * width) if shared else None
        self.blocks = nn.ModuleDict({str(i): Block(config) for i in range(config.depth)})
        self.final_modulation: nn.Module | None = RowModulation(width, 2, shared)
        self.patch_out: nn.Module | None = nn.Linear(width, patch_dim)
        self.segments_of: Callable[[VideoBatch], Any] = segments_of
        self.split_tokens: Callable[[Tensor], Tensor] = unchanged
        self.join_tokens: Callable[[Tensor], Tensor] = unchanged
        self.spread_rows: Callable[[Tensor], Tensor] = unchanged

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Weights at step 0; see `megasora.model.init`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, seed))

    def keep_stage(self, first_block: int, num_blocks: int) -> None:
        """Leaves blocks `first_block .. first_block + num_blocks - 1`, and an end of the model where they reach it."""
        if first_block > 0:
            self.patch_in, self.first_frame = None, None
        if first_block + num_blocks < self.config.depth:
            self.final_modulation, self.patch_out = None, None
        for i in range(self.config.depth):
            if not first_block <= i < first_block + num_blocks:
                del self.blocks[str(i)]

    def forward(self, batch: VideoBatch, hidden_LD: Tensor | None = None) -> Tensor:
        """Velocity [L, P] of every token, at least fp32; what stands at padding means nothing.

        A stage that lacks the first block is given `hidden_LD` by the stage before it; one that lacks the last block
        returns hidden tokens [L, D].
        """
        device, length = batch.patches_LP.device, len(batch.patches_LP)
        segments = self.segments_of(batch)
        text_segments = Segments.from_cu_seqlens(batch.cu_segments, batch.cu_text, length, device)
        rows = self.rows_of(batch)
        head_dim = self.config.width // self.config.heads
        rope = Rope.build(batch.coords_L3, head_dim, self.config.rope_base, scale=self.config.rope_scale)

        x_LD = self.embed(batch) if self.patch_in is not None else hidden_LD
        text_SD, pooled_GD = self.read_text(batch)
        cond_RD = self.timestep(batch.timesteps_R) + (self.native(batch.native_G4) + pooled_GD)[batch.row_segment_R]
        shared_RCD = None
        if self.shared_modulation is not None:
            shared_RCD = self.shared_modulation(F.silu(cond_RD)).unflatten(-1, (6, -1))

        for number, block in self.blocks.items():
            state = (x_LD, cond_RD, shared_RCD, text_SD, rows, rope, segments, text_segments)
            if self.training and recomputes(int(number), self.config):
                kept = [] if self.config.recompute == "attention" else None
                x_LD = checkpoint(block, *state, kept, use_reentrant=False, preserve_rng_state=False)
            else:
                x_LD = block(*state)
        if self.patch_out is None:
            return x_LD

        shift_RD, scale_RD = self.final_modulation(cond_RD, self.spread_rows(cond_RD)[:, None])
        x_LD = adaln_modulate(x_LD, shift_RD, scale_RD, rows, NORM_EPS, via=self.config.kernels)
        out_LP = self.join_tokens(self.patch_out(x_LD))
        return out_LP.to(torch.promote_types(out_LP.dtype, torch.float32))

    def rows_of(self, batch: VideoBatch) -> Rows:
        """The rows of the tokens whose hidden vectors are here, which are a run of the pack's."""
        here = self.split_tokens(torch.arange(len(batch.patches_LP)))
        cu_rows = (batch.cu_rows.long() - here[0]).clamp(0, len(here))
        return Rows.from_cu_seqlens(cu_rows, len(here), batch.patches_LP.device)

    def embed(self, batch: VideoBatch) -> Tensor:
        x_LD = self.patch_in(self.split_tokens(batch.patches_LP).to(self.patch_in.weight.dtype))
        is_first_L1 = self.split_tokens(batch.coords_L3[:, :1] == 0).to(x_LD.dtype)
        return x_LD + is_first_L1 * self.first_frame

    def read_text(self, batch: VideoBatch) -> tuple[Tensor, Tensor]:
        """Caption tokens [S, D] and their mean by clip [G, D]; a hidden caption is the null token throughout.

        A softmax over copies of one key and value gives that value: a hidden caption acts as one null token whatever
        its length, and hiding it changes no shape.
        """
        text_SD = self.text(batch.text_SE, batch.cu_text)
        clip_S = owner_of_tokens(batch.cu_text, len(text_SD)).to(text_SD.device)
        text_SD = torch.where(batch.drop_text_G[clip_S, None], self.null_text.to(text_SD.dtype), text_SD)
        sums = text_SD.new_zeros(batch.num_segments, text_SD.shape[-1]).index_add(0, clip_S, text_SD)
        lengths = batch.cu_text.diff().clamp_min(1).to(sums.device, sums.dtype)
        return text_SD, self.pooled_text(sums / lengths[:, None])


def recomputes(block: int, config: ModelConfig) -> bool:
    """Whether this block is one of the `recompute_blocks` that recompute, evenly spread over the depth."""
    count = config.recompute_blocks or config.depth
    return config.recompute != "none" and (block + 1) * count // config.depth > block * count // config.depth

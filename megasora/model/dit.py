"""VideoDiT: packed noised patches in, the predicted velocity of every patch out.

    patches [L, P] -> tokens [L, D] -> depth blocks -> [L, P]

Each row (run of tokens with one noise level) has a conditioning vector: timestep + native size + pooled caption. Each
clip attends to itself and to its own caption; where a token is, only the rotary embedding of its coords tells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megasora.batch import VideoBatch, owner_of_tokens
from megasora.config import ModelConfig
from megasora.kernels.attention import Segments
from megasora.model.block import Block, RowModulation, modulate
from megasora.model.embed import NativeEmbedding, TimestepEmbedding
from megasora.model.rope import rope_angles


class VideoDiT(nn.Module):
    """`text` maps the batch's text to tokens [S, D] and is trained with the model; see `megasora.text`."""

    def __init__(self, config: ModelConfig, patch_dim: int, text: nn.Module):
        super().__init__()
        self.config = config
        width, shared = config.width, config.modulation == "shared"
        self.patch_in = nn.Linear(patch_dim, width)
        self.first_frame = nn.Parameter(torch.zeros(width))  # a causal codec's first latent frame is of its own kind
        self.timestep = TimestepEmbedding(width)
        self.native = NativeEmbedding(width)
        self.text = text
        self.null_text = nn.Parameter(torch.zeros(width))  # stands for a hidden caption
        self.pooled_text = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width))
        self.shared_modulation = nn.Linear(width, 6 * width) if shared else None
        self.blocks = nn.ModuleList(
            Block(width, config.heads, int(width * config.mlp_ratio), config.qk_norm == "head", shared)
            for _ in range(config.depth)
        )
        self.final_modulation = RowModulation(width, 2, shared=False)
        self.patch_out = nn.Linear(width, patch_dim)
        self.initialise()

    def initialise(self) -> None:
        """Xavier linears; modulation and output start at zero: each block starts as the identity (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for mlp in (self.timestep.mlp, self.native.mlp):
            nn.init.normal_(mlp[0].weight, std=0.02)
            nn.init.normal_(mlp[2].weight, std=0.02)
        for vector in (self.null_text, self.first_frame):
            nn.init.normal_(vector, std=0.02)
        zero = [self.final_modulation.proj, self.patch_out, *(b.cross.out for b in self.blocks)]
        zero += [m for m in (self.shared_modulation, *(b.modulation.proj for b in self.blocks)) if m is not None]
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, batch: VideoBatch) -> Tensor:
        """Velocity [L, P] of every token, at least fp32; what stands at padding means nothing."""
        device, length = batch.patches_LP.device, len(batch.patches_LP)
        segments = Segments.from_cu_seqlens(batch.cu_segments, batch.cu_segments, length, device)
        text_segments = Segments.from_cu_seqlens(batch.cu_segments, batch.cu_text, length, device)
        row_L = owner_of_tokens(batch.cu_rows, length).to(device)
        angles = rope_angles(batch.coords_L3, self.config.width // self.config.heads, self.config.rope_base)[:, None]
        rope = angles.cos(), angles.sin()

        x_LD = self.patch_in(batch.patches_LP.to(self.patch_in.weight.dtype))
        is_first_L1 = (batch.coords_L3[:, :1] == 0).to(x_LD.dtype)
        x_LD = x_LD + is_first_L1 * self.first_frame
        text_SD, pooled_GD = self.read_text(batch)
        cond_RD = self.timestep(batch.timesteps_R) + (self.native(batch.native_G4) + pooled_GD)[batch.row_segment_R]
        shared_RCD = None
        if self.shared_modulation is not None:
            shared_RCD = self.shared_modulation(F.silu(cond_RD)).unflatten(-1, (6, -1))

        for block in self.blocks:
            state = (x_LD, cond_RD, shared_RCD, text_SD, row_L, rope, segments, text_segments)
            recompute = self.config.recompute == "full" and self.training
            x_LD = checkpoint(block, *state, use_reentrant=False) if recompute else block(*state)

        shift_RD, scale_RD = self.final_modulation(cond_RD, None)
        out_LP = self.patch_out(modulate(x_LD, shift_RD, scale_RD, row_L))
        return out_LP.to(torch.promote_types(out_LP.dtype, torch.float32))

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

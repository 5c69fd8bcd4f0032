"""VideoDiT: predicts the velocity of every patch of a noised pack.

    patches [L, P] -> tokens [L, D] -> depth blocks -> [L, P]

Each row (consecutive tokens with one timestep) has a conditioning vector: timestep + native size + pooled caption, or
with model.conditioning=timestep the timestep alone. Each clip attends to itself and to its own caption; the only
position information is the rotary embedding of the coords.

A pipeline stage is this model without some of its blocks, which `keep_stage` deletes. The conditioning modules stay on
every stage and compute from the pack there, so only hidden states are sent from stage to stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasora.batch import VideoBatch, segment_ids
from megasora.config import ModelConfig
from megasora.device_transfer import to_device
from megasora.kernels.adaln import adaln_modulate
from megasora.kernels.attention import Segments, prepare
from megasora.kernels.rope3d import Rope
from megasora.kernels.rope_scaling import RopeScaling
from megasora.kernels.rows import Rows
from megasora.model.attention import NORM_EPS
from megasora.model.block import Block, BlockInputs, RowModulation, run_block
from megasora.model.embed import NativeEmbedding, TimestepEmbedding
from megasora.model.init import DrawnWeights


@dataclass(frozen=True)
class PackPlan:
    """What the blocks need of a pack besides its features and weights, computed from the offsets on the CPU."""

    rows: Rows  # of the tokens whose hidden vectors are on this rank
    rope: Rope
    segments: Any  # of self-attention
    text_segments: Segments  # of cross-attention
    clip_S: Tensor  # int64: the clip of each text token
    text_lengths_G: Tensor  # int64: text tokens of each caption
    text: Any  # of the text embedder


def build_segments(batch: VideoBatch, q: Tensor, backend: str, deterministic: bool) -> Segments:
    """Each segment attends to itself."""
    segments = Segments.from_cu_seqlens(batch.cu_segments, batch.cu_segments, len(batch.patches_LP), "cpu")
    prepare(segments, q, backend, deterministic)
    return segments


def identity(x: Tensor) -> Tensor:
    return x


class VideoDiT(nn.Module):
    """A diffusion transformer on packs. `text` maps `text_SE` to text tokens [S, D], and is trained; see megasora.text.

    Weights are undefined before `initialise` or `load_state_dict`. Four callables are replaced where ranks share a
    pack: `build_segments` (which tokens attend to which, prepared for queries [0, N, K] like the argument),
    `scatter_tokens` and `gather_tokens` (from the pack's tokens to those whose hidden vectors are on this rank, and
    back), and `copy_rows_to_tensor_parallel` (identity forward, all-reduce backward, for row vectors that reach these
    tokens without a tensor-parallel layer in between).
    """

    def __init__(self, config: ModelConfig, patch_dim: int, text: nn.Module):
        super().__init__()
        self.config = config
        width, shared, full = config.width, config.modulation == "shared", config.conditioning == "full"
        self.patch_in: nn.Module | None = nn.Linear(patch_dim, width)
        # added to tokens of the first latent frame, which a causal codec encodes alone
        self.first_frame = nn.Parameter(torch.zeros(width)) if full else None
        self.timestep = TimestepEmbedding(width)
        self.native = NativeEmbedding(width) if full else None
        self.text = text
        # replaces the tokens of a hidden caption; without it, zeros replace its features
        self.null_text = nn.Parameter(torch.zeros(width)) if full else None
        self.pooled_text = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width)) if full else None
        self.shared_modulation = nn.Linear(width, 6 * width) if shared else None
        self.blocks = nn.ModuleDict({str(i): Block(config) for i in range(config.depth)})
        self.final_modulation: nn.Module | None = RowModulation(width, 2, shared)
        self.patch_out: nn.Module | None = nn.Linear(width, patch_dim)
        self.local_heads = config.heads  # attention heads on this rank
        self.build_segments: Callable[[VideoBatch, Tensor], Any] = partial(
            build_segments, backend=config.attention_backend, deterministic=config.deterministic
        )
        self.scatter_tokens: Callable[[Tensor], Tensor] = identity
        self.gather_tokens: Callable[[Tensor], Tensor] = identity
        self.copy_rows_to_tensor_parallel: Callable[[Tensor], Tensor] = identity
        self.rope_scaling: RopeScaling | None = None  # while clips larger than those trained on are sampled

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Sets all weights to their values at step 0; see `megasora.model.init`."""
        weights = DrawnWeights(seed)
        for name, parameter in self.named_parameters():
            weights.fill(parameter, name)

    def keep_stage(self, first_block: int, num_blocks: int) -> None:
        """Deletes the blocks outside `first_block .. first_block + num_blocks - 1`.

        The input layer stays with the first block of the model, the output layers with the last.
        """
        if first_block > 0:
            self.patch_in, self.first_frame = None, None
        if first_block + num_blocks < self.config.depth:
            self.final_modulation, self.patch_out = None, None
        for i in range(self.config.depth):
            if not first_block <= i < first_block + num_blocks:
                del self.blocks[str(i)]

    def forward(self, batch: VideoBatch, hidden_LD: Tensor | None = None) -> Tensor:
        """The velocity [L, P] of every token, at least fp32; undefined at padding.

        A pipeline stage without the first block gets `hidden_LD` from the stage before it; one without the last block
        returns hidden states [L, D].
        """
        x_LD = self.embed_patches(batch) if self.patch_in is not None else hidden_LD
        inputs = self.block_inputs(batch)
        if self.config.compile:
            _ = inputs.rope.rotation  # cached: computed in the first block, this block would be compiled for it alone
        for index, block in self.blocks.items():
            recompute = recompute_mode(int(index), self.config) if self.training else "none"
            x_LD = run_block(block, x_LD, inputs, recompute)
        if self.patch_out is None:
            return x_LD
        cond_RD = inputs.cond_RD
        shift_RD, scale_RD = self.final_modulation(cond_RD, self.copy_rows_to_tensor_parallel(cond_RD)[:, None])
        x_LD = adaln_modulate(x_LD, shift_RD, scale_RD, inputs.rows, NORM_EPS, backend=self.config.kernel_backend)
        out_LP = self.gather_tokens(self.patch_out(x_LD))
        return out_LP.to(torch.promote_types(out_LP.dtype, torch.float32))

    def embed_patches(self, batch: VideoBatch) -> Tensor:
        """Patches to the hidden states [L, D] of this rank."""
        x_LD = self.patch_in(self.scatter_tokens(batch.patches_LP).to(self.patch_in.weight.dtype))
        if self.first_frame is None:
            return x_LD
        is_first_L1 = self.scatter_tokens(batch.coords_L3[:, :1] == 0).to(x_LD.dtype)
        return x_LD + is_first_L1 * self.first_frame

    def plan(self, batch: VideoBatch, rope_scaling: RopeScaling | None = None) -> PackPlan:
        """On the CPU, for a batch there, of which this reads no patches and no text. For any thread: it reads nothing
        that training or sampling change, and makes no collective."""
        c, length = self.config, len(batch.patches_LP)
        # of `parameters`: in ZeRO-3 DeepSpeed would gather a parameter that is taken from its module
        q = next(self.parameters()).new_empty(0, self.local_heads, c.head_dim)
        text_segments = Segments.from_cu_seqlens(batch.cu_segments, batch.cu_text, length, "cpu")
        prepare(text_segments, q, c.attention_backend, c.deterministic)
        return PackPlan(
            self.local_rows(batch),
            Rope.build(batch.coords_L3, c.head_dim, c.rope_base, scale=c.rope_ntk_factor, scaling=rope_scaling),
            self.build_segments(batch, q),
            text_segments,
            segment_ids(batch.cu_text, len(batch.text_SE)),
            batch.cu_text.diff().long(),
            self.text.plan(batch.cu_text),
        )

    def block_inputs(self, batch: VideoBatch) -> BlockInputs:
        """What the blocks need of a pack besides its hidden states."""
        plan = batch.plan
        if plan is None:
            plan = to_device(self.plan(batch, self.rope_scaling), batch.patches_LP.device)
        text_SD = self.embed_text(batch, plan)
        cond_RD = self.timestep(batch.timesteps_R)
        if self.native is not None:
            clip_GD = self.native(batch.native_size_G4) + self.pool_text(text_SD, plan)
            cond_RD = cond_RD + clip_GD[batch.row_segment_R]
        shared_RCD = None
        if self.shared_modulation is not None:
            shared_RCD = self.shared_modulation(F.silu(cond_RD)).unflatten(-1, (6, -1))
        return BlockInputs(cond_RD, shared_RCD, text_SD, plan.rows, plan.rope, plan.segments, plan.text_segments)

    def local_rows(self, batch: VideoBatch) -> Rows:
        """The rows of the tokens whose hidden vectors are on this rank: consecutive tokens of the pack."""
        tokens = self.scatter_tokens(torch.arange(len(batch.patches_LP)))
        cu_rows = (batch.cu_rows.long() - tokens[0]).clamp(0, len(tokens))
        return Rows.from_cu_seqlens(cu_rows, len(tokens), "cpu")

    def embed_text(self, batch: VideoBatch, plan: PackPlan) -> Tensor:
        """Caption tokens [S, D].

        All tokens of a hidden caption are the null token, or those of zeros. Softmax over copies of one key and value
        returns this value: a hidden caption acts as one token whatever its length, and no shape changes.
        """
        is_hidden_S1 = batch.drop_text_G[plan.clip_S][:, None]
        if self.null_text is None:
            return self.text(batch.text_SE.masked_fill(is_hidden_S1, 0), plan.text)
        text_SD = self.text(batch.text_SE, plan.text)
        return torch.where(is_hidden_S1, self.null_text.to(text_SD.dtype), text_SD)

    def pool_text(self, text_SD: Tensor, plan: PackPlan) -> Tensor:
        """A vector [G, D] from the mean of each caption's tokens."""
        lengths_G = plan.text_lengths_G
        sums_GD = sum_segments(text_SD, lengths_G)
        return self.pooled_text((sums_GD / lengths_G.clamp_min(1)[:, None]).to(text_SD.dtype))


def sum_segments(x_SD: Tensor, lengths_G: Tensor) -> Tensor:
    """[S, D] -> [G, D], fp32 at least: sums over segments of consecutive vectors, in order.

    `index_add` would add in any order on a GPU, and a run would not repeat bitwise.
    """
    wide = x_SD.to(torch.promote_types(x_SD.dtype, torch.float32))
    return torch.segment_reduce(wide, "sum", lengths=lengths_G, initial=0.0, unsafe=True)


def recompute_mode(block: int, config: ModelConfig) -> str:
    """`model.recompute` for `recompute_blocks` blocks, evenly spread over the depth; "none" for the others."""
    count = config.recompute_blocks or config.depth
    is_recomputed = (block + 1) * count // config.depth > block * count // config.depth
    return config.recompute if is_recomputed else "none"

"""Builds the parallel model: applies tensor, context and pipeline parallelism to `VideoDiT` and wraps it in a
`ZeroEngine`. The only file that imports both the model's modules and `megasora.parallel`.

The model is built on the meta device, reduced to this rank's stages, and its linears are replaced by sharded ones. Then
memory is allocated and this rank's part of each weight is drawn (megasora.model.init) or read. So a rank never holds
more than it trains, and every layout starts from the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor, nn

from megasora.build import build_model, patch_dim
from megasora.checkpoint.start import initial_weights_path, resumes
from megasora.checkpoint.stored_weights import StoredWeights, open_weights
from megasora.config import Config
from megasora.kernels.float8 import identity
from megasora.kernels.linear import Float8Products
from megasora.model.attention import AcrossHeadsNorm
from megasora.model.block import compile_block
from megasora.model.dit import VideoDiT
from megasora.model.init import DrawnWeights
from megasora.optim.muon import orthogonalize
from megasora.parallel import symmetric_memory
from megasora.parallel.collectives import (
    CopyToTensorParallel,
    GatherTokens,
    ScatterTokens,
    all_reduce_max,
    all_reduce_sum,
)
from megasora.parallel.context_attention import ContextAttention
from megasora.parallel.deepspeed_engine import build_partitioner
from megasora.parallel.denoiser import Denoiser
from megasora.parallel.mesh import Axis, Mesh
from megasora.parallel.muon import MuonRule
from megasora.parallel.pipeline import AccumulateGrads, Pipeline, num_stages, stage_numbers
from megasora.parallel.share import share_length
from megasora.parallel.shared_reads import open_on_node, shared_reads
from megasora.parallel.tensor import ColumnParallelLinear, RowParallelLinear, TensorParallelLinear
from megasora.parallel.world import World
from megasora.parallel.zero import ZeroEngine
from megasora.placement import WHOLE, Placement, WeightSource

# Linears that are sharded over the tensor axis: by columns, with options of ColumnParallelLinear, or by rows.
COLUMN_PARALLEL = {
    "blocks.*.attention.qkv": {"num_chunks": 3},
    "blocks.*.cross.q": {},
    "blocks.*.cross.kv": {"num_chunks": 2, "sequence_parallel": False},
    "blocks.*.mlp.up": {},
    "blocks.*.modulation.proj": {"num_chunks": 6, "sequence_parallel": False, "gather_output": True},
    "shared_modulation": {"num_chunks": 6, "sequence_parallel": False, "gather_output": True},
    "final_modulation.proj": {"num_chunks": 2, "sequence_parallel": False, "gather_output": True},
}
ROW_PARALLEL = ("blocks.*.attention.out", "blocks.*.cross.out", "blocks.*.mlp.down")
# Linears with FP8 products: those of the blocks that are applied to the tokens of a pack. Captions stay in the model's
# dtype: with context parallelism the gradient of a caption is a sum over ranks, whose parts would be rounded instead.
FP8 = (*ROW_PARALLEL, "blocks.*.attention.qkv", "blocks.*.cross.q", "blocks.*.mlp.up")
# Replicated parameters that are applied to this rank's tokens or heads only: their gradient is partial.
PARTIAL_GRADIENT = (
    "patch_in.*", "patch_out.*", "first_frame", "*modulation.table", "*.cross_norm.*", "*.q_norm.weight",
    "*.k_norm.weight", *(f"{name}.bias" for name in ROW_PARALLEL),
)  # fmt: skip
# Modules that condition the blocks: every pipeline stage has them and computes the conditioning from the pack.
CONDITIONING = ("timestep", "native", "text", "null_text", "pooled_text", "shared_modulation")
NO_WEIGHT_DECAY = ("patch_in.*", "patch_out.*", "*.table")  # and all vectors: their scale matters
# Matrices that keep AdamW's steps with optim.name=muon: first and last layers, embeddings, tables.
NO_MUON = (
    "patch_in.*", "patch_out.*", "*.table", "timestep.*", "native.*", "text.byte.*", "text.place.*", "text.up.*",
)  # fmt: skip


@dataclass(frozen=True)
class LocalModel:
    """The pipeline stages of one rank, with its local tensors."""

    stages: dict[int, VideoDiT]  # by stage number; without a pipeline stage 0 only
    placements: dict[str, Placement]  # of the stages' parameters, by name
    attention: ContextAttention | None  # None if the context axis is not split
    notices: tuple[str, ...] = ()  # sentences on what is slower than it was asked to be


def parallelize(config: Config, world: World, mesh: Mesh) -> ZeroEngine:
    """The configured model, ready to train on this rank. All ranks must call it."""
    weights, dtype = open_on_node(lambda: initial_weights(config), world), compute_dtype(config, world.device)
    is_read = isinstance(weights, StoredWeights)
    with shared_reads(weights, world, mesh.data_context) if is_read else nullcontext(weights) as weights:
        partition = (
            build_partitioner(config, mesh, dtype) if config.parallel.zero_stage == 3 else lambda parameter: None
        )
        local = build_local_model(config, world.device, mesh, weights, partition)
    if config.model.compile:
        for block in (block for stage in local.stages.values() for block in stage.blocks.values()):
            compile_block(block)
    engine = ZeroEngine(
        local.stages, local.placements, uses_weight_decay, config, world, mesh, dtype, local.attention,
        muon_rule(config, num_matrices),
    )  # fmt: skip
    engine.notices = local.notices
    engine.plan_pack = next(iter(local.stages.values())).plan  # the same for all stages
    if mesh.pipeline.is_split:
        accumulate_grads = engine.zero.accumulate_grads
        engine.pipeline = build_pipeline(local.stages, config, mesh, world.device, dtype, accumulate_grads)
    return engine


def build_local_model(
    config: Config,
    device: torch.device,
    mesh: Mesh,
    weights: WeightSource | None = None,
    partition: Callable[[nn.Parameter], None] = lambda parameter: None,
) -> LocalModel:
    """This rank's stages in fp32. `weights`: None for those before the first step. `partition` is called with each
    parameter once it is filled and before the next is allocated."""
    weights = weights or initial_weights(config)
    backend = config.model.attention_backend, config.model.deterministic
    attention = ContextAttention(mesh.ring, mesh.ulysses, *backend) if mesh.context.is_split else None
    stages, placements = {}, {}
    obstacle = symmetric_memory_obstacle(config, mesh.tensor, device)
    for number, first_block, num_blocks in local_stages(config, mesh.pipeline):
        with torch.device("meta"):
            stage = build_model(config, patch_dim(config))
        stage.keep_stage(first_block, num_blocks)
        if mesh.tensor.is_split:
            apply_tensor_parallel(stage, mesh.tensor, config.parallel.symmetric_memory and obstacle is None)
        if attention is not None:
            apply_context_parallel(stage, attention)
        if config.model.fp8_recipe != "none":
            apply_fp8(stage, config.model.fp8_recipe, mesh, config.model.kernel_backend)
        placements |= {name: placement_of(name, stage, mesh) for name, _ in stage.named_parameters()}
        for name, parameter in allocated_parameters(stage, device):
            weights.fill(parameter, name, placements[name], mesh.tensor.rank, mesh.tensor.size)
            partition(parameter)
        stages[number] = stage
    tie_conditioning(list(stages.values()))
    notices = [f"parallel.symmetric_memory=true is not used: {obstacle}"] if obstacle else []
    if config.model.fp8_recipe != "none" and device.type != "cuda":
        notices.append(f"model.fp8_recipe={config.model.fp8_recipe} is emulated on a CPU, which makes it slower")
    return LocalModel(stages, placements, attention, tuple(notices))


def allocated_parameters(stage: VideoDiT, device: torch.device) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of a stage that is on the meta device; each is allocated on `device` when its turn comes."""
    for name, shaped in list(stage.named_parameters()):
        parent, _, own_name = name.rpartition(".")
        parameter = nn.Parameter(torch.empty_like(shaped, device=device), shaped.requires_grad)
        setattr(stage.get_submodule(parent), own_name, parameter)
        yield name, parameter


def build_pipeline(
    stages: dict[int, VideoDiT],
    config: Config,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    accumulate_grads: AccumulateGrads,
) -> Pipeline:
    """The pipeline of this rank's stages; `dtype` is that of the hidden states, `accumulate_grads` as in `Pipeline`."""
    p = config.parallel
    hidden = torch.empty(share_length(config) // p.tensor, config.model.width, dtype=dtype, device="meta")
    total = num_stages(p.schedule, p.pipeline, p.stages_per_rank)
    length = lambda share: len(share.patches_LP) // p.tensor  # noqa: E731
    return Pipeline(mesh.pipeline, stages, total, p.schedule, device, accumulate_grads, hidden, length)


def build_denoiser(config: Config, device: torch.device, mesh: Mesh, weights: WeightSource) -> Denoiser:
    """The configured model for inference on this rank's layout, in the dtype that it is trained in. All ranks must call
    it."""
    local, dtype = build_local_model(config, device, mesh, weights), compute_dtype(config, device)
    for stage in local.stages.values():
        stage.to(dtype).eval().requires_grad_(False)
    if mesh.pipeline.is_split:
        predict = build_pipeline(local.stages, config, mesh, device, dtype, lambda stage: None).forward_only
    else:
        predict = lambda packs: [local.stages[0](pack) for pack in packs]  # noqa: E731
    return Denoiser(predict, list(local.stages.values()), config.parallel, mesh, device)


def local_stages(config: Config, axis: Axis) -> list[tuple[int, int, int]]:
    """(stage number, first block, number of blocks) of this rank's stages; without a pipeline the full model."""
    p, depth = config.parallel, config.model.depth
    if not axis.is_split:
        return [(0, 0, depth)]
    blocks = depth // num_stages(p.schedule, p.pipeline, p.stages_per_rank)
    return [(n, n * blocks, blocks) for n in stage_numbers(p.schedule, p.pipeline, p.stages_per_rank, axis.rank)]


def apply_tensor_parallel(model: VideoDiT, axis: Axis, symmetric: bool) -> None:
    """Shards the linears of the blocks and the hidden states over the tensor axis. `symmetric`: whether products use
    symmetric memory."""
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        options = next((value for pattern, value in COLUMN_PARALLEL.items() if fnmatch(name, pattern)), None)
        if isinstance(module, AcrossHeadsNorm):
            module.weight = nn.Parameter(module.weight.new_empty(module.width // axis.size))
            module.sum_over_heads = lambda x: all_reduce_sum(x, axis)
        elif options is not None:
            setattr(model.get_submodule(parent), child, ColumnParallelLinear(module, axis, **options))
        elif any(fnmatch(name, pattern) for pattern in ROW_PARALLEL):
            setattr(model.get_submodule(parent), child, RowParallelLinear(module, axis))
    for module in model.modules():
        if isinstance(module, TensorParallelLinear):
            module.uses_symmetric_memory = symmetric
    model.local_heads = model.config.heads // axis.size
    model.scatter_tokens = lambda x: ScatterTokens.apply(x, axis)
    model.gather_tokens = lambda x: GatherTokens.apply(x, axis)
    model.copy_rows_to_tensor_parallel = lambda x: CopyToTensorParallel.apply(x, axis)


def symmetric_memory_obstacle(config: Config, axis: Axis, device: torch.device) -> str | None:
    """Why parallel.symmetric_memory=true has no effect; None if it has one, or is not set. All ranks must call it."""
    if config.parallel.symmetric_memory and config.model.fp8_recipe != "none":
        return "products in FP8 use collectives"
    return symmetric_memory.obstacle(axis, device) if config.parallel.symmetric_memory else None


def apply_context_parallel(model: VideoDiT, attention: ContextAttention) -> None:
    """Makes self-attention work on the full pack; all other modules see this rank's share of it."""
    model.build_segments = attention.prepared_segments
    for block in model.blocks.values():
        block.attention.inner = attention


def apply_fp8(model: VideoDiT, recipe: str, mesh: Mesh, kernel_backend: str) -> None:
    """The linears of FP8 compute their products in FP8; see megasora.kernels.linear.Float8Products."""

    def max_over(axis: Axis) -> Callable[[Tensor], Tensor]:
        return (lambda amax: all_reduce_max(amax, axis)) if axis.is_split else identity

    reductions = {"tensor_max": max_over(mesh.tensor), "context_max": max_over(mesh.context)}
    for name, module in model.named_modules():
        if any(fnmatch(name, pattern) for pattern in FP8):
            sharded = "inputs" if isinstance(module, RowParallelLinear) else "outputs"
            module.products = Float8Products(recipe, sharded, **reductions, backend=kernel_backend)


def placement_of(name: str, stage: VideoDiT, mesh: Mesh) -> Placement:
    """The placement of the parameter of this name, from the type of its module."""
    parent, _, own_name = name.rpartition(".")
    module = stage.get_submodule(parent)
    partial_axes = ("pipeline",) if mesh.pipeline.is_split and name.split(".")[0] in CONDITIONING else ()
    if isinstance(module, ColumnParallelLinear):
        return Placement(shard_dim=0, num_chunks=module.num_chunks, partial_axes=partial_axes)
    if isinstance(module, RowParallelLinear) and own_name == "weight":
        return Placement(shard_dim=1, partial_axes=partial_axes)
    if mesh.tensor.is_split and isinstance(module, AcrossHeadsNorm):
        return Placement(shard_dim=0, partial_axes=partial_axes)
    if mesh.tensor.is_split and any(fnmatch(name, pattern) for pattern in PARTIAL_GRADIENT):
        partial_axes = (*partial_axes, "tensor")
    return Placement(partial_axes=partial_axes)


def initial_weights(config: Config) -> WeightSource:
    """The weights before the first step: drawn from their seeds, or read from `run.start`; not set where a checkpoint
    will be loaded. Raises MegaSoraError if the file of `run.start` cannot be read."""
    run_dir, start = Path(config.run.dir), config.run.start
    if resumes(run_dir, start):
        return WeightsToLoad(config.run.seed)
    path = initial_weights_path(start)
    return DrawnWeights(config.run.seed) if path is None else open_weights(path, f"run.start=init:{path}")


@dataclass(frozen=True)
class WeightsToLoad(DrawnWeights):
    """Those of a run that is resumed: a checkpoint overwrites all that are trained, so these are not drawn. They are
    NaN, so that the first loss tells of one that was not loaded."""

    @torch.no_grad()
    def fill(self, out: Tensor, name: str, placement: Placement = WHOLE, rank: int = 0, size: int = 1) -> None:
        if out.requires_grad:
            out.fill_(math.nan)
        else:
            super().fill(out, name, placement, rank, size)


def tie_conditioning(stages: list[VideoDiT]) -> None:
    """Gives all stages of one rank the conditioning modules of the first."""
    for stage in stages[1:]:
        for name in CONDITIONING:
            setattr(stage, name, getattr(stages[0], name))


def uses_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether AdamW decays the parameter: matrices, except NO_WEIGHT_DECAY."""
    return parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in NO_WEIGHT_DECAY)


def num_matrices(name: str, parameter: Tensor) -> int:
    """How many matrices a parameter is for Muon, one below the other; 0: it has AdamW's steps."""
    if parameter.ndim < 2 or any(fnmatch(name, pattern) for pattern in NO_MUON):
        return 0
    if fnmatch(name, "text.blocks.*.qkv.weight"):
        return 3
    layer = name.removesuffix(".weight")
    options = next((value for pattern, value in COLUMN_PARALLEL.items() if fnmatch(layer, pattern)), {})
    return options.get("num_chunks", 1)


def muon_rule(config: Config, num_matrices: Callable[[str, Tensor], int]) -> MuonRule | None:
    """For a ZeroEngine: None unless optim.name=muon."""
    return MuonRule(num_matrices, orthogonalize) if config.optim.name == "muon" else None


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of the model's weights: run.dtype, where auto is bfloat16 on a GPU and float32 on a CPU."""
    name = config.run.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)

"""The seam: the only file that knows both the model and how it is spread over processes.

A model is described on the meta device, cut to this rank's stage, its linears replaced by this rank's parts of them;
only then is memory taken, and every weight filled from its own key (megasora.model.init). So no rank ever holds what it
does not train, and every layout starts from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megasora.build import build_model, patch_dim
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import verify_checksums
from megasora.config import Config
from megasora.errors import MegaSoraError
from megasora.model.attention import AcrossHeadsNorm
from megasora.model.dit import VideoDiT
from megasora.model.init import initial_value
from megasora.parallel.collectives import CopyToTensorParallel, GatherTokens, ScatterTokens, all_reduce_sum
from megasora.parallel.context_attention import ContextAttention
from megasora.parallel.mesh import Axis, Mesh
from megasora.parallel.pipeline import Pipeline, num_stages, stage_numbers
from megasora.parallel.share import share_length
from megasora.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from megasora.parallel.world import World
from megasora.parallel.zero import ZeroEngine
from megasora.placement import Placement

# Linears that are cut over the tensor axis, and how: options of ColumnParallelLinear; the others by rows.
COLUMNS = {
    "blocks.*.attention.qkv": {"num_chunks": 3},
    "blocks.*.cross.q": {},
    "blocks.*.cross.kv": {"num_chunks": 2, "sequence_parallel": False},
    "blocks.*.mlp.up": {},
    "blocks.*.modulation.proj": {"num_chunks": 6, "sequence_parallel": False, "gather_output": True},
    "shared_modulation": {"num_chunks": 6, "sequence_parallel": False, "gather_output": True},
    "final_modulation.proj": {"num_chunks": 2, "sequence_parallel": False, "gather_output": True},
}
ROWS = ("blocks.*.attention.out", "blocks.*.cross.out", "blocks.*.mlp.down")
# Parameters that meet only this rank's tokens or heads: their gradient is a part of the sum over the tensor axis.
PARTIAL = (
    "patch_in.*", "patch_out.*", "first_frame", "*modulation.table", "*.cross_norm.*", "*.q_norm.weight",
    "*.k_norm.weight", *(f"{name}.bias" for name in ROWS),
)  # fmt: skip
# What conditions the blocks is computed on every pipeline stage, from the pack.
CONDITIONING = ("timestep", "native", "text", "null_text", "pooled_text", "shared_modulation")

NO_WEIGHT_DECAY = ("patch_in.*", "patch_out.*", "*.table")  # nor is any vector: what has to keep a scale of its own


@dataclass(frozen=True)
class LocalModel:
    """What one rank holds of the model."""

    stages: dict[int, VideoDiT]  # by their number in the pipeline; stage 0 alone without one
    placements: dict[str, Placement]  # of their parameters
    attention: ContextAttention | None  # over the context axis


def parallelize(config: Config, world: World, mesh: Mesh) -> ZeroEngine:
    """The configured model, ready to train on this rank."""
    local, dtype = build_local_model(config, world.device, mesh), compute_dtype(config, world.device)
    pipeline = (
        partial(build_pipeline, local.stages, config, mesh, world.device, dtype) if mesh.pipeline.is_split else None
    )
    return ZeroEngine(local.stages, local.placements, uses_weight_decay, config, world, mesh, dtype, pipeline, local.attention)


def build_local_model(config: Config, device: torch.device, mesh: Mesh) -> LocalModel:
    """This rank's stages in fp32, filled with the weights of step 0."""
    how = config.model.attention_backend, config.model.deterministic
    attention = ContextAttention(mesh.ring, mesh.ulysses, *how) if mesh.context.is_split else None
    stages, placements, weight_of = {}, {}, initial_weights(config)
    for number, first_block, num_blocks in local_stages(config, mesh.pipeline):
        with torch.device("meta"):
            stage = build_model(config, patch_dim(config))
        stage.keep_stage(first_block, num_blocks)
        if mesh.tensor.is_split:
            apply_tensor_parallel(stage, mesh.tensor)
        if attention is not None:
            apply_context_parallel(stage, attention)
        found = {name: placement_of(name, stage, mesh) for name, _ in stage.named_parameters()}
        load_local_weights(stage.to_empty(device=device), found, mesh.tensor, weight_of)
        stages[number] = stage
        placements |= found
    tie_conditioning(list(stages.values()))
    return LocalModel(stages, placements, attention)


def build_pipeline(
    stages: dict[int, VideoDiT],
    config: Config,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    fold: Callable[[nn.Module], None],
) -> Pipeline:
    p = config.parallel
    hidden = torch.empty(share_length(config) // p.tensor, config.model.width, dtype=dtype, device="meta")
    total = num_stages(p.schedule, p.pipeline, p.stages_per_rank)
    return Pipeline(mesh.pipeline, stages, total, p.schedule, device, fold, hidden)


def local_stages(config: Config, axis: Axis) -> list[tuple[int, int, int]]:
    """(number, first block, number of blocks) of this rank's stages; the whole model without a pipeline."""
    p, depth = config.parallel, config.model.depth
    if not axis.is_split:
        return [(0, 0, depth)]
    blocks = depth // num_stages(p.schedule, p.pipeline, p.stages_per_rank)
    return [(n, n * blocks, blocks) for n in stage_numbers(p.schedule, p.pipeline, p.stages_per_rank, axis.rank)]


def apply_tensor_parallel(model: VideoDiT, axis: Axis) -> None:
    """Replaces the linears of the blocks by this rank's parts of them, and cuts the hidden tokens over the axis."""
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        columns = next((options for pattern, options in COLUMNS.items() if fnmatch(name, pattern)), None)
        if isinstance(module, AcrossHeadsNorm):
            module.weight = nn.Parameter(module.weight.new_empty(module.width // axis.size))
            module.sum_over_heads = lambda x: all_reduce_sum(x, axis)
        elif columns is not None:
            setattr(model.get_submodule(parent), child, ColumnParallelLinear(module, axis, **columns))
        elif any(fnmatch(name, pattern) for pattern in ROWS):
            setattr(model.get_submodule(parent), child, RowParallelLinear(module, axis))
    model.scatter_tokens = lambda x: ScatterTokens.apply(x, axis)
    model.gather_tokens = lambda x: GatherTokens.apply(x, axis)
    model.copy_rows_to_tensor_parallel = lambda x: CopyToTensorParallel.apply(x, axis)


def apply_context_parallel(model: VideoDiT, attention: ContextAttention) -> None:
    """Self-attention goes over the whole pack; everything else sees this rank's share of it alone."""
    model.build_segments = attention.segments
    for block in model.blocks.values():
        block.attention.inner = attention


def placement_of(name: str, stage: VideoDiT, mesh: Mesh) -> Placement:
    """Where the parameter of this name lies, read from the module that owns it."""
    owner, _, own_name = name.rpartition(".")
    module = stage.get_submodule(owner)
    summed = ("pipeline",) if mesh.pipeline.is_split and name.split(".")[0] in CONDITIONING else ()
    if isinstance(module, ColumnParallelLinear):
        return Placement(shard_dim=0, num_chunks=module.num_chunks, partial_axes=summed)
    if isinstance(module, RowParallelLinear) and own_name == "weight":
        return Placement(shard_dim=1, partial_axes=summed)
    if mesh.tensor.is_split and isinstance(module, AcrossHeadsNorm):
        return Placement(shard_dim=0, partial_axes=summed)
    if mesh.tensor.is_split and any(fnmatch(name, pattern) for pattern in PARTIAL):
        summed = (*summed, "tensor")
    return Placement(partial_axes=summed)


def initial_weights(config: Config) -> Callable[[str, torch.Size], Tensor]:
    """(name, full shape) -> the weight at step 0: drawn from its own key, or read from model.init_from."""
    path = config.model.init_from
    if not path:
        return lambda name, shape: initial_value(name, shape, config.run.seed)
    shapes, read = open_weights(Path(path))

    def weight_of(name: str, shape: torch.Size) -> Tensor:
        found = shapes.get(name)
        if found != shape:
            has = f"has {list(found)}" if found is not None else "has none"
            raise MegaSoraError(
                f"model.init_from={path}: this model's {name} is {list(shape)}, the file {has}; give the "
                "model.*, text.* and codec.* settings that the weights were made with"
            )
        return read(name)

    return weight_of


def open_weights(path: Path) -> tuple[dict[str, torch.Size], Callable[[str], Tensor]]:
    """(full shapes by name, what reads one) of a safetensors file, or of a checkpoint, whose last weights are taken."""
    if path.is_dir():
        verify_checksums(path)
        checkpoint = ShardedCheckpoint(path)
        return checkpoint.shapes, partial(checkpoint.full_tensor, "weights")
    try:
        file = safe_open(path, "pt")
    except Exception as error:  # safetensors raises its own kinds
        raise MegaSoraError(f"model.init_from={path} cannot be read: {error}") from None
    return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}, file.get_tensor  # noqa: SIM118


@torch.no_grad()
def load_local_weights(
    stage: VideoDiT, placements: dict[str, Placement], axis: Axis, weight_of: Callable[[str, torch.Size], Tensor]
) -> None:
    """Each weight is made whole, and this rank's part of it kept."""
    for name, parameter in stage.named_parameters():
        placement = placements[name]
        full = weight_of(name, placement.full_shape(parameter.shape, axis.size))
        parameter.copy_(placement.local(full, axis.rank, axis.size))


def tie_conditioning(stages: list[VideoDiT]) -> None:
    """Stages on one rank have one copy of what conditions the blocks."""
    for stage in stages[1:]:
        for name in CONDITIONING:
            setattr(stage, name, getattr(stages[0], name))


def uses_weight_decay(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in NO_WEIGHT_DECAY)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    name = config.run.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)

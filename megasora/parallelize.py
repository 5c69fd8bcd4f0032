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
from megasora.checkpoint.slices import Slices
from megasora.checkpoint.store import verify
from megasora.config import Config
from megasora.errors import MegaSoraError
from megasora.model.attention import WidthNorm
from megasora.model.dit import VideoDiT
from megasora.model.init import initial_value
from megasora.parallel.collectives import Join, Split, Spread, total
from megasora.parallel.context import ContextAttention
from megasora.parallel.mesh import Axis, Mesh
from megasora.parallel.pipeline import Pipeline, num_stages, stage_numbers
from megasora.parallel.share import tokens_per_rank
from megasora.parallel.tensor import ColumnLinear, RowLinear
from megasora.parallel.world import World
from megasora.parallel.zero import ZeroEngine
from megasora.placement import Placement

# Linears that are cut over the tensor axis, and how: options of ColumnLinear; the others by rows.
COLUMNS = {
    "blocks.*.attention.qkv": {"runs": 3},
    "blocks.*.cross.q": {},
    "blocks.*.cross.kv": {"runs": 2, "tokens": False},
    "blocks.*.mlp.up": {},
    "blocks.*.modulation.proj": {"runs": 6, "tokens": False, "whole": True},
    "shared_modulation": {"runs": 6, "tokens": False, "whole": True},
    "final_modulation.proj": {"runs": 2, "tokens": False, "whole": True},
}
ROWS = ("blocks.*.attention.out", "blocks.*.cross.out", "blocks.*.mlp.down")
# Parameters that meet only this rank's tokens or heads: their gradient is a part of the sum over the tensor axis.
PARTIAL = (
    "patch_in.*", "patch_out.*", "first_frame", "*modulation.table", "*.cross_norm.*", "*.q_norm.weight",
    "*.k_norm.weight", *(f"{name}.bias" for name in ROWS),
)  # fmt: skip
# What conditions the blocks is computed on every pipeline stage, from the pack.
CONDITIONING = ("timestep", "native", "text", "null_text", "pooled_text", "shared_modulation")

NOT_DECAYED = ("patch_in.*", "patch_out.*", "*.table")  # nor is any vector: what has to keep a scale of its own


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
    return ZeroEngine(local.stages, local.placements, is_decayed, config, world, mesh, dtype, pipeline, local.attention)


def build_local_model(config: Config, device: torch.device, mesh: Mesh) -> LocalModel:
    """This rank's stages in fp32, filled with the weights of step 0."""
    how = config.model.attention, config.model.deterministic
    attention = ContextAttention(mesh.ring, mesh.ulysses, *how) if mesh.context.is_split else None
    stages, placements, value_of = {}, {}, first_values(config)
    for number, first_block, num_blocks in stages_here(config, mesh.pipeline):
        with torch.device("meta"):
            stage = build_model(config, patch_dim(config))
        stage.keep_stage(first_block, num_blocks)
        if mesh.tensor.is_split:
            apply_tensor_parallel(stage, mesh.tensor)
        if attention is not None:
            apply_context_parallel(stage, attention)
        found = {name: placement_of(name, stage, mesh) for name, _ in stage.named_parameters()}
        fill(stage.to_empty(device=device), found, mesh.tensor, value_of)
        stages[number] = stage
        placements |= found
    share_conditioning(list(stages.values()))
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
    hidden = torch.empty(tokens_per_rank(config) // p.tensor, config.model.width, dtype=dtype, device="meta")
    total = num_stages(p.schedule, p.pipeline, p.stages_per_rank)
    return Pipeline(mesh.pipeline, stages, total, p.schedule, device, fold, hidden)


def stages_here(config: Config, axis: Axis) -> list[tuple[int, int, int]]:
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
        if isinstance(module, WidthNorm):
            module.weight = nn.Parameter(module.weight.new_empty(module.width // axis.size))
            module.sum_over_heads = lambda x: total(x, axis)
        elif columns is not None:
            setattr(model.get_submodule(parent), child, ColumnLinear(module, axis, **columns))
        elif any(fnmatch(name, pattern) for pattern in ROWS):
            setattr(model.get_submodule(parent), child, RowLinear(module, axis))
    model.split_tokens = lambda x: Split.apply(x, axis)
    model.join_tokens = lambda x: Join.apply(x, axis)
    model.spread_rows = lambda x: Spread.apply(x, axis)


def apply_context_parallel(model: VideoDiT, attention: ContextAttention) -> None:
    """Self-attention goes over the whole pack; everything else sees this rank's share of it alone."""
    model.segments_of = attention.segments
    for block in model.blocks.values():
        block.attention.inner = attention


def placement_of(name: str, stage: VideoDiT, mesh: Mesh) -> Placement:
    """Where the parameter of this name lies, read from the module that owns it."""
    owner, _, own_name = name.rpartition(".")
    module = stage.get_submodule(owner)
    summed = ("pipeline",) if mesh.pipeline.is_split and name.split(".")[0] in CONDITIONING else ()
    if isinstance(module, ColumnLinear):
        return Placement(cut=0, runs=module.runs, summed=summed)
    if isinstance(module, RowLinear) and own_name == "weight":
        return Placement(cut=1, summed=summed)
    if mesh.tensor.is_split and isinstance(module, WidthNorm):
        return Placement(cut=0, summed=summed)
    if mesh.tensor.is_split and any(fnmatch(name, pattern) for pattern in PARTIAL):
        summed = (*summed, "tensor")
    return Placement(summed=summed)


def first_values(config: Config) -> Callable[[str, torch.Size], Tensor]:
    """(name, full shape) -> the weight at step 0: drawn from its own key, or read from model.weights."""
    path = config.model.weights
    if not path:
        return lambda name, shape: initial_value(name, shape, config.run.seed)
    shapes, read = weights_of(Path(path))

    def value_of(name: str, shape: torch.Size) -> Tensor:
        found = shapes.get(name)
        if found != shape:
            has = f"has {list(found)}" if found is not None else "has none"
            raise MegaSoraError(
                f"model.weights={path}: this model's {name} is {list(shape)}, the file {has}; give the "
                "model.*, text.* and codec.* settings that the weights were made with"
            )
        return read(name)

    return value_of


def weights_of(path: Path) -> tuple[dict[str, torch.Size], Callable[[str], Tensor]]:
    """(full shapes by name, what reads one) of a safetensors file, or of a checkpoint, whose last weights are taken."""
    if path.is_dir():
        verify(path)
        slices = Slices(path)
        return slices.shapes, partial(slices.whole, "weights")
    try:
        file = safe_open(path, "pt")
    except Exception as error:  # safetensors raises its own kinds
        raise MegaSoraError(f"model.weights={path} cannot be read: {error}") from None
    return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}, file.get_tensor  # noqa: SIM118


@torch.no_grad()
def fill(
    stage: VideoDiT, placements: dict[str, Placement], axis: Axis, value_of: Callable[[str, torch.Size], Tensor]
) -> None:
    """Each weight is made whole, and this rank's part of it kept."""
    for name, parameter in stage.named_parameters():
        placement = placements[name]
        full = value_of(name, placement.full_shape(parameter.shape, axis.size))
        parameter.copy_(placement.local(full, axis.rank, axis.size))


def share_conditioning(stages: list[VideoDiT]) -> None:
    """Stages on one rank have one copy of what conditions the blocks."""
    for stage in stages[1:]:
        for name in CONDITIONING:
            setattr(stage, name, getattr(stages[0], name))


def is_decayed(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in NOT_DECAYED)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    name = config.run.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)

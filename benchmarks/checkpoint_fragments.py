"""Which part of a model each of thousands of ranks has, without running them, for benchmarks/checkpoint_scale.py.

The local model of a pipeline stage is built on the meta device by the product's code; its parameters are partitioned
over data x context as DeepSpeed does (megasora/formats/deepspeed_layout.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasora.config import Config, load
from megasora.formats.deepspeed_layout import SUB_GROUP_SIZE, partition_groups, partition_parameters, split_sub_groups
from megasora.fragment import Fragment
from megasora.parallel.mesh import Axis, Mesh
from megasora.parallel.zero import parameter_groups
from megasora.parallelize import build_local_model, uses_weight_decay
from megasora.placement import Placement

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")


@dataclass(frozen=True)
class Layout:
    preset: str  # name of a file of configs/, or of settings
    world: int
    tensor: int
    pipeline: int = 1
    zero_stage: int = 1

    @property
    def data_context(self) -> int:
        return self.world // (self.tensor * self.pipeline)


def load_config(layout: Layout, settings: list[str]) -> Config:
    """Context counts as data, which is the same for checkpoints. The encoder of captions is none of the model's, but
    its width is: that of T5-XXL."""
    axes = [f"parallel.tensor={layout.tensor}", f"parallel.pipeline={layout.pipeline}", "parallel.context=1"]
    path = CONFIGS / f"{layout.preset}.yaml"
    return load(path if path.exists() else None, [*axes, f"parallel.zero_stage={layout.zero_stage}", *settings])


def mesh_of(layout: Layout, pipeline_rank: int, tensor_rank: int = 0) -> Mesh:
    """Without process groups."""
    axes = {name: Axis(name, 1, 0, group=None) for name in Mesh.__dataclass_fields__}
    axes["tensor"] = Axis("tensor", layout.tensor, tensor_rank, group=None)
    axes["pipeline"] = Axis("pipeline", layout.pipeline, pipeline_rank, group=None)
    axes["data_context"] = Axis("data_context", layout.data_context, 0, group=None)
    return Mesh(**axes)


@dataclass(frozen=True)
class Owned:
    """A fragment without values; those of all tensor ranks are alike."""

    name: str
    shape: torch.Size  # full
    placement: Placement
    start: int
    count: int


@torch.no_grad()
def owned_fragments(config: Config, layout: Layout, pipeline_rank: int) -> list[list[Owned]]:
    """What each rank of data x context owns of the stages of a pipeline rank."""
    local = build_local_model(config, torch.device("meta"), mesh_of(layout, pipeline_rank), Undrawn())
    parameters = {name: p for stage in local.stages.values() for name, p in stage.named_parameters()}
    names = {p: name for name, p in parameters.items()}
    has_decay = {name: uses_weight_decay(name, p) for name, p in parameters.items()}
    groups = parameter_groups(parameters, local.placements, has_decay, dict.fromkeys(parameters, 0))
    shapes = [{names[p]: p.shape for p in group} for group in groups.values()]
    if layout.zero_stage == 3:
        sub_groups = [part for parts in split_sub_groups(shapes, layout.data_context, SUB_GROUP_SIZE) for part in parts]
        zero = partition_parameters(sub_groups, layout.data_context)
    else:
        zero = partition_groups(shapes, layout.data_context)
    ranks: list[list[Owned]] = [[] for _ in range(layout.data_context)]
    for name, parameter in parameters.items():
        placement = local.placements[name]
        shape = placement.full_shape(parameter.shape, layout.tensor)
        for piece in zero.pieces[name]:
            ranks[piece.rank].append(Owned(name, shape, placement, piece.start, piece.count))
    return ranks


class Undrawn:
    """A WeightSource that leaves the weights as they are."""

    def fill(self, *arguments: Any) -> None:
        pass


def fragments(owned: list[Owned], layout: Layout, tensor_rank: int) -> list[Fragment]:
    result = []
    for o in owned:
        values = torch.empty(o.count, device="meta")
        place = tensor_rank, layout.tensor, o.start
        result.append(Fragment(o.name, o.shape, o.placement, *place, dict.fromkeys(KINDS, values)))
    return result


Rank = tuple[int, int, int, int]  # rank, pipeline rank, data rank, tensor rank


def all_ranks(layout: Layout) -> Iterator[Rank]:
    """In the order of the mesh."""
    places = itertools.product(range(layout.pipeline), range(layout.data_context), range(layout.tensor))
    return ((rank, *place) for rank, place in enumerate(places))


def counted_ranks(layout: Layout) -> Iterator[Rank]:
    """With ZeRO 3, where all data ranks but the last are alike, those of three data ranks."""
    sampled = {0, layout.data_context // 2, layout.data_context - 1}
    return (rank for rank in all_ranks(layout) if layout.zero_stage != 3 or rank[2] in sampled)

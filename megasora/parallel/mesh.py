"""The device mesh: ranks arranged along (pipeline, data, context, tensor), with one process group for each axis.

Tensor is the innermost axis: its ranks exchange the most data and are neighbours on one node. Pipeline is outermost:
its ranks exchange the least. The context axis is itself ring x ulysses, with ulysses inside. The mesh is built once and
passed as an argument; nothing else creates a process group. For a codec, context is time x rows: the same two axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megasora.config import ParallelConfig

AXES = ("pipeline", "data", "ring", "ulysses", "tensor")  # outermost first
FLATTENED_AXES = {
    "context": ("ring", "ulysses"),
    "data_context": ("data", "ring", "ulysses"),
    "model": ("pipeline", "tensor"),
}


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it."""

    name: str
    size: int
    rank: int  # this rank's position along the axis
    group: dist.ProcessGroup  # of the ranks along the axis

    @property
    def is_split(self) -> bool:
        return self.size > 1

    def global_rank(self, axis_rank: int) -> int:
        """The global rank of the process at position `axis_rank` of this axis."""
        return dist.get_global_rank(self.group, axis_rank)


@dataclass(frozen=True)
class Mesh:
    """The axes of a run. `data_context` flattens data and context: the ranks over which gradients are summed and ZeRO
    shards. `model` flattens pipeline and tensor: the ranks that together hold one copy of the weights."""

    pipeline: Axis
    data: Axis
    context: Axis
    ring: Axis
    ulysses: Axis
    tensor: Axis
    data_context: Axis
    model: Axis

    @property
    def time(self) -> Axis:
        """Of a codec: the ranks that share the frames of a clip."""
        return self.ring

    @property
    def rows(self) -> Axis:
        """Of a codec: the ranks that share the rows of a frame."""
        return self.ulysses

    def axis(self, name: str) -> Axis:
        """The axis of this name, e.g. one of `Placement.partial_axes`."""
        return getattr(self, name)


def build_mesh(config: ParallelConfig, device_type: str) -> Mesh:
    """The mesh of all processes; all ranks must call it. `check_layout` has validated the sizes.

    The size of the data axis is the number of processes / (pipeline x context x tensor).
    """
    ulysses = config.ulysses * config.rows  # one of them is 1
    ring = config.context // ulysses
    data = dist.get_world_size() // (config.pipeline * config.context * config.tensor)
    sizes = (config.pipeline, data, ring, ulysses, config.tensor)
    device_mesh = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
    axes = {name: build_axis(name, device_mesh[name]) for name in AXES}
    for name, parts in FLATTENED_AXES.items():
        split = tuple(part for part in parts if axes[part].is_split)
        submesh = device_mesh[split]._flatten(name) if len(split) > 1 else device_mesh[(split or parts)[0]]
        axes[name] = build_axis(name, submesh)
    return Mesh(**axes)


def build_axis(name: str, submesh: DeviceMesh) -> Axis:
    group = submesh.get_group()
    return Axis(name, dist.get_world_size(group), dist.get_rank(group), group)

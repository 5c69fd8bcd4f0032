"""The mesh: ranks arranged along (pipeline, data, context, tensor), with a process group along each axis.

Ranks are numbered with tensor innermost, so that its peers, which exchange the most, are neighbours on one node, and
pipeline outermost, whose peers exchange the least. The context axis is itself ring x ulysses, ulysses inside. The mesh
is made once and passed as an argument; nothing else creates a process group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megasora.config import ParallelConfig
from megasora.placement import Placement

AXES = ("pipeline", "data", "ring", "ulysses", "tensor")  # outermost first
JOINED = {"context": ("ring", "ulysses"), "zero": ("data", "ring", "ulysses"), "model": ("pipeline", "tensor")}


@dataclass(frozen=True)
class Axis:
    """One axis as this rank sees it: how many peers, which of them am I, and how we talk."""

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup

    @property
    def is_split(self) -> bool:
        return self.size > 1

    def global_rank(self, peer: int) -> int:
        """The number of peer `peer` of this axis among all processes."""
        return dist.get_global_rank(self.group, peer)


@dataclass(frozen=True)
class Mesh:
    """The axes of a run. `zero` joins data and context: the ranks over which a gradient is summed and ZeRO shards.
    `model` joins pipeline and tensor: the ranks that together hold one copy of the weights."""

    pipeline: Axis
    data: Axis
    context: Axis
    ring: Axis
    ulysses: Axis
    tensor: Axis
    zero: Axis
    model: Axis

    def counts_here(self, placement: Placement) -> bool:
        """Whether this rank's copy of a parameter is the one that counts in a norm and is written to a checkpoint."""
        first_tensor = placement.cut is not None or self.tensor.rank == 0
        return first_tensor and ("pipeline" not in placement.summed or self.pipeline.rank == 0)


def build_mesh(config: ParallelConfig, device_type: str) -> Mesh:
    """All ranks must call it. The sizes were checked by `check_layout`; data is what the others leave of the world."""
    ring = config.context // config.ulysses
    data = dist.get_world_size() // (config.pipeline * config.context * config.tensor)
    sizes = (config.pipeline, data, ring, config.ulysses, config.tensor)
    grid = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
    axes = {name: axis_of(name, grid[name]) for name in AXES}
    for name, parts in JOINED.items():
        split = [part for part in parts if axes[part].is_split]
        axes[name] = axis_of(name, grid[tuple(split)]._flatten(name) if len(split) > 1 else grid[(split or parts)[0]])
    return Mesh(**axes)


def axis_of(name: str, line: DeviceMesh) -> Axis:
    group = line.get_group()
    return Axis(name, dist.get_world_size(group), dist.get_rank(group), group)

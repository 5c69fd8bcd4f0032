"""The mesh: ranks arranged along (pipeline, data, context, tensor), with a process group along each axis.

Ranks are numbered with tensor innermost, so that its peers, which exchange the most, are neighbours on one node, and
pipeline outermost, whose peers exchange the least. The context axis is itself ring x ulysses, ulysses inside. It is made
once and passed as an argument; nothing else creates a process group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megasora.config import ParallelConfig

AXES = ("pipeline", "data", "ring", "ulysses", "tensor")  # outermost first; ring x ulysses is the context axis


@dataclass(frozen=True)
class Axis:
    """One axis as this rank sees it: how many peers, which of them am I, and how we talk."""

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup | None  # None where the size is 1

    @property
    def is_split(self) -> bool:
        return self.size > 1

    def global_rank(self, peer: int) -> int:
        """The number of peer `peer` of this axis among all processes."""
        return dist.get_global_rank(self.group, peer) if self.group is not None else dist.get_rank()


@dataclass(frozen=True)
class Mesh:
    """The axes of a run. `zero` joins data and context: the ranks over which the sum of a gradient goes and ZeRO shards.
    `model` joins pipeline and tensor: the ranks that together hold one copy of the weights."""

    pipeline: Axis
    data: Axis
    context: Axis
    ring: Axis
    ulysses: Axis
    tensor: Axis
    zero: Axis
    model: Axis


def build_mesh(config: ParallelConfig, device_type: str) -> Mesh:
    """All ranks must call it. The sizes were checked by `check_layout`; data is what the others leave of the world."""
    ring = config.context // config.ulysses
    data = dist.get_world_size() // (config.pipeline * config.context * config.tensor)
    device_mesh = init_device_mesh(
        device_type, (config.pipeline, data, ring, config.ulysses, config.tensor), mesh_dim_names=AXES
    )
    joined = {"context": ("ring", "ulysses"), "zero": ("data", "ring", "ulysses"), "model": ("pipeline", "tensor")}
    axes = {name: axis_of(device_mesh, name) for name in AXES}
    for name, parts in joined.items():
        split = [part for part in parts if axes[part].is_split]
        if len(split) == 1:
            only = axes[split[0]]
            axes[name] = Axis(name, only.size, only.rank, only.group)
        elif not split:
            axes[name] = Axis(name, 1, 0, None)
        else:
            axes[name] = axis_of(device_mesh[parts]._flatten(name), name, flat=True)
    return Mesh(**axes)


def axis_of(mesh: DeviceMesh, name: str, flat: bool = False) -> Axis:
    size = mesh.size() if flat else mesh[name].size()
    if size == 1:
        return Axis(name, 1, 0, None)
    group = mesh.get_group() if flat else mesh.get_group(name)
    return Axis(name, size, dist.get_rank(group), group)

"""The fragments of the real engine on one rank of a fake process group, for tests of what counts them without one."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megasora.config import Config
from megasora.parallel.mesh import build_mesh
from megasora.parallel.world import World
from megasora.parallelize import parallelize


def fragments_of_engine(config: Config) -> list[tuple]:
    world = World(dist.get_rank(), dist.get_world_size(), 0, 1, torch.device("cpu"))
    engine = parallelize(config, world, build_mesh(config.parallel, "cpu"))
    return [(f.name, tuple(f.shape), f.tensor_rank, f.tensor_size, f.start, f.count) for f in engine.fragments()]

"""ZeRO 3: no rank has a whole model at the start; its weights are divided one by one as they are drawn."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from layouts import configure, layout

from megasora.model.init import DrawnWeights
from megasora.testing.spawn import run_ranks

LAYOUTS = [layout(2, zero_stage=3), layout(4, tensor=2, zero_stage=3)]
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Observed(DrawnWeights):
    """Notes how many elements of weights exist at each draw."""

    seen: list = dataclasses.field(default_factory=list)
    sizes: list = dataclasses.field(default_factory=list)

    def fill(self, out, *arguments):
        super().fill(out, *arguments)
        self.seen.append(out)
        divided = sum(p.ds_tensor.numel() for p in self.seen[:-1])
        self.sizes.append((divided + sum(p.numel() for p in self.seen), out.numel()))


def start_all(name: str) -> list[tuple[int, int, list[tuple[int, int]], list[str]]]:
    return [start(name, dtype) for dtype in DTYPES]


def start(name: str, dtype: str) -> tuple[int, int, list[tuple[int, int]], list[str]]:
    """On each rank: (elements of the local model, ranks of data x context, sizes, parameters with wrong masters)."""
    from megasora import parallelize
    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.world import World

    config = configure(next(one for one in LAYOUTS if one.name == name), "block")
    config.run.dtype = dtype
    rank, size = dist.get_rank(), dist.get_world_size()
    world, mesh = World(rank, size, rank, size, torch.device("cpu")), build_mesh(config.parallel, "cpu")
    weights, other_seed = Observed(config.run.seed), DrawnWeights(config.run.seed + 1)
    source = weights if mesh.data_context.rank == 0 else other_seed  # whose values do not count
    parallelize.initial_weights = lambda config: source
    parallelize.open_on_node = lambda make, world: make()
    engine = parallelize.parallelize(config, world, mesh)
    wrong = []
    for f in engine.fragments():
        expected = torch.empty(f.placement.local_shape(f.shape, f.tensor_size))
        DrawnWeights(config.run.seed).fill(expected, f.name, f.placement, f.tensor_rank, f.tensor_size)
        own = expected.flatten()[f.start : f.start + f.count].to(getattr(torch, dtype)).float()
        wrong += [] if torch.equal(f.values["weights"], own) else [f.name]
    return sum(p.ds_numel for p in engine.parameters.values()), mesh.data_context.size, weights.sizes, wrong


@pytest.mark.parametrize("one", LAYOUTS, ids=lambda one: one.name)
def test_a_rank_has_its_part_of_the_weights_and_one_whole_tensor_at_most(one):
    for results in run_ranks(start_all, one.processes, one.name):
        for total, ranks, sizes, wrong in results:
            assert not wrong
            for held, tensor in sizes:
                assert held <= total / ranks + tensor + len(sizes)  # and one element of padding each
            assert not sizes or max(held for held, _ in sizes) < 0.9 * total

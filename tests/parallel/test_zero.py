"""What ZeRO leaves to a rank: fragments that make each number of the model once, and from which training goes on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from layouts import configure, global_batch, layout, objective_of, random_weight

from megasora.diffusion.flow import velocity_error
from megasora.optim.schedule import lr_at
from megasora.testing.spawn import run_ranks

KINDS = ("weights", "exp_avg", "exp_avg_sq")
WAYS = [(1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")]


def train_step(engine, config, step):
    """The norm of the gradient and the loss, as they are."""
    mesh, objective, losses = engine.mesh, objective_of(config), []
    packs = global_batch(config)[mesh.data.rank :: mesh.data.size]
    noised, targets, weights = zip(*(objective.add_noise(pack, step) for pack in packs), strict=True)

    def loss(prediction, number):
        found = velocity_error(prediction, targets[number], weights[number]).squared_error_sum / 1000
        losses.append(float(found.detach()))
        return found

    return engine.train_step(list(noised), loss, lr_at(step, config.run.steps, config.optim)), losses


def copy_of(fragments):
    return [{kind: values.clone() for kind, values in f.values.items()} for f in fragments]


def go_on_in_another_engine(ways):
    """For each way of ZeRO: what an engine does in its second step, and what one that was filled after the first."""
    from megasora import parallelize as seam
    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.world import World

    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, size, torch.device("cpu"))
    seam.initial_weights = lambda config: random_weight
    results = []
    for stage, dtype in ways:
        config = configure(layout(size, zero_stage=stage, depth=1, packs=2), "block")
        config.run.dtype = dtype
        mesh = build_mesh(config.parallel, "cpu")
        first, second = (seam.parallelize(config, world, mesh) for _ in range(2))
        train_step(first, config, 0)
        train_step(second, config, 7)  # which is to be forgotten
        saved = copy_of(first.fragments())
        for fragment, values in zip(second.fragments(), saved, strict=True):
            for kind in KINDS:
                fragment.values[kind].copy_(values[kind])
        second.sync_after_load(1)
        ends = []
        for engine in (first, second):
            told = train_step(engine, config, 1)
            copies = {name: copy.clone() for name, copy in engine.compute_weights().items()}
            ends.append((told, copy_of(engine.fragments()), copies))
        counts = [(f.name, f.shape.numel(), f.start, f.count) for f in first.fragments()]
        results.append((counts, saved, ends))
    return results


@pytest.fixture(scope="module")
def on_ranks():
    return run_ranks(go_on_in_another_engine, 2, WAYS)


@pytest.mark.parametrize("number", range(len(WAYS)), ids=[f"{dtype}-{stage}" for stage, dtype in WAYS])
def test_an_engine_that_is_filled_goes_on_bit_by_bit(number, on_ranks):
    for rank in on_ranks:
        _, before, (first, second) = rank[number]
        assert first[0] == second[0]
        for kind in KINDS:
            ours, theirs, old = (torch.cat([values[kind] for values in end]) for end in (first[1], second[1], before))
            assert torch.equal(ours, theirs) and not torch.equal(ours, old)
        assert first[2].keys() == second[2].keys()
        assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])
        assert {copy.dtype for copy in first[2].values()} == {getattr(torch, WAYS[number][1])}


@pytest.mark.parametrize("number", range(len(WAYS)), ids=[f"{dtype}-{stage}" for stage, dtype in WAYS])
def test_fragments_of_all_ranks_make_each_number_once(number, on_ranks):
    found: dict[str, list] = {}
    for rank in on_ranks:
        for name, size, start, count in rank[number][0]:
            found.setdefault(name, [size]).append((start, count))
    for name, (size, *pieces) in found.items():
        here = 0
        for start, count in sorted(pieces):
            assert start == here, name
            here += count
        assert here == size, name

"""Placements: local and full tensors, primary replicas over a mesh, the weights of step 0 in every layout.

The ranks of a mesh are emulated in one process: nothing is sent before the first step.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, MODULATIONS, configure

from megasora.build import build_model, patch_dim
from megasora.parallel.mesh import Axis, Mesh
from megasora.parallelize import build_local_model
from megasora.placement import Placement

SHARDINGS = st.tuples(  # shape before it is multiplied, shard_dim, num_chunks, tensor ranks
    st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 2), st.integers(1, 6), st.integers(1, 4)
)


@settings(deadline=None, max_examples=100)
@given(SHARDINGS)
def test_the_local_tensors_of_all_ranks_make_the_full_tensor_and_have_the_computed_shapes(sharding):
    shape, shard_dim, num_chunks, size = sharding
    shard_dim = shard_dim % len(shape)
    shape[shard_dim] *= num_chunks * size
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    placement = Placement(shard_dim=shard_dim, num_chunks=num_chunks)
    local_tensors = [placement.local(full, rank, size) for rank in range(size)]
    assert torch.equal(placement.full(local_tensors), full)
    assert all(placement.full_shape(local.shape, size) == full.shape for local in local_tensors)
    assert all(placement.local_shape(full.shape, size) == local.shape for local in local_tensors)
    assert sorted(torch.cat([local.flatten() for local in local_tensors]).tolist()) == list(range(full.numel()))


def test_each_chunk_is_sharded_by_itself():
    queries_keys_values = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23])
    placement = Placement(shard_dim=0, num_chunks=3)
    assert placement.local(queries_keys_values, 0, 2).tolist() == [0, 1, 10, 11, 20, 21]
    assert placement.local(queries_keys_values, 1, 2).tolist() == [2, 3, 12, 13, 22, 23]
    assert Placement(shard_dim=0).local(queries_keys_values, 1, 2).tolist() == [12, 13, 20, 21, 22, 23]


def test_without_a_shard_dim_every_rank_has_the_full_tensor():
    full = torch.randn(3, 5)
    for placement in (Placement(), Placement(partial_axes=("tensor", "pipeline"))):
        assert all(torch.equal(placement.local(full, rank, 4), full) for rank in range(4))
        assert torch.equal(placement.full([full, full + 1, full + 2]), full)
        assert placement.full_shape(full.shape, 4) == placement.local_shape(full.shape, 4) == full.shape


def emulated_mesh(config, processes, pipeline=0, tensor=0, context=0):
    """The mesh as one rank of it sees it, without process groups."""
    p = config.parallel
    ring = p.context // p.ulysses
    data = processes // (p.pipeline * p.context * p.tensor)
    axes = {
        "pipeline": (p.pipeline, pipeline), "data": (data, 0), "tensor": (p.tensor, tensor),
        "context": (p.context, context), "ring": (ring, context // p.ulysses),
        "ulysses": (p.ulysses, context % p.ulysses),
        "data_context": (data * p.context, context), "model": (p.pipeline * p.tensor, pipeline * p.tensor + tensor),
    }  # fmt: skip
    return Mesh(**{name: Axis(name, *size_and_rank, group=None) for name, size_and_rank in axes.items()})


@pytest.fixture
def no_barrier(monkeypatch):
    """The ranks of a ring wait for each other when their attention is built."""
    monkeypatch.setattr("megasora.parallel.context_attention.dist.barrier", lambda group: None)


def local_models(layout, modulation):
    """(config, [(mesh, local model)] of all ranks that together hold one copy of the weights)."""
    config = configure(layout, modulation)
    meshes = [
        emulated_mesh(config, layout.processes, pipeline, tensor, config.parallel.context - 1)
        for pipeline in range(config.parallel.pipeline)
        for tensor in range(config.parallel.tensor)
    ]
    return config, [(mesh, build_local_model(config, torch.device("cpu"), mesh)) for mesh in meshes]


def weights_of(local):
    return {name: p.detach() for stage in local.stages.values() for name, p in stage.named_parameters()}


def single_process_weights(config):
    model = build_model(config, patch_dim(config))
    model.initialise(config.run.seed)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_at_step_0_every_layout_has_the_weights_of_the_single_process_bit_for_bit(layout, modulation, no_barrier):
    config, models = local_models(layout, modulation)
    expected, primary_replicas, num_elements = single_process_weights(config), {}, 0
    for mesh, local in models:
        for name, weight in weights_of(local).items():
            placement = local.placements[name]
            own_part = placement.local(expected[name], mesh.tensor.rank, mesh.tensor.size)
            assert torch.equal(weight, own_part), (name, mesh.pipeline.rank, mesh.tensor.rank)
            if placement.is_primary_replica(mesh.pipeline.rank, mesh.tensor.rank):
                primary_replicas.setdefault(name, []).append(weight)
                num_elements += weight.numel()
    assert primary_replicas.keys() == expected.keys()
    placements = {name: p for _, local in models for name, p in local.placements.items()}
    for name, local_tensors in primary_replicas.items():
        assert torch.equal(placements[name].full(local_tensors), expected[name]), name
    assert num_elements == sum(weight.numel() for weight in expected.values())  # each element exactly once


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_a_rank_holds_its_part_of_the_blocks_and_no_more(modulation, no_barrier):
    layout = next(layout for layout in LAYOUTS if layout.name == "data=1,tensor=2,context=2,pipeline=2")
    config, models = local_models(layout, modulation)
    total = sum(w.numel() for name, w in single_process_weights(config).items() if name.startswith("blocks."))
    for _, local in models:
        local_total = sum(w.numel() for name, w in weights_of(local).items() if name.startswith("blocks."))
        assert total / 4 <= local_total < 1.1 * total / 4


def test_stages_of_one_rank_have_the_same_conditioning_modules(no_barrier):
    layout = next(layout for layout in LAYOUTS if "zbv" in layout.name and layout.processes == 2)
    _, models = local_models(layout, "shared")
    for _, local in models:
        first, second = local.stages.values()
        assert first.timestep is second.timestep and first.shared_modulation is second.shared_modulation
        assert first.null_text is second.null_text
        assert not set(first.blocks) & set(second.blocks)

"""Weights at step 0: any part of a tensor is that of the whole, with the distribution of its rule."""

import math

import pytest
import torch
from torch import nn

from megasora.model.init import DrawnWeights, xavier_bound
from megasora.placement import Placement

NAMES = ("blocks.0.mlp.up.weight", "timestep.0.weight")  # Xavier uniform, normal


def initial_value(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    value = torch.full(shape, torch.nan)
    DrawnWeights(seed).fill(value, name)
    return value


PLACEMENTS = [Placement(), Placement(0), Placement(1), Placement(0, 3), Placement(1, 2)]


@pytest.mark.parametrize("shape", [(12, 36), (12, 60, 3), (36, 12, 2, 2)])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_runs_are_the_places_of_a_local_tensor_in_the_full_one(placement, shape):
    full = torch.arange(math.prod(shape)).view(shape)
    for size in (1, 2, 3, 6):
        if placement.shard_dim is not None and shape[placement.shard_dim] % (size * placement.num_chunks):
            continue
        for rank in range(size):
            runs = placement.runs(full.shape, rank, size)
            places = runs.first + torch.arange(runs.count)[:, None] * runs.stride + torch.arange(runs.length)
            assert torch.equal(places.flatten(), placement.local(full, rank, size).flatten())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_rank_draws_its_part_of_the_full_tensor(name, placement):
    shape = torch.Size((126, 222))  # parts of 37 columns: rows that begin with the second half of a word, too
    full = initial_value(name, shape, seed=3)
    for size in (1, 2, 3):
        if placement.shard_dim is not None and shape[placement.shard_dim] % (size * placement.num_chunks):
            continue
        for rank in range(size):
            out = torch.full(placement.local_shape(shape, size), torch.nan)
            DrawnWeights(3).fill(out, name, placement, rank, size)
            assert torch.equal(out, placement.local(full, rank, size))


def test_a_linear_layer_has_the_bounds_and_the_variance_of_xavier_uniform():
    shape = torch.Size((400, 300))
    x = initial_value("blocks.3.attention.qkv.weight", shape, 0).double().flatten()
    reference = nn.init.xavier_uniform_(torch.empty(shape)).double()
    bound = math.sqrt(6 / 700)
    assert bound * 0.9999 < float(x.abs().max()) < bound
    assert abs(float(x.mean())) < 4 * bound / (3 * len(x)) ** 0.5
    assert float(x.std()) == pytest.approx(float(reference.std()), rel=0.01)
    for fans in ((400, 300), (8, 6, 3, 3), (5, 7, 2)):
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(torch.empty(fans))
        assert xavier_bound(torch.Size(fans)) == math.sqrt(6 / (fan_in + fan_out))


def test_the_bound_is_that_of_the_full_shape():
    out = torch.empty(50, 100)
    DrawnWeights(0).fill(out, "blocks.0.mlp.up.weight", Placement(0), 1, 8)
    assert 0.99 * math.sqrt(6 / 500) < float(out.abs().max()) < math.sqrt(6 / 500)


def test_normals_have_their_standard_deviation_and_vectors_of_norms_are_one():
    x = initial_value("timestep.0.weight", torch.Size((500, 400)), 0).double()
    assert float(x.std()) == pytest.approx(0.02, rel=0.01) and abs(float(x.mean())) < 4 * 0.02 / 200_000**0.5
    assert bool((initial_value("blocks.0.attention.q_norm.weight", torch.Size((9,)), 0) == 1).all())
    assert not initial_value("patch_out.weight", torch.Size((9, 5)), 0).any()


def test_rows_parameters_and_seeds_are_independent():
    shape, n = torch.Size((300, 512)), 300 * 512
    a = initial_value("blocks.0.mlp.up.weight", shape, 0).double()
    others = (
        initial_value("blocks.1.mlp.up.weight", shape, 0), initial_value("blocks.0.mlp.down.weight", shape, 0),
        initial_value("blocks.0.mlp.up.weight", shape, 1), a.roll(1, 0), a.roll(1, 1), a.roll(2, 1),
    )  # fmt: skip
    for b in others:
        correlation = float((a * b).mean() / (a.std() * b.double().std()))
        assert abs(correlation) < 4 / n**0.5


def test_a_name_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="no rule initialises parameter 'blocks.0.gain'"):
        initial_value("blocks.0.gain", torch.Size((3,)), 0)

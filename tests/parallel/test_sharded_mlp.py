"""The MLP whose matrices are sharded over the tensor axis has the values and gradients of one process, in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megasora.model.block import MLP
from megasora.parallel.mesh import Axis
from megasora.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from megasora.parallel.weight_grad_store import WeightGradStore, apply_deferred_weight_grads
from megasora.placement import Placement
from megasora.testing.spawn import run_ranks

RANKS, TOKENS, WIDTH, HIDDEN = 2, 6, 5, 12
PLACEMENTS = {
    "up.weight": Placement(shard_dim=0),
    "up.bias": Placement(shard_dim=0),
    "down.weight": Placement(shard_dim=1),
    "down.bias": Placement(partial_axes=("tensor",)),
}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full_mlp():
    mlp = MLP(WIDTH, HIDDEN, "torch").double()
    for seed, parameter in enumerate(mlp.parameters()):
        nn.init.zeros_(parameter).data.copy_(normal(*parameter.shape, seed=seed))
    return mlp


def results_of(mlp, x, grad):
    y = mlp(x)
    y.backward(grad)
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in mlp.named_parameters()}}


def on_one_rank(deferred):
    rank = dist.get_rank()
    axis, mlp, full = Axis("tensor", RANKS, rank, dist.group.WORLD), full_mlp(), full_mlp()
    mlp.up, mlp.down = ColumnParallelLinear(mlp.up, axis), RowParallelLinear(mlp.down, axis)
    with torch.no_grad():
        for name, parameter in mlp.double().named_parameters():
            parameter.copy_(PLACEMENTS[name].local(full.get_parameter(name), rank, RANKS))
    store = WeightGradStore()
    if deferred:
        apply_deferred_weight_grads(mlp, store)
    tokens = slice(rank * TOKENS // RANKS, (rank + 1) * TOKENS // RANKS)
    x = normal(TOKENS, WIDTH, seed=10)[tokens].requires_grad_()
    results = results_of(mlp, x, normal(TOKENS, WIDTH, seed=11)[tokens])
    assert all((results[name] is None) == deferred for name in ("up.weight", "down.weight"))
    store.pop()()
    return results | {name: p.grad for name, p in mlp.named_parameters()}


@pytest.mark.parametrize("deferred", [False, True])
def test_values_and_gradients_are_those_of_one_process(deferred):
    x = normal(TOKENS, WIDTH, seed=10).requires_grad_()
    expected = results_of(full_mlp(), x, normal(TOKENS, WIDTH, seed=11))
    ranks = run_ranks(on_one_rank, RANKS, deferred)
    for name, full in expected.items():
        if name in ("y", "x"):
            found, wanted = [r[name] for r in ranks], full.chunk(RANKS)
        elif name == "down.bias":
            found, wanted = [sum(r[name] for r in ranks)], [full]
        else:
            found = [r[name] for r in ranks]
            wanted = [PLACEMENTS[name].local(full, rank, RANKS) for rank in range(RANKS)]
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")

"""Linears that are sharded over ranks give the values and gradients of nn.Linear on one process, in float64."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as _symmetric_memory
from torch import nn

from megasora.config import load
from megasora.model.attention import AcrossHeadsNorm
from megasora.parallel import symmetric_memory, tensor
from megasora.parallel.collectives import all_gather_async, all_reduce_sum, reduce_scatter_async
from megasora.parallel.mesh import Axis
from megasora.parallel.tensor import ColumnParallelLinear, GatherChunkedOutput, RowParallelLinear
from megasora.parallel.weight_grad_store import WeightGradStore
from megasora.parallelize import symmetric_memory_obstacle
from megasora.placement import Placement
from megasora.testing.spawn import run_ranks

RANKS, TOKENS, INPUTS, OUTPUTS = 2, 6, 5, 12  # all different
HEADS, HEAD_DIM = 4, 3
BOUND = 1e-13
COLUMN = {  # options of ColumnParallelLinear
    "column": dict(sequence_parallel=True),
    "column of three chunks": dict(sequence_parallel=True, num_chunks=3),
    "column of a replicated input": dict(sequence_parallel=False, num_chunks=2),
    "column with gathered output": dict(sequence_parallel=False, gather_output=True),
    "column of six chunks with gathered output": dict(sequence_parallel=False, gather_output=True, num_chunks=6),
}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build_linear(inputs, outputs):
    linear = nn.Linear(inputs, outputs, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(normal(outputs, inputs, seed=1))
        linear.bias.copy_(normal(outputs, seed=2))
    return linear


def load_local(module, full, placements, rank):
    """Copies this rank's shard of each parameter of `full` into `module`."""
    with torch.no_grad():
        for name, placement in placements.items():
            getattr(module, name).copy_(placement.local(getattr(full, name), rank, RANKS))


def results_of(y, x, module, **extra):
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in module.named_parameters()}, **extra}


# ---------------------------------------------------------------------- the cases: one rank, or all in one process


def column_case(options, axis):
    """x, y and their gradients are sharded by tokens (dim 0) or by outputs (dim 1), or replicated.

    On a rank (`axis`) its results; without, the expected ones and how each is placed.
    """
    num_chunks, gather_output = options.get("num_chunks", 1), options.get("gather_output", False)
    linear, x, grad_y = build_linear(INPUTS, OUTPUTS), normal(TOKENS, INPUTS, seed=3), normal(TOKENS, OUTPUTS, seed=4)
    by_output = Placement(shard_dim=1, num_chunks=num_chunks)
    by_row = Placement(shard_dim=0, num_chunks=num_chunks)
    of_x = Placement(shard_dim=0) if options["sequence_parallel"] else Placement()
    if axis is None:
        x.requires_grad_()
        y = linear(x)
        y.backward(grad_y)
        of_y = Placement() if gather_output else by_output
        return results_of(y, x, linear), {"y": of_y, "x": of_x, "weight": by_row, "bias": by_row}
    module = ColumnParallelLinear(linear, axis, **options)
    load_local(module, linear, {"weight": by_row, "bias": by_row}, axis.rank)
    x = of_x.local(x, axis.rank, RANKS).clone().requires_grad_()
    y = module(x)
    # each rank uses a gathered output for its own tokens: its gradient is one summand
    y.backward(grad_y * (0.25 + 0.5 * axis.rank) if gather_output else by_output.local(grad_y, axis.rank, RANKS))
    return results_of(y, x, module)


def row_case(axis):
    linear, x, grad_y = build_linear(OUTPUTS, INPUTS), normal(TOKENS, OUTPUTS, seed=3), normal(TOKENS, INPUTS, seed=4)
    by_token, by_column = Placement(shard_dim=0), Placement(shard_dim=1)
    if axis is None:
        x.requires_grad_()
        y = linear(x)
        y.backward(grad_y)
        return results_of(y, x, linear), {"y": by_token, "x": by_column, "weight": by_column, "bias": "sum"}
    module = RowParallelLinear(linear, axis)
    load_local(module, linear, {"weight": by_column, "bias": Placement()}, axis.rank)
    x = by_column.local(x, axis.rank, RANKS).clone().requires_grad_()
    y = module(x)
    y.backward(by_token.local(grad_y, axis.rank, RANKS))
    return results_of(y, x, module)


def across_heads_norm_case(axis):
    """A rank has some of the heads of every token."""
    x, grad_y = normal(TOKENS, HEADS, HEAD_DIM, seed=3), normal(TOKENS, HEADS, HEAD_DIM, seed=4)
    full = AcrossHeadsNorm(HEADS * HEAD_DIM, "auto").double()
    by_head, of_weight = Placement(shard_dim=1), Placement(shard_dim=0)
    with torch.no_grad():
        full.weight.copy_(normal(HEADS * HEAD_DIM, seed=1))
    if axis is None:
        x.requires_grad_()
        y = full(x)
        y.backward(grad_y)
        return results_of(y, x, full), {"y": by_head, "x": by_head, "weight": of_weight}
    module = AcrossHeadsNorm(HEADS * HEAD_DIM, "auto")
    module.weight = nn.Parameter(of_weight.local(full.weight.detach(), axis.rank, RANKS).clone())
    module.sum_over_heads = lambda local_sum: all_reduce_sum(local_sum, axis)
    x = by_head.local(x, axis.rank, RANKS).clone().requires_grad_()
    y = module(x)
    y.backward(by_head.local(grad_y, axis.rank, RANKS))
    return results_of(y, x, module)


def gather_chunked_output_case(axis):
    full, grad_y = normal(TOKENS, OUTPUTS, seed=3), normal(TOKENS, OUTPUTS, seed=4)
    placement = Placement(shard_dim=1, num_chunks=3)
    if axis is None:
        return {"y": full, "x": grad_y}, {"y": Placement(), "x": placement}
    x = placement.local(full, axis.rank, RANKS).clone().requires_grad_()
    y = GatherChunkedOutput.apply(x, axis, 3)
    y.backward(grad_y * (0.25 + 0.5 * axis.rank))
    return {"y": y.detach(), "x": x.grad}


def mlp_case(axis):
    """Column, activation, row: sharded tokens in and out."""
    up, down = build_linear(INPUTS, OUTPUTS), build_linear(OUTPUTS, INPUTS)
    x, grad_y = normal(TOKENS, INPUTS, seed=3), normal(TOKENS, INPUTS, seed=4)
    by_row, by_column = Placement(shard_dim=0), Placement(shard_dim=1)
    if axis is not None:
        column, row = ColumnParallelLinear(up, axis), RowParallelLinear(down, axis)
        load_local(column, up, {"weight": by_row, "bias": by_row}, axis.rank)
        load_local(row, down, {"weight": by_column, "bias": Placement()}, axis.rank)
        up, down = column, row
        x, grad_y = (by_row.local(t, axis.rank, RANKS).clone() for t in (x, grad_y))
    x.requires_grad_()
    y = down(torch.tanh(up(x)))
    y.backward(grad_y)
    results = {"y": y.detach(), "x": x.grad, "up": up.weight.grad, "up.bias": up.bias.grad, "down": down.weight.grad}
    results["down.bias"] = down.bias.grad
    placements = {"y": by_row, "x": by_row, "up": by_row, "up.bias": by_row, "down": by_column, "down.bias": "sum"}
    return results if axis is not None else (results, placements)


CASES = {name: partial(column_case, options) for name, options in COLUMN.items()}
CASES |= {
    "row": row_case,
    "norm across heads": across_heads_norm_case,
    "gathered chunks": gather_chunked_output_case,
    "column and row": mlp_case,
}


# ---------------------------------------------------------------------- gradients that are not needed


def backward_of(module, x, grad_y, needed):
    """(names of the gradients, collectives of the backward pass) if only `needed` require a gradient."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in needed)
        parameter.grad = None
    x = x.clone().requires_grad_("x" in needed)
    y = module(x)
    calls = []

    def recorded(name, original):
        return patch.object(tensor, name, lambda *args: (calls.append(name), original(*args))[1])

    with recorded("all_gather_async", all_gather_async), recorded("reduce_scatter_async", reduce_scatter_async):
        y.backward(grad_y)
    gradients = {name for name, p in module.named_parameters() if p.grad is not None}
    return gradients | ({"x"} if x.grad is not None else set()), sorted(calls)


def needed_gradients(axis):
    column, row = (
        ColumnParallelLinear(build_linear(INPUTS, OUTPUTS), axis),
        RowParallelLinear(build_linear(OUTPUTS, INPUTS), axis),
    )
    local_tokens, local_outputs = TOKENS // RANKS, OUTPUTS // RANKS
    for module in (column, row):
        for parameter in module.parameters():
            nn.init.ones_(parameter)
    inputs = {
        "column": (column, normal(local_tokens, INPUTS, seed=5), normal(TOKENS, local_outputs, seed=6)),
        "row": (row, normal(TOKENS, local_outputs, seed=5), normal(local_tokens, INPUTS, seed=6)),
    }
    return {(name, needed): backward_of(*inputs[name], needed) for name, needed in COLLECTIVES}


COLLECTIVES = {  # (linear, needed gradients): collectives of the backward pass
    ("column", ("x",)): ["reduce_scatter_async"],
    ("column", ("weight",)): ["all_gather_async"],
    ("column", ("bias",)): [],
    ("column", ("x", "weight", "bias")): ["all_gather_async", "reduce_scatter_async"],
    ("row", ("x",)): ["all_gather_async"],
    ("row", ("weight",)): ["all_gather_async"],
    ("row", ("bias",)): [],
    ("row", ("x", "weight", "bias")): ["all_gather_async"],
}


def deferred_gradients(axis):
    """{linear: gradients computed at once, and with the weight's deferred to a store}."""
    results = {}
    for name, linear_type in (("column", ColumnParallelLinear), ("row", RowParallelLinear)):
        inputs, outputs = (INPUTS, OUTPUTS) if name == "column" else (OUTPUTS, INPUTS)
        gradients = []
        for store in (None, WeightGradStore()):
            module = linear_type(build_linear(inputs, outputs), axis)
            for parameter in module.parameters():
                nn.init.ones_(parameter)
            module.wgrad_store = store
            rows = TOKENS // RANKS if name == "column" else TOKENS
            x = normal(rows, module.weight.shape[1], seed=7 + axis.rank).requires_grad_()
            module(x).square().sum().backward()
            if store is not None:
                assert module.weight.grad is None and len(store.deferred) == 1
                store.pop()()
            gradients.append((x.grad, module.weight.grad, module.bias.grad))
        results[name] = gradients
    return results


# ---------------------------------------------------------------------- symmetric memory

SYMMETRIC = ("column", "column of three chunks", "row", "column and row")


def symmetric_cases(axis):
    """(results of SYMMETRIC with PyTorch's operators, whose own fallback computes on CPUs by collectives; names of the
    operators that "column and row" called; obstacles: here, without the check of the device, if rank 1 errs, if it is
    on another node)."""
    library, called = torch.library.Library("symm_mem", "IMPL"), []
    for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        fallback = getattr(_symmetric_memory, f"_{name}_fallback")
        library.impl(name, lambda *args, f=fallback, n=name, **kwargs: (called.append(n), f(*args, **kwargs))[1], "CPU")
    with patch.object(tensor.TensorParallelLinear, "uses_symmetric_memory", True):
        results = {name: CASES[name](axis) for name in SYMMETRIC if not called.clear()}
    calls, device = list(called), torch.device("cpu")
    obstacles = [symmetric_memory.obstacle(axis, device)]
    with patch.object(symmetric_memory, "missing", lambda *args: None):
        obstacles.append(symmetric_memory.obstacle(axis, device))
        with patch.object(symmetric_memory, "matmul_reduce_scatter", without_sum if axis.rank == 1 else unchanged):
            obstacles.append(symmetric_memory.obstacle(axis, device))
        with patch.object(symmetric_memory.platform, "node", lambda: f"node{axis.rank}"):
            obstacles.append(symmetric_memory.obstacle(axis, device))
    return results, calls, obstacles


unchanged = symmetric_memory.matmul_reduce_scatter


def without_sum(x, matrix, axis):
    return unchanged(x, matrix, axis) / 2


# ---------------------------------------------------------------------- ranks


def run_cases():
    axis = Axis("tensor", RANKS, dist.get_rank(), dist.group.WORLD)
    results = {name: case(axis) for name, case in CASES.items()}
    return results, needed_gradients(axis), deferred_gradients(axis), symmetric_cases(axis)


@pytest.fixture(scope="module")
def on_ranks():
    return run_ranks(run_cases, RANKS)


def check_against_the_full_matrix(name, by_rank):
    expected, placements = CASES[name](None)
    assert by_rank[0].keys() == expected.keys() == placements.keys()
    for what, placement in placements.items():
        local_tensors = [results[what] for results in by_rank]
        if placement == "sum":  # each rank has added the bias to its own tokens only
            actual = sum(local_tensors)
        else:
            actual = placement.full(local_tensors)
            is_replicated = placement.shard_dim is None
            assert not is_replicated or all(torch.equal(local, local_tensors[0]) for local in local_tensors), what
        assert actual.shape == expected[what].shape
        error = (actual - expected[what]).abs().max() / expected[what].abs().max()
        assert float(error) <= BOUND, (what, float(error))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_full_matrix(name, on_ranks):
    check_against_the_full_matrix(name, [rank[0][name] for rank in on_ranks])


@pytest.mark.parametrize("name", SYMMETRIC)
def test_values_and_gradients_over_symmetric_memory_are_those_of_the_full_matrix(name, on_ranks):
    check_against_the_full_matrix(name, [rank[3][0][name] for rank in on_ranks])


def test_the_four_products_with_communication_use_symmetric_memory(on_ranks):
    gather, scatter = "fused_all_gather_matmul", "fused_matmul_reduce_scatter"
    for rank in on_ranks:
        assert rank[3][1] == [gather, scatter, gather, scatter]  # column and row, then their gradients


def test_all_ranks_know_why_symmetric_memory_is_not_used(on_ranks):
    for rank in on_ranks:
        assert rank[3][2] == [
            "it needs GPUs, not cpu", None, "the summed product is wrong", "its ranks are on 2 nodes",
        ]  # fmt: skip


@pytest.mark.parametrize(
    "settings, obstacle",
    [
        ([], None),
        (["parallel.symmetric_memory=true"], "of this axis"),
        (["parallel.symmetric_memory=true", "model.fp8_recipe=rowwise"], "products in FP8 use collectives"),
    ],
)
def test_symmetric_memory_is_for_products_in_the_dtype_of_the_model(settings, obstacle):
    axis, device = Axis("tensor", 2, 0, None), torch.device("cpu")
    with patch.object(symmetric_memory, "obstacle", lambda axis, device: "of this axis"):
        assert symmetric_memory_obstacle(load(None, settings), axis, device) == obstacle


@pytest.mark.parametrize("name, needed", COLLECTIVES)
def test_a_gradient_that_is_not_needed_is_neither_computed_nor_sent(name, needed, on_ranks):
    for rank in on_ranks:
        gradients, collectives = rank[1][name, needed]
        assert gradients == set(needed)
        assert collectives == COLLECTIVES[name, needed]


@pytest.mark.parametrize("name", ["column", "row"])
def test_a_deferred_weight_gradient_is_bit_for_bit_the_same(name, on_ranks):
    for rank in on_ranks:
        at_once, deferred = rank[2][name]
        assert all(torch.equal(a, b) for a, b in zip(at_once, deferred, strict=True))
        assert at_once[1].any()

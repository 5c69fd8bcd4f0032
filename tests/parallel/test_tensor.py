"""Linears whose matrix is spread over ranks, against nn.Linear on one process in float64: values and all gradients."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megasora.model.attention import AcrossHeadsNorm
from megasora.parallel import tensor
from megasora.parallel.collectives import all_reduce_sum
from megasora.parallel.mesh import Axis
from megasora.parallel.tensor import ColumnParallelLinear, GatherChunkedOutput, RowParallelLinear
from megasora.placement import Placement
from megasora.testing.spawn import run_ranks

RANKS, TOKENS, INPUTS, OUTPUTS = 2, 6, 5, 12  # no two alike
HEADS, HEAD_DIM = 4, 3
BOUND = 1e-13
COLUMN = {  # options of ColumnParallelLinear: what x is on a rank, and what y
    "column": dict(sequence_parallel=True),
    "column of three runs": dict(sequence_parallel=True, num_chunks=3),
    "column of what all ranks have": dict(sequence_parallel=False, num_chunks=2),
    "column that is gathered": dict(sequence_parallel=False, gather_output=True),
    "column of six runs that are gathered": dict(sequence_parallel=False, gather_output=True, num_chunks=6),
}


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_of(inputs, outputs):
    linear = nn.Linear(inputs, outputs, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(drawn(outputs, inputs, seed=1))
        linear.bias.copy_(drawn(outputs, seed=2))
    return linear


def fill(module, full, placements, rank):
    with torch.no_grad():
        for name, placement in placements.items():
            getattr(module, name).copy_(placement.local(getattr(full, name), rank, RANKS))


def results_of(y, x, module, **extra):
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in module.named_parameters()}, **extra}


# ---------------------------------------------------------------------- the cases: a rank's part, and the whole


def column_case(options, axis):
    """x, y and their gradients are cut by tokens (first dim) or by outputs (last dim), or every rank has them whole."""
    runs, tokens, whole = options.get("num_chunks", 1), options["sequence_parallel"], options.get("gather_output", False)
    linear, x, grad_y = linear_of(INPUTS, OUTPUTS), drawn(TOKENS, INPUTS, seed=3), drawn(TOKENS, OUTPUTS, seed=4)
    by_output = Placement(shard_dim=1, num_chunks=runs)
    by_row = Placement(shard_dim=0, num_chunks=runs)
    if axis is None:
        x.requires_grad_()
        y = linear(x)
        y.backward(grad_y)
        return results_of(y, x, linear), {
            "y": Placement() if whole else by_output, "x": Placement(shard_dim=0) if tokens else Placement(),
            "weight": by_row, "bias": by_row,
        }  # fmt: skip
    module = ColumnParallelLinear(linear, axis, **options)
    fill(module, linear, {"weight": by_row, "bias": by_row}, axis.rank)
    x = Placement(shard_dim=0).local(x, axis.rank, RANKS).clone() if tokens else x
    x.requires_grad_()
    y = module(x)
    # what every rank has whole is used by every rank for its own tokens: its gradient is a part of the sum
    part = grad_y * (0.25 + 0.5 * axis.rank) if whole else by_output.local(grad_y, axis.rank, RANKS)
    y.backward(part)
    return results_of(y, x, module)


def row_case(axis):
    linear, x, grad_y = linear_of(OUTPUTS, INPUTS), drawn(TOKENS, OUTPUTS, seed=3), drawn(TOKENS, INPUTS, seed=4)
    if axis is None:
        x.requires_grad_()
        y = linear(x)
        y.backward(grad_y)
        places = {"y": Placement(shard_dim=0), "x": Placement(shard_dim=1), "weight": Placement(shard_dim=1), "bias": "sum"}
        return results_of(y, x, linear), places
    module = RowParallelLinear(linear, axis)
    fill(module, linear, {"weight": Placement(shard_dim=1), "bias": Placement()}, axis.rank)
    x = Placement(shard_dim=1).local(x, axis.rank, RANKS).clone().requires_grad_()
    y = module(x)
    y.backward(Placement(shard_dim=0).local(grad_y, axis.rank, RANKS))
    return results_of(y, x, module)


def width_norm_case(axis):
    """A rank has some of the heads of every token."""
    x, grad_y = drawn(TOKENS, HEADS, HEAD_DIM, seed=3), drawn(TOKENS, HEADS, HEAD_DIM, seed=4)
    full, by_head, of_weight = AcrossHeadsNorm(HEADS * HEAD_DIM, "auto").double(), Placement(shard_dim=1), Placement(shard_dim=0)
    with torch.no_grad():
        full.weight.copy_(drawn(HEADS * HEAD_DIM, seed=1))
    if axis is None:
        x.requires_grad_()
        y = full(x)
        y.backward(grad_y)
        return results_of(y, x, full), {"y": by_head, "x": by_head, "weight": of_weight}
    module = AcrossHeadsNorm(HEADS * HEAD_DIM, "auto")
    module.weight = nn.Parameter(of_weight.local(full.weight.detach(), axis.rank, RANKS).clone())
    module.sum_over_heads = lambda part: all_reduce_sum(part, axis)
    x = by_head.local(x, axis.rank, RANKS).clone().requires_grad_()
    y = module(x)
    y.backward(by_head.local(grad_y, axis.rank, RANKS))
    return results_of(y, x, module)


def join_runs_case(axis):
    x, grad_y, places = drawn(TOKENS, OUTPUTS, seed=3), drawn(TOKENS, OUTPUTS, seed=4), Placement(shard_dim=1, num_chunks=3)
    if axis is None:
        return {"y": x, "x": grad_y}, {"y": Placement(), "x": places}
    part = places.local(x, axis.rank, RANKS).clone().requires_grad_()
    y = GatherChunkedOutput.apply(part, axis, 3)
    y.backward(grad_y * (0.25 + 0.5 * axis.rank))
    return {"y": y.detach(), "x": part.grad}


def mlp_case(axis):
    """Column, activation, row: the tokens of a rank in, and out again."""
    up, down = linear_of(INPUTS, OUTPUTS), linear_of(OUTPUTS, INPUTS)
    x, grad_y, by_token = drawn(TOKENS, INPUTS, seed=3), drawn(TOKENS, INPUTS, seed=4), Placement(shard_dim=0)
    if axis is not None:
        column, row = ColumnParallelLinear(up, axis), RowParallelLinear(down, axis)
        fill(column, up, {"weight": Placement(shard_dim=0), "bias": Placement(shard_dim=0)}, axis.rank)
        fill(row, down, {"weight": Placement(shard_dim=1), "bias": Placement()}, axis.rank)
        up, down = column, row
        x, grad_y = (by_token.local(t, axis.rank, RANKS).clone() for t in (x, grad_y))
    x.requires_grad_()
    y = down(torch.tanh(up(x)))
    y.backward(grad_y)
    found = {"y": y.detach(), "x": x.grad, "up": up.weight.grad, "up.bias": up.bias.grad, "down": down.weight.grad}
    found["down.bias"] = down.bias.grad
    places = {"y": by_token, "x": by_token, "up": Placement(shard_dim=0), "up.bias": Placement(shard_dim=0)}
    return found if axis is not None else (found, {**places, "down": Placement(shard_dim=1), "down.bias": "sum"})


CASES = {name: partial(column_case, options) for name, options in COLUMN.items()}
CASES |= {"row": row_case, "width norm": width_norm_case, "joined runs": join_runs_case, "column and row": mlp_case}


# ---------------------------------------------------------------------- what is not needed


def frozen(module, x, grad_y, wanted):
    """Which gradients there are, and how many collectives the backward pass made, if only `wanted` need one."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in wanted)
        parameter.grad = None
    x = x.clone().requires_grad_("x" in wanted)
    y = module(x)
    made, originals = [], {name: getattr(tensor, name) for name in ("all_gather_async", "reduce_scatter_async")}
    for name, original in originals.items():
        setattr(tensor, name, lambda *given, name=name, original=original: (made.append(name), original(*given))[1])
    try:
        y.backward(grad_y)
    finally:
        for name, original in originals.items():
            setattr(tensor, name, original)
    found = {name for name, p in module.named_parameters() if p.grad is not None}
    return found | ({"x"} if x.grad is not None else set()), sorted(made)


def needed_gradients(axis):
    column, row = ColumnParallelLinear(linear_of(INPUTS, OUTPUTS), axis), RowParallelLinear(linear_of(OUTPUTS, INPUTS), axis)
    mine, part = TOKENS // RANKS, OUTPUTS // RANKS
    for module in (column, row):
        for parameter in module.parameters():
            nn.init.ones_(parameter)
    return {
        (name, wanted): frozen(module, *given, wanted)
        for name, module, given in (
            ("column", column, (drawn(mine, INPUTS, seed=5), drawn(TOKENS, part, seed=6))),
            ("row", row, (drawn(TOKENS, part, seed=5), drawn(mine, INPUTS, seed=6))),
        )
        for wanted in (("x",), ("weight",), ("bias",), ("x", "weight", "bias"))
    }


def put_off(axis):
    """The gradients of weights where `later` takes them: None at first, then as without it."""
    results = {}
    for name, case_of in (("column", ColumnParallelLinear), ("row", RowParallelLinear)):
        inputs, outputs = (INPUTS, OUTPUTS) if name == "column" else (OUTPUTS, INPUTS)
        gradients = []
        for later in (False, True):
            module, waiting = case_of(linear_of(inputs, outputs), axis), []
            for parameter in module.parameters():
                nn.init.ones_(parameter)
            module.later = (lambda weight, compute, to=waiting: to.append((weight, compute))) if later else None
            rows = TOKENS // RANKS if name == "column" else TOKENS
            x = drawn(rows, module.weight.shape[1], seed=7 + axis.rank).requires_grad_()
            module(x).square().sum().backward()
            if later:
                assert module.weight.grad is None and waiting[0][0] is module.weight and len(waiting) == 1
                with torch.no_grad():
                    module.weight.grad = waiting[0][1]()
            gradients.append((x.grad, module.weight.grad, module.bias.grad))
        results[name] = gradients
    return results


# ---------------------------------------------------------------------- ranks


def run_cases():
    axis = Axis("tensor", RANKS, dist.get_rank(), dist.group.WORLD)
    return {name: case(axis) for name, case in CASES.items()}, needed_gradients(axis), put_off(axis)


@pytest.fixture(scope="module")
def on_ranks():
    return run_ranks(run_cases, RANKS)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_whole_matrix(name, on_ranks):
    expected, places = CASES[name](None)
    found = [rank[0][name] for rank in on_ranks]
    assert found[0].keys() == expected.keys() == places.keys()
    for what, place in places.items():
        parts = [rank[what] for rank in found]
        if place == "sum":  # each rank has added it to its own tokens only
            put_together = sum(parts)
        else:
            put_together = place.full(parts)
            assert place.shard_dim is not None or all(torch.equal(part, parts[0]) for part in parts), what
        assert put_together.shape == expected[what].shape
        error = (put_together - expected[what]).abs().max() / expected[what].abs().max()
        assert float(error) <= BOUND, (what, float(error))


NEEDED = {  # collectives of the backward pass
    ("column", ("x",)): ["reduce_scatter_async"],
    ("column", ("weight",)): ["all_gather_async"],
    ("column", ("bias",)): [],
    ("column", ("x", "weight", "bias")): ["all_gather_async", "reduce_scatter_async"],
    ("row", ("x",)): ["all_gather_async"],
    ("row", ("weight",)): ["all_gather_async"],
    ("row", ("bias",)): [],
    ("row", ("x", "weight", "bias")): ["all_gather_async"],
}


@pytest.mark.parametrize("name, wanted", NEEDED)
def test_a_gradient_that_nobody_needs_is_neither_computed_nor_sent(name, wanted, on_ranks):
    for rank in on_ranks:
        gradients, collectives = rank[1][name, wanted]
        assert gradients == set(wanted)
        assert collectives == NEEDED[name, wanted]


@pytest.mark.parametrize("name", ["column", "row"])
def test_the_gradient_of_a_weight_that_is_put_off_is_the_same_bit_for_bit(name, on_ranks):
    for rank in on_ranks:
        at_once, later = rank[2][name]
        assert all(torch.equal(a, b) for a, b in zip(at_once, later, strict=True))
        assert at_once[1].any()

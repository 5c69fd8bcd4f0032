"""The proof that layouts train alike can fail: with one mistake made on purpose it is red, far above its bounds.

Each mistake is one that somebody could make: a sum over ranks left out, a hop not made, something counted twice. Two
ranks train with each of them in turn; what is compared, and how, is what test_layouts compares.
"""

import dataclasses
import math
from contextlib import ExitStack
from functools import cache
from unittest.mock import patch

import layouts
import pytest
import torch
from layouts import configure, layout, module_errors, single_process, step_errors, train_modules, train_steps

from megasora import parallelize
from megasora.parallel import collectives, context, share, tensor
from megasora.parallel.collectives import Join, Spread, Sum
from megasora.parallel.context import ContextAttention, Transfer
from megasora.parallel.placement import Placement
from megasora.parallel.zero import ZeroEngine
from megasora.testing.spawn import run_ranks

GREEN = {"modules": 1e-10, "steps": 2e-5}  # as in test_layouts
RED = 1e-3
SIZES = {  # both dialects; a model and a step small enough to be trained twenty times
    "tensor": (layout(2, tensor=2, depth=2, packs=2), "shared"),
    "context": (layout(2, context=2, depth=2, packs=2), "block"),
    "pipeline": (layout(2, pipeline=2, depth=2, packs=2), "shared"),
    "data": (layout(2, depth=2, packs=2), "block"),
}


def passed_on(ctx, grad):
    return grad, None


def my_part_alone(x, axis):
    return collectives.my_part(x, axis), None


def unsummed_placement(*given, original=parallelize.placement_of):
    return dataclasses.replace(original(*given), summed=())


def without_hops(*given, original=context.build_segments):
    return dataclasses.replace(original(*given), hops=())


def kept_keys_gradients(self, hop, gradients, like):
    return Transfer([], None, None)


def mean_of_parts(out_a, lse_a, out_b, lse_b):
    return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)


def share_from_the_start(*given, original=share.share_pack):
    found = original(*given)
    return dataclasses.replace(found, starts_G=torch.zeros_like(found.starts_G))


def unscaled_step(self, *given, original=ZeroEngine.train_step):
    mesh = self.mesh
    self.mesh = dataclasses.replace(mesh, zero=dataclasses.replace(mesh.zero, size=1))
    try:
        return original(self, *given)
    finally:
        self.mesh = mesh


def counts_of_first_rank(self, mesh):
    return mesh.tensor.rank == 0


NO_COUNT = patch.object(Placement, "counts_here", lambda self, mesh: True)
NO_SUMS_TOLD = patch.object(parallelize, "placement_of", unsummed_placement)
MISTAKES = {  # (layout, what is compared, mistake): (how it is made, where it is seen)
    ("tensor", "modules", "gradients of what all ranks have are not summed"): (
        patch.object(Spread, "backward", staticmethod(passed_on)), "gradient of",
    ),
    ("tensor", "modules", "a norm's squares are not summed"): (
        patch.object(Sum, "forward", staticmethod(lambda ctx, x, axis: (setattr(ctx, "axis", axis), x.clone())[1])),
        "loss",
    ),
    ("tensor", "modules", "gradients of a norm's squares are not summed"): (
        patch.object(Sum, "backward", staticmethod(passed_on)), "gradient of",
    ),
    ("tensor", "modules", "gradients of joined tokens are scattered as a sum"): (
        patch.object(Join, "backward", staticmethod(lambda ctx, grad: (ctx.axis.size * collectives.my_part(grad, ctx.axis), None))),
        "gradient of",
    ),
    ("tensor", "modules", "products of matrix parts are not summed"): (
        patch.object(tensor, "start_scatter_sum", my_part_alone), "loss",
    ),
    ("tensor", "modules", "placements tell of no sums"): (NO_SUMS_TOLD, "gradient of"),
    ("tensor", "modules", "copies count in the norm too"): (NO_COUNT, "norm of"),
    ("tensor", "modules", "parts do not count in the norm"): (
        patch.object(Placement, "counts_here", counts_of_first_rank), "refused",
    ),
    ("tensor", "steps", "partial gradients are not summed"): (
        patch.object(ZeroEngine, "sum_partial_gradients", lambda self: None), "clipped gradient of",
    ),
    ("tensor", "steps", "copies count in the norm too"): (NO_COUNT, "norm of step 0"),
    ("context", "modules", "no hop is made"): (patch.object(context, "build_segments", without_hops), "loss"),
    ("context", "modules", "gradients of keys do not come back"): (
        patch.object(ContextAttention, "post_gradients", kept_keys_gradients), "gradient of",
    ),
    ("context", "modules", "parts of attention are averaged"): (
        patch.object(context, "merge_partial_attention", mean_of_parts), "loss",
    ),
    ("context", "modules", "noise begins anew on each rank"): (
        patch.object(share, "share_pack", share_from_the_start), "loss",
    ),
    ("pipeline", "modules", "placements tell of no sums"): (NO_SUMS_TOLD, "gradient of"),
    ("pipeline", "modules", "copies count in the norm too"): (NO_COUNT, "norm of"),
    ("pipeline", "steps", "partial gradients are not summed"): (
        patch.object(ZeroEngine, "sum_partial_gradients", lambda self: None), "clipped gradient of",
    ),
    ("data", "steps", "a rank divides by its own tokens"): (
        patch.object(collectives, "total", lambda values, axis: values), "loss of step 0",
    ),
    ("data", "steps", "the average over ranks is not made up for"): (
        patch.object(ZeroEngine, "train_step", unscaled_step), "norm of step 0",
    ),
}  # fmt: skip
NONE = {(name, kind, "none"): (None, "") for name, kind, _ in MISTAKES}
TRAINERS = {"modules": train_modules, "steps": train_steps}


def train_with_each_mistake():
    """Only rank by rank the same: every rank makes the mistake, or none."""
    results = {}
    for case, (mistake, _) in (NONE | MISTAKES).items():
        name, kind, _ = case
        with ExitStack() as stack:
            if mistake is not None:
                stack.enter_context(mistake)
            results[case] = TRAINERS[kind](configure(*SIZES[name]))
    return results


@cache
def on_ranks():
    return run_ranks(train_with_each_mistake, 2)


@cache
def expected(name, kind):
    config = configure(*SIZES[name])
    return single_process(config, *((torch.float64, 1) if kind == "modules" else (torch.float32, layouts.STEPS)))


def errors_of(case):
    name, kind, _ = case
    results = [rank[case] for rank in on_ranks()]
    try:
        if kind == "modules":
            return module_errors(results, expected(name, kind))
        return step_errors(results[0], expected(name, kind), configure(*SIZES[name]))
    except AssertionError:  # names or shapes are not those of the single process
        return {"refused": math.inf}


@pytest.mark.parametrize("case", NONE, ids=" ".join)
def test_without_a_mistake_the_comparison_is_green(case):
    errors = errors_of(case)
    assert all(error <= GREEN[case[1]] for error in errors.values()), errors


@pytest.mark.parametrize("case", MISTAKES, ids=": ".join)
def test_a_mistake_makes_the_comparison_red(case):
    seen = {what: error for what, error in errors_of(case).items() if what.startswith(MISTAKES[case][1])}
    assert seen and max(seen.values()) > RED, errors_of(case)

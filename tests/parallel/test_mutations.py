"""The proof that layouts train alike can fail: with one mistake made on purpose it is red, far above its bounds.

Each mistake is one that somebody could make: a sum over ranks left out, a hop not made, something counted twice. Two
ranks train with each of them in turn; what is compared, and how, is what test_layouts compares.
"""

import dataclasses
import math
from contextlib import nullcontext
from functools import cache
from unittest.mock import patch

import layouts
import pytest
import torch
from layouts import configure, layout, module_errors, single_process, step_errors, train_modules, train_steps

from megasora import parallelize
from megasora.batch import segment_ids
from megasora.errors import MegaSoraError
from megasora.kernels.rms_norm import RMSNorm
from megasora.parallel import collectives, context, share, tensor
from megasora.parallel.collectives import CopyToTensorParallel, GatherTokens
from megasora.parallel.context_attention import ContextAttention, Transfer
from megasora.parallel.zero import ZeroEngine
from megasora.placement import Placement
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


def part_of_sum(ctx, grad):
    return collectives.local_chunk(grad, ctx.axis) * ctx.axis.size, None


def norm_of_own_squares(ctx, x, weight, eps, size, total, via, original=RMSNorm.forward):
    y = original(ctx, x, weight, eps, size, None, via)
    ctx.total = total
    return y


def gradient_of_own_numbers(ctx, grad, original=RMSNorm.backward):
    ctx.total = None
    return original(ctx, grad)


def my_part_alone(x, axis):
    return collectives.local_chunk(x, axis), None


def unsummed_placement(*given, original=parallelize.placement_of):
    return dataclasses.replace(original(*given), partial_axes=())


def without_hops(*given, original=context.build_segments):
    return dataclasses.replace(original(*given), hops=())


def kept_keys_gradients(self, hop, gradients, like):
    return Transfer([], None, None)


def mean_of_parts(out_a, lse_a, out_b, lse_b):
    return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)


def share_from_the_start(*given, original=share.share_pack):
    found = original(*given)
    segment_L = segment_ids(found.cu_segments, len(found.positions_L))
    return dataclasses.replace(found, positions_L=torch.arange(len(segment_L)) - found.cu_segments[segment_L])


def unscaled_step(self, *given, original=ZeroEngine.train_step):
    mesh = self.mesh
    self.mesh = dataclasses.replace(mesh, data_context=dataclasses.replace(mesh.data_context, size=1))
    try:
        return original(self, *given)
    finally:
        self.mesh = mesh


def counts_of_first_rank(placement, pipeline_rank, tensor_rank):
    return tensor_rank == 0


NO_COUNT = patch.object(Placement, "is_primary_replica", lambda *_: True)
NO_SUMS_TOLD = patch.object(parallelize, "placement_of", unsummed_placement)
MISTAKES = {  # (layout, what is compared, mistake): (how it is made, where it is seen)
    ("tensor", "modules", "gradients of what all ranks have are not summed"): (
        patch.object(CopyToTensorParallel, "backward", staticmethod(passed_on)), "gradient of",
    ),
    ("tensor", "modules", "a norm is of a rank's own squares"): (
        patch.object(RMSNorm, "forward", staticmethod(norm_of_own_squares)), "loss",
    ),
    ("tensor", "modules", "a norm's gradient is of a rank's own numbers"): (
        patch.object(RMSNorm, "backward", staticmethod(gradient_of_own_numbers)), "gradient of",
    ),
    ("tensor", "modules", "what every rank does alike is summed"): (
        patch.object(GatherTokens, "backward", staticmethod(part_of_sum)), "gradient of",
    ),
    ("tensor", "modules", "products of matrix parts are not summed"): (
        patch.object(tensor, "reduce_scatter_async", my_part_alone), "loss",
    ),
    ("tensor", "modules", "placements tell of no sums"): (NO_SUMS_TOLD, "gradient of"),
    ("tensor", "modules", "copies count in the norm too"): (NO_COUNT, "norm of"),
    ("tensor", "modules", "parts do not count in the norm"): (
        patch.object(Placement, "is_primary_replica", counts_of_first_rank), "refused",
    ),
    ("tensor", "steps", "partial gradients are not summed"): (
        patch.object(ZeroEngine, "sum_partial_gradients", lambda self: None), "refused: step 0: parameter",
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
        patch.object(ZeroEngine, "sum_partial_gradients", lambda self: None), "refused: step 0: parameter",
    ),
    ("data", "steps", "a rank divides by its own tokens"): (
        patch.object(collectives, "all_reduce_sum", lambda values, axis: values), "loss of step 0",
    ),
    ("data", "steps", "the average over ranks is not made up for"): (
        patch.object(ZeroEngine, "train_step", unscaled_step), "norm of step 0",
    ),
}  # fmt: skip
NONE = {(name, kind, "none"): (None, "") for name, kind, _ in MISTAKES}
TRAINERS = {"modules": train_modules, "steps": train_steps}


def train_with_each_mistake(name):
    """{case: result} of one rank for the cases of a layout; in place of a result, why the debug guard ended it.

    All ranks make the mistake, or none does.
    """
    results = {}
    for case, (mistake, _) in (NONE | MISTAKES).items():
        if case[0] == name:
            try:
                with mistake or nullcontext():
                    results[case] = TRAINERS[case[1]](configure(*SIZES[name]))
            except MegaSoraError as error:
                results[case] = str(error)
    return results


@cache
def ranks(name):
    """What the ranks of the layout of this name have trained; an error is kept too, and not waited for in each test."""
    try:
        return run_ranks(train_with_each_mistake, 2, name)
    except (RuntimeError, TimeoutError) as error:
        return error


@cache
def expected(name, kind):
    config = configure(*SIZES[name])
    return single_process(config, *((torch.float64, 1) if kind == "modules" else (torch.float32, layouts.STEPS)))


def errors_of(case):
    name, kind, _ = case
    if isinstance(ranks(name), Exception):
        raise ranks(name)
    results = [rank[case] for rank in ranks(name)]
    if isinstance(results[0], str):
        return {f"refused: {results[0]}": math.inf}
    try:
        if kind == "modules":
            return module_errors(results, expected(name, kind))
        return step_errors(results[0], expected(name, kind), configure(*SIZES[name]))
    except AssertionError as error:  # names or shapes are not those of the single process
        return {f"refused: {error}": math.inf}


@pytest.mark.parametrize("case", NONE, ids=": ".join)
def test_without_a_mistake_the_comparison_is_green(case):
    errors = errors_of(case)
    assert all(error <= GREEN[case[1]] for error in errors.values()), errors


@pytest.mark.parametrize("case", MISTAKES, ids=": ".join)
def test_a_mistake_makes_the_comparison_red(case):
    errors = errors_of(case)
    seen = {what: error for what, error in errors.items() if what.startswith(MISTAKES[case][1])}
    assert seen and max(seen.values()) > RED, errors

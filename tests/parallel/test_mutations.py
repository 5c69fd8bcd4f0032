"""Mutation tests: the comparison of layouts fails, far above its bounds, if a fault is injected.

Each fault is a mistake that somebody could make: a missing sum over ranks, a missing exchange, a value counted twice.
Two ranks train with one fault after the other; the comparison is that of test_layouts.
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
from megasora.parallel import collectives, context_attention, tensor
from megasora.parallel.collectives import CopyToTensorParallel, GatherTokens
from megasora.parallel.context_attention import ContextAttention, Transfer
from megasora.parallel.zero import ZeroEngine
from megasora.placement import Placement
from megasora.tasks import dit
from megasora.testing.spawn import run_ranks

BOUNDS = {"modules": 1e-10, "steps": 2e-5}  # as in test_layouts
LEAST_ERROR = 1e-3  # with a fault
CASES = {  # both modulations; small enough to be trained twenty times
    "tensor": (layout(2, tensor=2, depth=2, packs=2), "shared"),
    "context": (layout(2, context=2, depth=2, packs=2), "block"),
    "pipeline": (layout(2, pipeline=2, depth=2, packs=2), "shared"),
    "data": (layout(2, depth=2, packs=2), "block"),
}


def backward_without_sum(ctx, grad):
    return grad, None


def backward_of_summed_chunk(ctx, grad):
    return collectives.local_chunk(grad, ctx.axis) * ctx.axis.size, None


def norm_of_local_squares(ctx, x, weight, eps, size, all_reduce, backend, original=RMSNorm.forward):
    y = original(ctx, x, weight, eps, size, None, backend)
    ctx.all_reduce = all_reduce
    return y


def gradient_of_local_elements(ctx, grad, original=RMSNorm.backward):
    ctx.all_reduce = None
    return original(ctx, grad)


def chunk_without_sum(x, axis):
    return collectives.local_chunk(x, axis), None


def placement_without_partial_axes(*arguments, original=parallelize.placement_of):
    return dataclasses.replace(original(*arguments), partial_axes=())


def segments_without_exchanges(*arguments, original=context_attention.build_context_segments):
    return dataclasses.replace(original(*arguments), exchanges=())


def no_returned_gradients(self, exchange, gradients, like):
    return Transfer([], None, None)


def mean_of_partial_outputs(out_a, lse_a, out_b, lse_b):
    return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)


def share_with_local_positions(*arguments, original=layouts.share_pack):
    share = original(*arguments)
    segment_L = segment_ids(share.cu_segments, len(share.positions_L))
    return dataclasses.replace(share, positions_L=torch.arange(len(segment_L)) - share.cu_segments[segment_L])


def step_without_scaled_loss(self, *arguments, original=ZeroEngine.forward_backward):
    mesh = self.mesh
    self.mesh = dataclasses.replace(mesh, data_context=dataclasses.replace(mesh.data_context, size=1))
    try:
        return original(self, *arguments)
    finally:
        self.mesh = mesh


def is_on_first_tensor_rank(placement, pipeline_rank, tensor_rank):
    return tensor_rank == 0


ALL_COPIES_PRIMARY = patch.object(Placement, "is_primary_replica", lambda *_: True)
NO_PARTIAL_AXES = patch.object(parallelize, "placement_of", placement_without_partial_axes)
FAULTS = {  # (layout, what is compared, fault): (patch, quantity that shows it)
    ("tensor", "modules", "gradients of replicated inputs are not summed"): (
        patch.object(CopyToTensorParallel, "backward", staticmethod(backward_without_sum)), "gradient of",
    ),
    ("tensor", "modules", "a norm uses the local squares only"): (
        patch.object(RMSNorm, "forward", staticmethod(norm_of_local_squares)), "loss",
    ),
    ("tensor", "modules", "a norm's gradient uses the local elements only"): (
        patch.object(RMSNorm, "backward", staticmethod(gradient_of_local_elements)), "gradient of",
    ),
    ("tensor", "modules", "the gradient of a replicated computation is summed"): (
        patch.object(GatherTokens, "backward", staticmethod(backward_of_summed_chunk)), "gradient of",
    ),
    ("tensor", "modules", "partial matrix products are not summed"): (
        patch.object(tensor, "reduce_scatter_async", chunk_without_sum), "loss",
    ),
    ("tensor", "modules", "placements have no partial axes"): (NO_PARTIAL_AXES, "gradient of"),
    ("tensor", "modules", "replicas count in the norm more than once"): (ALL_COPIES_PRIMARY, "norm of"),
    ("tensor", "modules", "shards do not count in the norm"): (
        patch.object(Placement, "is_primary_replica", is_on_first_tensor_rank), "error",
    ),
    ("tensor", "steps", "partial gradients are not summed"): (
        patch.object(ZeroEngine, "sum_partial_gradients", lambda self: None), "error: step 1: parameter",
    ),
    ("tensor", "steps", "replicas count in the norm more than once"): (ALL_COPIES_PRIMARY, "norm of step 0"),
    ("context", "modules", "no keys are exchanged"): (
        patch.object(context_attention, "build_context_segments", segments_without_exchanges), "loss",
    ),
    ("context", "modules", "gradients of keys are not returned"): (
        patch.object(ContextAttention, "post_gradients", no_returned_gradients), "gradient of",
    ),
    ("context", "modules", "partial attention outputs are averaged"): (
        patch.object(context_attention, "merge_partial_attention", mean_of_partial_outputs), "loss",
    ),
    ("context", "modules", "each rank draws noise from position 0"): (
        patch.object(layouts, "share_pack", share_with_local_positions), "loss",
    ),
    ("pipeline", "modules", "placements have no partial axes"): (NO_PARTIAL_AXES, "gradient of"),
    ("pipeline", "modules", "replicas count in the norm more than once"): (ALL_COPIES_PRIMARY, "norm of"),
    ("pipeline", "steps", "partial gradients are not summed"): (
        patch.object(ZeroEngine, "sum_partial_gradients", lambda self: None), "error: step 1: parameter",
    ),
    ("data", "steps", "a rank divides by its local tokens"): (
        patch.object(dit, "all_reduce_sum", lambda values, axis: values), "loss of step 0",
    ),
    ("data", "steps", "the loss is not scaled for the average over ranks"): (
        patch.object(ZeroEngine, "forward_backward", step_without_scaled_loss), "norm of step 0",
    ),
}  # fmt: skip
NO_FAULT = {(name, kind, "none"): (None, "") for name, kind, _ in FAULTS}
TRAINERS = {"modules": train_modules, "steps": train_steps}


def train_with_each_fault(name):
    """{case: result} of one rank for the cases of a layout; where the replica check raised, its message instead.

    All ranks have the fault, or none does.
    """
    results = {}
    for case, (fault, _) in (NO_FAULT | FAULTS).items():
        if case[0] == name:
            try:
                with fault or nullcontext():
                    results[case] = TRAINERS[case[1]](configure(*CASES[name]))
            except MegaSoraError as error:
                results[case] = str(error)
    return results


@cache
def results_of(name):
    """Results of all ranks for a layout; an error is returned, so that it is cached too."""
    try:
        return run_ranks(train_with_each_fault, 2, name)
    except (RuntimeError, TimeoutError) as error:
        return error


@cache
def expected(name, kind):
    config = configure(*CASES[name])
    return single_process(config, *((torch.float64, 1) if kind == "modules" else (torch.float32, layouts.STEPS)))


def errors_of(case):
    name, kind, _ = case
    if isinstance(results_of(name), Exception):
        raise results_of(name)
    results = [rank[case] for rank in results_of(name)]
    if isinstance(results[0], str):
        return {f"error: {results[0]}": math.inf}
    try:
        if kind == "modules":
            return module_errors(results, expected(name, kind))
        return step_errors(results[0], expected(name, kind), configure(*CASES[name]))
    except AssertionError as error:  # names or shapes differ from the single process
        return {f"error: {error}": math.inf}


@pytest.mark.parametrize("case", NO_FAULT, ids=": ".join)
def test_the_comparison_passes_without_a_fault(case):
    errors = errors_of(case)
    assert all(error <= BOUNDS[case[1]] for error in errors.values()), errors


@pytest.mark.parametrize("case", FAULTS, ids=": ".join)
def test_the_comparison_fails_with_a_fault(case):
    errors = errors_of(case)
    shown = {what: error for what, error in errors.items() if what.startswith(FAULTS[case][1])}
    assert shown and max(shown.values()) > LEAST_ERROR, errors

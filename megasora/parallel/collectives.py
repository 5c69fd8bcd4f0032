"""The collectives of the parallel layers: asynchronous calls, and autograd functions with their backward pass.

On an axis of size 1 each is the identity. Tensors are sharded along their first dim:

                            forward                     backward
    GatherTokens            all-gather                  this rank's chunk; all ranks compute the same with the output
    ScatterTokens           this rank's chunk           all-gather
    CopyToTensorParallel    identity                    all-reduce; for an input that is replicated on all ranks
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megasora.parallel.mesh import Axis

Pending = tuple[Tensor, dist.Work | None]  # the output of a collective, and the handle to wait for

# torch 2.13 renamed both, and warns at the old names
all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_async(x: Tensor, axis: Axis) -> Pending:
    """Starts an all-gather of [L, ...] to [size * L, ...]; the output is valid after `wait`."""
    if not axis.is_split:
        return x, None
    full = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    return full, all_gather_tensor(full, x.contiguous(), group=axis.group, async_op=True)


def reduce_scatter_async(x: Tensor, axis: Axis) -> Pending:
    """Starts a reduce-scatter (sum) of [size * L, ...] to [L, ...]; the output is valid after `wait`."""
    if not axis.is_split:
        return x, None
    chunk = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    return chunk, reduce_scatter_tensor(chunk, x.contiguous(), group=axis.group, async_op=True)


def all_reduce_async(x: Tensor, axis: Axis) -> Pending:
    """Starts an all-reduce (sum) of x in place; x is valid after `wait`."""
    return x, dist.all_reduce(x, group=axis.group, async_op=True) if axis.is_split else None


def all_to_all_async(x: Tensor, axis: Axis) -> Pending:
    """Starts an all-to-all: x [size, ...], what goes to each rank, to [size, ...], what came from each; the output is
    valid after `wait`."""
    if not axis.is_split:
        return x, None
    received = x.new_empty(x.shape)
    return received, dist.all_to_all_single(received, x.contiguous(), group=axis.group, async_op=True)


def wait(pending: Pending) -> Tensor:
    """Waits for a collective and returns its output."""
    x, work = pending
    if work is not None:
        work.wait()
    return x


def all_reduce_sum(x: Tensor, axis: Axis) -> Tensor:
    """The sum of x over an axis, in a new tensor, without a gradient."""
    return wait(all_reduce_async(x.detach().clone(), axis))


def all_reduce_max(x: Tensor, axis: Axis) -> Tensor:
    """The maximum of x over an axis, element by element; x itself on an axis of size 1."""
    if not axis.is_split:
        return x
    highest = x.detach().clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=axis.group)
    return highest


def all_reduce_min(x: Tensor, axis: Axis) -> Tensor:
    """The minimum of x over an axis, element by element, in a new tensor."""
    lowest = x.detach().clone()
    if axis.is_split:
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=axis.group)
    return lowest


def local_chunk(x: Tensor, axis: Axis) -> Tensor:
    """This rank's chunk of x along its first dim; a view."""
    return x.chunk(axis.size)[axis.rank] if axis.is_split else x


class GatherTokens(Function):
    """All-gather of tokens [L/t, ...] to [L, ...], all of which every rank uses identically."""

    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return wait(all_gather_async(x, axis))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return local_chunk(grad, ctx.axis), None


class ScatterTokens(Function):
    """This rank's chunk [L/t, ...] of tokens [L, ...] that all ranks have; the inverse of GatherTokens."""

    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return local_chunk(x, axis).clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return wait(all_gather_async(grad, ctx.axis)), None


class CopyToTensorParallel(Function):
    """The identity for a replicated input; its gradients, different on each rank, are all-reduced."""

    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return wait(all_reduce_async(grad.clone(), ctx.axis)), None

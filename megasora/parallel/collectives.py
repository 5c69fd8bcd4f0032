"""The few collectives that parallel layers are made of, with their backward passes.

`x [L, ...]` is cut along its first dim unless a name says otherwise. On an axis of one rank each is the identity.

    forward           backward
    join: gather      my part       every rank does the same with the whole
    split: my part    gather        the inverse of join
    spread: nothing   sum           every rank has the same, and does something of its own with it
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megasora.parallel.mesh import Axis

Pending = tuple[Tensor, dist.Work | None]

# torch 2.13 renamed both, and warns at the old names
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start_gather(x: Tensor, axis: Axis) -> Pending:
    """[L, ...] of each rank to [size * L, ...] on all, while something else is computed; see `finish`."""
    if not axis.is_split:
        return x, None
    full = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    return full, all_gather(full, x.contiguous(), group=axis.group, async_op=True)


def start_scatter_sum(x: Tensor, axis: Axis) -> Pending:
    """[size * L, ...] of each rank to the sum over ranks of my [L, ...], while something else is computed."""
    if not axis.is_split:
        return x, None
    part = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    return part, reduce_scatter(part, x.contiguous(), group=axis.group, async_op=True)


def start_sum(x: Tensor, axis: Axis) -> Pending:
    """The sum over ranks, in place, while something else is computed."""
    return x, dist.all_reduce(x, group=axis.group, async_op=True) if axis.is_split else None


def finish(pending: Pending) -> Tensor:
    x, work = pending
    if work is not None:
        work.wait()
    return x


def my_part(x: Tensor, axis: Axis) -> Tensor:
    return x.chunk(axis.size)[axis.rank] if axis.is_split else x


class Join(Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return finish(start_gather(x, axis))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return my_part(grad, ctx.axis), None


class Split(Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return my_part(x, axis).clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return finish(start_gather(grad, ctx.axis)), None


class Spread(Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return finish(start_sum(grad.clone(), ctx.axis)), None


def total(values: Tensor, axis: Axis) -> Tensor:
    """The sum over an axis, in a new tensor, without a gradient."""
    return finish(start_sum(values.detach().clone(), axis))

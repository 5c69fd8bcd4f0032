"""Tensor parallelism with sequence parallelism (arXiv 1909.08053, 2205.05198): each rank of the tensor axis has a shard
of every weight matrix and, between matrices, a shard of the tokens.

    [L/t, D] --all-gather--> [L, D] --column--> [L, F/t] ... [L, F/t] --row--> [L, D] --reduce-scatter--> [L/t, D]

A column-parallel linear has a shard of the outputs, a row-parallel one of the inputs. They replace nn.Linear under the
same parameter names, so the model's forward is that of a single process. `t` is the number of ranks, `F` the features
between the two matrices (heads or MLP). Communication overlaps with computation: while
tokens are gathered, the product with the local ones is computed, and while one gradient is reduced, the other.
A pipeline may set `wgrad_store` to defer the weight gradients (weight_grad_store.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.parallel.collectives import CopyToTensorParallel, all_gather_async, reduce_scatter_async, wait
from megasora.parallel.mesh import Axis
from megasora.parallel.weight_grad_store import DefersWeightGrad


class ColumnParallelLinear(DefersWeightGrad):
    """y = x W^T + b for this rank's rows of W and b.

    sequence_parallel  True: the input is this rank's tokens [L/t, D] and is all-gathered first. False: the input is
                       replicated on all tensor ranks (captions, conditioning).
    gather_output      True: the output [R, F] is all-gathered. False: it is this rank's features [L, F/t].
    num_chunks         The output consists of so many equal chunks, each sharded by itself: 3 for q, k and v; 6 for
                       shift, scale and gate of attention and MLP.
    """

    def __init__(
        self,
        linear: nn.Linear,
        axis: Axis,
        num_chunks: int = 1,
        sequence_parallel: bool = True,
        gather_output: bool = False,
    ):
        super().__init__()
        self.axis, self.num_chunks = axis, num_chunks
        self.sequence_parallel, self.gather_output = sequence_parallel, gather_output
        out_features, in_features = linear.weight.shape
        self.weight = nn.Parameter(linear.weight.new_empty(out_features // axis.size, in_features))
        self.bias = nn.Parameter(linear.bias.new_empty(out_features // axis.size))

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return AllGatherLinear.apply(x, self.weight, self.bias, self)
        y = nn.functional.linear(CopyToTensorParallel.apply(x, self.axis), self.weight, self.bias)
        return GatherChunkedOutput.apply(y, self.axis, self.num_chunks) if self.gather_output else y


class RowParallelLinear(DefersWeightGrad):
    """y = x W^T summed over the ranks, + b, for this rank's columns of W.

    The input is this rank's features [L, F/t], the output this rank's tokens [L/t, D]. The bias is replicated.
    """

    def __init__(self, linear: nn.Linear, axis: Axis):
        super().__init__()
        self.axis = axis
        out_features, in_features = linear.weight.shape
        self.weight = nn.Parameter(linear.weight.new_empty(out_features, in_features // axis.size))
        self.bias = nn.Parameter(linear.bias.new_empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return ReduceScatterLinear.apply(x, self.weight, self) + self.bias


class AllGatherLinear(Function):
    """x [L/t, D] -> [L, F/t]. Saves the local tokens and gathers them again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, linear: ColumnParallelLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.linear = linear
        return all_gather_matmul(x, weight.t(), linear.axis)[0].add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), axis, store = ctx.saved_tensors, ctx.linear.axis, ctx.linear.wgrad_store
        grad_x = grad_weight = pending_grad_x = None
        pending_x = all_gather_async(x, axis) if ctx.needs_input_grad[1] and store is None else None
        if ctx.needs_input_grad[0]:
            pending_grad_x = reduce_scatter_async(grad @ weight, axis)
        if pending_x is not None:
            grad_weight = grad.t() @ wait(pending_x)
        elif ctx.needs_input_grad[1]:
            store.put(ctx.linear.weight, lambda: grad.t() @ wait(all_gather_async(x, axis)))
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        if pending_grad_x is not None:
            grad_x = wait(pending_grad_x)
        return grad_x, grad_weight, grad_bias, None


class ReduceScatterLinear(Function):
    """x [L, F/t] -> [L/t, D]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, linear: RowParallelLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.linear = linear
        return wait(reduce_scatter_async(x @ weight.t(), linear.axis))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), store, grad_weight = ctx.saved_tensors, ctx.linear.wgrad_store, None
        grad_x, grad = all_gather_matmul(grad, weight, ctx.linear.axis)
        if ctx.needs_input_grad[1] and store is None:
            grad_weight = grad.t() @ x
        elif ctx.needs_input_grad[1]:
            store.put(ctx.linear.weight, lambda: grad.t() @ x)
        return grad_x, grad_weight, None


def all_gather_matmul(x: Tensor, matrix: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """(the product [L, F] of all ranks' x with `matrix`, all ranks' x [L, D]), for x [L/t, D] and `matrix` [D, F].

    The product of the local tokens is computed while the others arrive.
    """
    pending_x, start = all_gather_async(x, axis), len(x) * axis.rank
    y = x.new_empty(len(x) * axis.size, matrix.shape[1])
    torch.mm(x, matrix, out=y[start : start + len(x)])
    full = wait(pending_x)
    for remote in (slice(0, start), slice(start + len(x), len(full))):
        torch.mm(full[remote], matrix, out=y[remote])
    return y, full


class GatherChunkedOutput(Function):
    """All-gathers y [R, chunks * d] to [R, chunks * t * d]; backward reduce-scatters the ranks' partial gradients."""

    @staticmethod
    def forward(ctx, y: Tensor, axis: Axis, num_chunks: int) -> Tensor:
        ctx.axis, ctx.num_chunks = axis, num_chunks
        full = wait(all_gather_async(y, axis)).unflatten(0, (axis.size, -1)).unflatten(-1, (num_chunks, -1))
        return full.permute(1, 2, 0, 3).flatten(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        by_rank = grad.unflatten(-1, (ctx.num_chunks, ctx.axis.size, -1)).permute(2, 0, 1, 3)
        return wait(reduce_scatter_async(by_rank.flatten(2).flatten(0, 1), ctx.axis)), None, None

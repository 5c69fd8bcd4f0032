"""Tensor parallelism with sequence parallelism (arXiv 1909.08053, 2205.05198): each rank of the tensor axis has a shard
of every weight matrix and, between matrices, a shard of the tokens.

    [L/t, D] --all-gather--> [L, D] --column--> [L, F/t] ... [L, F/t] --row--> [L, D] --reduce-scatter--> [L/t, D]

A column-parallel linear has a shard of the outputs, a row-parallel one of the inputs. They replace nn.Linear under the
same parameter names, so the model's forward is that of a single process. `t` is the number of ranks, `F` the features
between the two matrices (heads or MLP). Communication overlaps with computation: while
tokens are gathered, the product with the local ones is computed, and while one gradient is reduced, the other.
A pipeline may set `wgrad_store` to defer the weight gradients (weight_grad_store.py), and `products` computes them and
all other products (kernels/linear.py): in FP8 with a scale per tensor, tokens are all-gathered in FP8. Products in the
model's dtype may use symmetric memory (symmetric_memory.py) in place of the collectives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.kernels.float8 import Quantized
from megasora.kernels.linear import (
    Linear,
    Operand,
    Products,
    as_operand,
    bias_and_copy,
    input_and_gradients,
    keep_operands,
)
from megasora.parallel import symmetric_memory
from megasora.parallel.collectives import CopyToTensorParallel, all_gather_async, reduce_scatter_async, wait
from megasora.parallel.mesh import Axis
from megasora.parallel.symmetric_memory import matmul_reduce_scatter
from megasora.parallel.weight_grad_store import DefersWeightGrad


class TensorParallelLinear(DefersWeightGrad):
    """Base class of linears whose products communicate over an axis. `uses_symmetric_memory`: not with FP8 products."""

    uses_symmetric_memory = False

    def __init__(self, axis: Axis):
        super().__init__()
        self.axis = axis


class ColumnParallelLinear(TensorParallelLinear):
    """y = x W^T + b for this rank's rows of W and b.

    sequence_parallel  True: the input is this rank's tokens [L/t, D] and is all-gathered first. False: the input is
                       replicated on all tensor ranks (captions, conditioning).
    gather_output      True: the output [R, F] is all-gathered. False: it is this rank's features [L, F/t].
    num_chunks         The output consists of so many equal chunks, each sharded by itself: 3 for q, k and v; 6 for
                       shift, scale and gate of attention and MLP.

    `skip_bias_add` and `skip_bias_grad` are those of `linear` (megasora.kernels.linear.Linear).
    """

    def __init__(
        self,
        linear: nn.Linear,
        axis: Axis,
        num_chunks: int = 1,
        sequence_parallel: bool = True,
        gather_output: bool = False,
    ):
        super().__init__(axis)
        self.num_chunks = num_chunks
        self.sequence_parallel, self.gather_output = sequence_parallel, gather_output
        out_features, in_features = linear.weight.shape
        self.weight = nn.Parameter(linear.weight.new_empty(out_features // axis.size, in_features))
        self.bias = nn.Parameter(linear.bias.new_empty(out_features // axis.size))
        self.skip_bias_add = isinstance(linear, Linear) and linear.skip_bias_add
        self.skip_bias_grad = isinstance(linear, Linear) and linear.skip_bias_grad

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.sequence_parallel:
            bias, bias_copy = bias_and_copy(self)
            y = AllGatherLinear.apply(x, self.weight, bias, self)
            return y if bias_copy is None else (y, bias_copy)
        y = nn.functional.linear(CopyToTensorParallel.apply(x, self.axis), self.weight, self.bias)
        return GatherChunkedOutput.apply(y, self.axis, self.num_chunks) if self.gather_output else y


class RowParallelLinear(TensorParallelLinear):
    """y = x W^T summed over the ranks, + b, for this rank's columns of W.

    The input is this rank's features [L, F/t], the output this rank's tokens [L/t, D]. The bias is replicated. The
    other arguments are as of megasora.kernels.linear.Linear.
    """

    def __init__(self, linear: nn.Linear, axis: Axis):
        super().__init__(axis)
        out_features, in_features = linear.weight.shape
        self.weight = nn.Parameter(linear.weight.new_empty(out_features, in_features // axis.size))
        self.bias = nn.Parameter(linear.bias.new_empty(out_features))

    def forward(self, x: Tensor, gelu_bias: Tensor | None = None, kernel_backend: str = "auto") -> Tensor:
        return ReduceScatterLinear.apply(x, self.weight, gelu_bias, self, kernel_backend) + self.bias


class AllGatherLinear(Function):
    """x [L/t, D] -> [L, F/t]. Saves the local tokens and gathers them again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, linear: ColumnParallelLinear) -> Tensor:
        ctx.linear, products = linear, linear.products
        kept = keep_operands(ctx, x, weight, None, products, "auto")
        return all_gather_matmul(kept, products.right_of_output(weight), linear, products, bias)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight, *saved), axis, store = ctx.saved_tensors, ctx.linear.axis, ctx.linear.wgrad_store
        x, products, grad_x, grad_weight, pending_grad_x = as_operand(ctx, saved), ctx.products, None, None, None
        full_x = gather_operand(x, axis) if ctx.needs_input_grad[1] and store is None else None
        kept = products.keep_grad(grad)
        if ctx.needs_input_grad[0] and ctx.linear.uses_symmetric_memory:
            pending_grad_x = matmul_reduce_scatter(kept, weight, axis), None
        elif ctx.needs_input_grad[0]:
            pending_grad_x = reduce_scatter_async(products.grad_input(kept, weight), axis)
        if full_x is not None:
            grad_weight = products.grad_weight(kept, full_x())
        elif ctx.needs_input_grad[1]:
            store.put(ctx.linear.weight, lambda: products.grad_weight(kept, gather_operand(x, axis)()))
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        if pending_grad_x is not None:
            grad_x = wait(pending_grad_x)
        return grad_x, grad_weight, grad_bias, None


class ReduceScatterLinear(Function):
    """x [L, F/t] -> [L/t, D]."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, gelu_bias: Tensor | None, linear: RowParallelLinear, kernel_backend: str
    ) -> Tensor:
        ctx.linear = linear
        kept = keep_operands(ctx, x, weight, gelu_bias, linear.products, kernel_backend)
        if linear.uses_symmetric_memory:
            return matmul_reduce_scatter(kept, weight.t(), linear.axis)
        return wait(reduce_scatter_async(linear.products.output(kept, weight), linear.axis))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight, *saved), products, store, grad_weight = ctx.saved_tensors, ctx.products, ctx.linear.wgrad_store, None
        right = products.right_of_grad_input(weight)
        grad_x, full_grad = all_gather_matmul(products.keep_grad(grad), right, ctx.linear, products)
        x, grad_x, grad_gelu_bias = input_and_gradients(ctx, saved, grad_x)
        if ctx.needs_input_grad[1] and store is None:
            grad_weight = products.grad_weight(full_grad, x)
        elif ctx.needs_input_grad[1]:
            store.put(ctx.linear.weight, lambda: products.grad_weight(full_grad, x))
        return grad_x, grad_weight, grad_gelu_bias, None, None


def all_gather_matmul(
    x: Operand, matrix: Operand, linear: TensorParallelLinear, products: Products, bias: Tensor | None = None
) -> tuple[Tensor, Operand]:
    """(the product [L, F] of all ranks' x with `matrix`, + bias [F], all ranks' x [L, D]), for x [L/t, D] and `matrix`
    [D, F].

    The product of the local tokens is computed while the others arrive.
    """
    axis = linear.axis
    if linear.uses_symmetric_memory:
        y, full = symmetric_memory.all_gather_matmul(x, matrix, axis)
        return y if bias is None else y.add_(bias), full
    full_x, start = gather_operand(x, axis), len(x) * axis.rank
    y = torch.empty(len(x) * axis.size, matrix.shape[1], dtype=x.dtype, device=x.device)
    products.mm(x, matrix, y[start : start + len(x)], bias)
    full = full_x()
    for remote in (slice(0, start), slice(start + len(x), len(full))):
        products.mm(full[remote], matrix, y[remote], bias)
    return y, full


def gather_operand(x: Operand, axis: Axis) -> Callable[[], Operand]:
    """Starts an all-gather of an operand along its rows; what it returns waits for it. All ranks have one scale."""
    if not isinstance(x, Quantized):
        pending = all_gather_async(x, axis)
        return lambda: wait(pending)
    pending = all_gather_async(x.values.view(torch.uint8), axis)  # collectives know no FP8
    return lambda: Quantized(wait(pending).view(x.values.dtype), x.scale, x.dtype)


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

"""Tensor parallel with sequence parallel (arXiv 1909.08053, 2205.05198): each rank of the axis has a part of every
matrix, and between matrices a part of the tokens.

    tokens [L/t, D] --gather--> [L, D] --column--> [L, F/t] ... [L, F/t] --row--> [L, D] --scatter-sum--> [L/t, D]

A column linear holds some of the outputs, a row linear some of the inputs. They take the place of nn.Linear, under the
same parameter names, so the model's forward is the one of a single process. While tokens are gathered, the product of
those that are here is computed, and while one gradient is summed, that of the other. A pipeline may set `later`, to
have the gradients of weights put off: it is called with a weight and what computes its gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.parallel.collectives import Spread, finish, start_gather, start_scatter_sum
from megasora.parallel.mesh import Axis

# takes a weight and what computes its gradient, to be called under torch.no_grad
Later = Callable[[nn.Parameter, Callable[[], Tensor]], None]


class ColumnLinear(nn.Module):
    """y = x W^T + b for this rank's rows of W. What comes in and goes out:

    input    `tokens`: my tokens, all of them are gathered first; `same`: the same on every rank, e.g. captions
    output   my part of the last dim; `whole`: gathered; it consists of `runs` equal runs, e.g. shift, scale and gate
    """

    def __init__(self, linear: nn.Linear, axis: Axis, runs: int = 1, tokens: bool = True, whole: bool = False):
        super().__init__()
        self.axis, self.runs, self.tokens, self.whole = axis, runs, tokens, whole
        self.later: Later | None = None
        out_features, in_features = linear.weight.shape
        self.weight = nn.Parameter(linear.weight.new_empty(out_features // axis.size, in_features))
        self.bias = nn.Parameter(linear.bias.new_empty(out_features // axis.size))

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens:
            return GatheredLinear.apply(x, self.weight, self.bias, self)
        y = nn.functional.linear(Spread.apply(x, self.axis), self.weight, self.bias)
        return JoinRuns.apply(y, self.axis, self.runs) if self.whole else y


class RowLinear(nn.Module):
    """y = sum over ranks of x W^T, + b, for this rank's columns of W and its part of x's last dim; y is my tokens."""

    def __init__(self, linear: nn.Linear, axis: Axis):
        super().__init__()
        self.axis = axis
        self.later: Later | None = None
        out_features, in_features = linear.weight.shape
        self.weight = nn.Parameter(linear.weight.new_empty(out_features, in_features // axis.size))
        self.bias = nn.Parameter(linear.bias.new_empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return ScatteredLinear.apply(x, self.weight, self) + self.bias


class GatheredLinear(Function):
    """x [L/t, D] -> [L, F/t]. Keeps x as it came, and gathers it again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, linear: ColumnLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.linear = linear
        return gathered_product(x, weight.t(), linear.axis)[0].add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), axis, later = ctx.saved_tensors, ctx.linear.axis, ctx.linear.later
        grad_x = grad_weight = scattering = None
        gathering = start_gather(x, axis) if ctx.needs_input_grad[1] and later is None else None
        if ctx.needs_input_grad[0]:
            scattering = start_scatter_sum(grad @ weight, axis)
        if gathering is not None:
            grad_weight = grad.t() @ finish(gathering)
        elif ctx.needs_input_grad[1]:
            later(ctx.linear.weight, lambda: grad.t() @ finish(start_gather(x, axis)))
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        if scattering is not None:
            grad_x = finish(scattering)
        return grad_x, grad_weight, grad_bias, None


class ScatteredLinear(Function):
    """x [L, F/t] -> [L/t, D]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, linear: RowLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.linear = linear
        return finish(start_scatter_sum(x @ weight.t(), linear.axis))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), later, grad_weight = ctx.saved_tensors, ctx.linear.later, None
        grad_x, grad = gathered_product(grad, weight, ctx.linear.axis)
        if ctx.needs_input_grad[1] and later is None:
            grad_weight = grad.t() @ x
        elif ctx.needs_input_grad[1]:
            later(ctx.linear.weight, lambda: grad.t() @ x)
        return grad_x, grad_weight, None


def gathered_product(x: Tensor, matrix: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """x [L/t, D] of all ranks, times `matrix` [D, F] -> [L, F], and x gathered; my own tokens' product is computed
    while those of the others arrive."""
    gathering, mine = start_gather(x, axis), len(x) * axis.rank
    y = x.new_empty(len(x) * axis.size, matrix.shape[1])
    torch.mm(x, matrix, out=y[mine : mine + len(x)])
    full = finish(gathering)
    for part in (slice(0, mine), slice(mine + len(x), len(full))):
        torch.mm(full[part], matrix, out=y[part])
    return y, full


class JoinRuns(Function):
    """y [R, runs * d] of each rank -> [R, runs * t * d]; backward sums what the ranks' tokens made of it."""

    @staticmethod
    def forward(ctx, y: Tensor, axis: Axis, runs: int) -> Tensor:
        ctx.axis, ctx.runs = axis, runs
        full = finish(start_gather(y, axis)).unflatten(0, (axis.size, -1)).unflatten(-1, (runs, -1))
        return full.permute(1, 2, 0, 3).flatten(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = grad.unflatten(-1, (ctx.runs, ctx.axis.size, -1)).permute(2, 0, 1, 3)
        return finish(start_scatter_sum(parts.flatten(2).flatten(0, 1), ctx.axis)), None, None

"""RMSNorm with a weight: vectors x [..., D] and w [D] in, y [..., D] out (arXiv 1910.07467).

    r = 1 / sqrt(sum_i x[i]^2 / n + eps)          y[i] = x[i] r w[i]
    dx[i] = r dy[i] w[i] - x[i] r^3 / n sum_j dy[j] w[j] x[j]          dw[i] = sum over vectors of dy[i] x[i] r

A vector of n numbers may lie in parts on several ranks, D of them here: `total` then adds up what its parts give for a
sum, once in either pass. For the backward pass x is kept as it came, and r; computed in fp32 at least, all else of
which would be several times as large as a bf16 x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Total = Callable[[Tensor], Tensor]


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The maths, of whole vectors; arguments as of `rms_norm`."""
    wide, weight = widened(x), widened(weight_D)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float, size: int, total: Total | None) -> Tensor:
        wide = widened(x)
        square = wide.square().sum(-1, keepdim=True)
        if total is not None:
            square = total(square)
        inverse = torch.rsqrt(square / size + eps)
        ctx.save_for_backward(x, weight_D, inverse)
        ctx.size, ctx.total = size, total
        return (wide * inverse * widened(weight_D)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        normed, grad_wide = widened(x) * inverse, widened(grad)
        grad_normed = grad_wide * widened(weight_D)
        along = (grad_normed * normed).sum(-1, keepdim=True)
        if ctx.total is not None:
            along = ctx.total(along)
        grad_x = inverse * (grad_normed - normed * along / ctx.size)
        grad_weight = (grad_wide * normed).flatten(0, -2).sum(0)
        return grad_x.to(x.dtype), grad_weight.to(weight_D.dtype), None, None, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, size: int | None = None, total: Total | None = None) -> Tensor:
    """`x` [..., D], at least two dims, and `weight_D` [D] -> [..., D] in the dtype of `x`.

    `size` and `total`, for vectors whose other parts lie elsewhere: numbers of a whole vector, and what adds up the
    parts' sums [..., 1] without recording a gradient. Differentiable once. ValueError on shapes that do not fit.
    """
    if x.ndim < 2 or weight_D.shape != x.shape[-1:]:
        raise ValueError(f"x {tuple(x.shape)} must be [..., D], its weight {tuple(weight_D.shape)} [D]")
    return RMSNorm.apply(x, weight_D, eps, x.shape[-1] if size is None else size, total)

"""Linear layers by three products, which a strategy computes: in the dtype of the tensors, or in FP8 (float8.py).

    y = x W^T + b,   dx = g W,   dW = g^T x,   db = sum of g over tokens

`Products` are functions of tensors without state of autograd; `Linear` and the sharded linears of tensor parallelism
(megasora/parallel/tensor.py) call them. An operand is a tensor or, in FP8, a `Quantized`. Letters: L tokens, D input
features, F output features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.kernels.float8 import E4M3, E5M2, AllReduceMax, Quantized, identity, quantize, scaled_matmul
from megasora.kernels.gelu import gelu_backward, gelu_forward

Operand = Tensor | Quantized
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


class WeightGradStore(Protocol):
    """Where weight gradients go that are computed later; see megasora/parallel/weight_grad_store.py."""

    def put(self, parameter: nn.Parameter, compute: Callable[[], Tensor]) -> None: ...


class Products:
    """The products in the dtype of the tensors."""

    def keep_input(self, x_LD: Tensor) -> Operand:
        """What is saved of x for the backward pass, and what ranks exchange of it."""
        return x_LD

    def keep_grad(self, grad_LF: Tensor) -> Operand:
        """The same of the gradient."""
        return grad_LF

    def right_of_output(self, weight_FD: Tensor) -> Operand:
        """W^T, the right operand of `mm` for y."""
        return weight_FD.t()

    def right_of_grad_input(self, weight_FD: Tensor) -> Operand:
        """W, the right operand of `mm` for dx."""
        return weight_FD

    def mm(self, kept: Operand, right: Operand, out: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """The product of what was kept, or some rows of it, + b, where no rank has a part of the sum."""
        return torch.mm(kept, right, out=out) if bias_F is None else torch.addmm(bias_F, kept, right, out=out)

    def output(self, x_LD: Operand, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        return F.linear(x_LD, weight_FD, bias_F)

    def grad_input(self, grad_LF: Operand, weight_FD: Tensor) -> Tensor:
        return grad_LF @ weight_FD

    def grad_weight(self, grad_LF: Operand, x_LD: Operand) -> Tensor:
        return grad_LF.t() @ x_LD


PLAIN = Products()


class Float8Products(Products):
    """The products in FP8, with torchao's recipes:

    tensorwise          one scale per matrix; e4m3, gradients e5m2. x is saved in FP8: 1 byte per element
    rowwise             one scale per row of the left and column of the right operand; e4m3. x is saved as it is
    rowwise_with_gw_hp  the same, but dW in the dtype of the tensors

    In every layout the scales are those of a single process, of whole packs and whole matrices. `sharded` says which
    features the ranks of the tensor axis share: None | "inputs" | "outputs"; `tensor_max` and `context_max` are the
    all-reduces (max) over the tensor axis and over the ranks that share the tokens of a pack.
    """

    def __init__(
        self,
        recipe: str,
        sharded: str | None = None,
        tensor_max: AllReduceMax = identity,
        context_max: AllReduceMax = identity,
        backend: str = "auto",
    ):
        self.per_row, self.weight_grad_in_fp8 = recipe != "tensorwise", recipe != "rowwise_with_gw_hp"
        self.backend, self.context_max = backend, context_max
        if self.per_row:
            self.inputs_max = tensor_max if sharded == "inputs" else identity
            self.outputs_max = tensor_max if sharded == "outputs" else identity
        else:
            self.inputs_max = self.outputs_max = tensor_max

    def keep_input(self, x_LD: Tensor) -> Operand:
        return x_LD if self.per_row else self.quantize(x_LD, self.pack_max)

    def keep_grad(self, grad_LF: Tensor) -> Operand:
        return grad_LF if self.per_row else self.quantize(grad_LF, self.pack_max, E5M2)

    def right_of_output(self, weight_FD: Tensor) -> Quantized:
        return replace(self.quantize(weight_FD, self.inputs_max).t(), fast=True)

    def right_of_grad_input(self, weight_FD: Tensor) -> Quantized:
        return self.quantize(weight_FD.t(), self.outputs_max).t()

    def mm(self, kept: Operand, right: Quantized, out: Tensor, bias_F: Tensor | None = None) -> Tensor:
        return scaled_matmul(self.left(kept, identity), right, bias_F, out=out)

    def output(self, x_LD: Operand, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        return scaled_matmul(self.left(x_LD, self.inputs_max), self.right_of_output(weight_FD), bias_F)

    def grad_input(self, grad_LF: Operand, weight_FD: Tensor) -> Tensor:
        return scaled_matmul(self.left(grad_LF, self.outputs_max), self.right_of_grad_input(weight_FD))

    def grad_weight(self, grad_LF: Operand, x_LD: Operand) -> Tensor:
        if not self.per_row:
            return scaled_matmul(grad_LF.t().contiguous(), x_LD.t().contiguous().t())
        if not self.weight_grad_in_fp8:
            return grad_LF.t() @ x_LD
        return scaled_matmul(
            self.quantize(grad_LF.t(), self.context_max), self.quantize(x_LD.t(), self.context_max).t()
        )

    def left(self, kept: Operand, all_reduce_max: AllReduceMax) -> Quantized:
        return kept if isinstance(kept, Quantized) else self.quantize(kept, all_reduce_max)

    def pack_max(self, amax: Tensor) -> Tensor:
        return self.context_max(self.inputs_max(amax))

    def quantize(self, x: Tensor, all_reduce_max: AllReduceMax, dtype: torch.dtype = E4M3) -> Quantized:
        return quantize(x, dtype, self.per_row, all_reduce_max, self.backend)


class Linear(nn.Linear):
    """nn.Linear with a strategy for its products, and a store for its weight gradients. With neither it is nn.Linear,
    bit for bit.

    skip_bias_add   True: forward returns x W^T and a copy of b, for the kernel after it to add (as in Megatron). That
                    kernel then also computes the gradient of b.
    skip_bias_grad  True: forward returns x W^T + b and a copy of b, for the kernel after it to compute its gradient.
    """

    products: Products = PLAIN
    wgrad_store: WeightGradStore | None = None

    def __init__(self, in_features: int, out_features: int, skip_bias_add: bool = False, skip_bias_grad: bool = False):
        super().__init__(in_features, out_features)
        self.skip_bias_add, self.skip_bias_grad = skip_bias_add, skip_bias_grad

    def forward(
        self, x: Tensor, gelu_bias: Tensor | None = None, kernel_backend: str = "auto"
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[..., D] -> [..., F]. With `gelu_bias` [D], the input of the product is gelu(x + gelu_bias), and x is [L, D];
        see `keep_operands`. `kernel_backend`: of the GELU, see launch.py."""
        bias, bias_copy = bias_and_copy(self)
        if self.products is PLAIN and self.wgrad_store is None and gelu_bias is None:
            y = F.linear(x, self.weight, bias)
        else:
            y = LinearFunction.apply(
                x, self.weight, bias, gelu_bias, self, self.products, self.wgrad_store, kernel_backend
            )
        return y if bias_copy is None else (y, bias_copy)


def bias_and_copy(module: Linear) -> tuple[Tensor | None, Tensor | None]:
    """(the bias that a linear adds, the copy that it returns); see `Linear`. ZeRO 3 frees b itself after the call."""
    if module.skip_bias_add:
        return None, module.bias.clone()
    return (module.bias.detach(), module.bias.clone()) if module.skip_bias_grad else (module.bias, None)


def linear(x: Tensor, module: nn.Linear, products: Products, store: WeightGradStore | None) -> Tensor:
    """x W^T + b, [..., D] -> [..., F], by `products`. With a store, the gradients of W and b go there."""
    return LinearFunction.apply(x, module.weight, module.bias, None, module, products, store, "auto")


class LinearFunction(Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, gelu_bias: Tensor | None, module: nn.Linear,
        products: Products, store: WeightGradStore | None, kernel_backend: str,
    ) -> Tensor:  # fmt: skip
        ctx.module, ctx.store, ctx.shape = module, store, x.shape  # of the parameters whose `.grad` is to be set
        kept = keep_operands(ctx, x.reshape(-1, x.shape[-1]), weight, gelu_bias, products, kernel_backend)
        return products.output(kept, weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight, *saved), module, products, store = ctx.saved_tensors, ctx.module, ctx.products, ctx.store
        grad_2d = grad.reshape(-1, grad.shape[-1])
        kept = products.keep_grad(grad_2d)
        grad_x = products.grad_input(kept, weight) if ctx.needs_input_grad[0] or ctx.has_gelu else None
        x, grad_x, grad_gelu_bias = input_and_gradients(ctx, saved, grad_x)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1] and store is None:
            grad_weight = products.grad_weight(kept, x)
        elif ctx.needs_input_grad[1]:
            store.put(module.weight, lambda: products.grad_weight(kept, x))
        if ctx.needs_input_grad[2] and store is None:
            grad_bias = grad_2d.sum(0)
        elif ctx.needs_input_grad[2]:
            store.put(module.bias, lambda: grad_2d.sum(0))
        grad_x = grad_x if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, grad_weight, grad_bias, grad_gelu_bias, *[None] * 4


def keep_operands(
    ctx, x_LD: Tensor, weight_FD: Tensor, gelu_bias_D: Tensor | None, products: Products, kernel_backend: str
) -> Operand:
    """The left operand of a linear's product, from x, or with a bias from h = gelu(x + bias). Saves for the backward
    pass W and this operand; or W, x and the bias: h is computed again there, in the kernel of dx (gelu.py)."""
    ctx.products, ctx.kernel_backend, ctx.has_gelu = products, kernel_backend, gelu_bias_D is not None
    if ctx.has_gelu:
        ctx.save_for_backward(weight_FD, x_LD, gelu_bias_D)
        return products.keep_input(gelu_forward(x_LD, gelu_bias_D, kernel_backend))
    kept = products.keep_input(x_LD)
    is_quantized = isinstance(kept, Quantized)
    ctx.save_for_backward(weight_FD, *((kept.values, kept.scale) if is_quantized else (kept,)))
    ctx.kept_dtype = kept.dtype
    return kept


def input_and_gradients(
    ctx, saved: list[Tensor], grad_LD: Tensor | None
) -> tuple[Operand, Tensor | None, Tensor | None]:
    """(the left operand again, dx, the gradient of the GELU's bias or None), from what `keep_operands` saved besides W
    and the gradient of the operand."""
    if not ctx.has_gelu:
        return as_operand(ctx, saved), grad_LD, None
    h_LD, grad_x_LD, grad_bias_D = gelu_backward(grad_LD, *saved, ctx.kernel_backend)
    return ctx.products.keep_input(h_LD), grad_x_LD, grad_bias_D


def as_operand(ctx, saved: list[Tensor]) -> Operand:
    """The left operand that `keep_operands` saved, without a GELU."""
    return Quantized(*saved, ctx.kept_dtype) if len(saved) == 2 else saved[0].detach()

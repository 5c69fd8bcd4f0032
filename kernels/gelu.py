"""Bias and GELU between the two matrices of an MLP: x [L, D] and bias [D] in, h [L, D] out; the approximation by tanh
(arXiv 1606.08415). D is the hidden width of the MLP.

    z = x + b,   h = z s,   s = sigmoid(a),   a = 2 sqrt(2 / pi) (z + 0.044715 z^3)      = z (1 + tanh(a / 2)) / 2
    dx = dh (s + z s (1 - s) a'),   a' = 2 sqrt(2 / pi) (1 + 3 * 0.044715 z^2),   db = sum of dx over tokens

The gradient of the matrix after the GELU needs h, that of the GELU needs x. Only x is saved: the backward pass reads it
anyway and computes h again, in the same pass as dx and db. So neither the bias nor its gradient costs a pass of its
own.
Computed in fp32 at least and rounded once.

Least traffic in bf16, bytes per element: 4 forward (x, h), 8 backward (x, dh, h, dx). PyTorch's own operations move 4
and 8, and save h too: 6 for the GELU (z, dh, dz) and 2 for the gradient of the bias (dz).

`gelu_forward` and `gelu_backward` are the two passes alone, for a linear layer that applies the GELU to its input: its
own backward pass needs h. db is summed over the tokens of each program, then over programs, both in a fixed order.

Letters: `Q` programs of the backward along the tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.kernels.launch import (
    LaunchConfig,
    LaunchTable,
    call,
    cdiv,
    check_device,
    jit_for_packs,
    launch_config,
    resolve_backend,
    unit_stride,
    upcast,
)

FORWARD: LaunchTable = {"any": LaunchConfig()}
BACKWARD: LaunchTable = {"any": LaunchConfig()}
BLOCK = 256  # columns of a program: 16 bytes for each thread of a warp; divides the hidden width of most models
PROGRAM_TOKENS = 128  # of the backward: the sums of a program are 1/128 of the elements that it reads
SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)


def gelu_reference(x_LD: Tensor, bias_D: Tensor) -> Tensor:
    """Reference implementation, differentiable; arguments as of `gelu`."""
    x, bias = upcast(x_LD, bias_D)
    return F.gelu(x + bias, approximate="tanh").to(x_LD.dtype)


def backward_torch(grad_LD: Tensor, x_LD: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h, dx and db, in fp32 at least."""
    dh, x, bias = upcast(grad_LD, x_LD, bias_D)
    z = x + bias
    dx = torch.ops.aten.gelu_backward(dh, z, approximate="tanh")
    return F.gelu(z, approximate="tanh"), dx, dx.sum(0)


@triton.jit
def gate(z):
    """s of z, in fp32: near 0 or 1 far from 0, where the exponential may be 0 or infinite."""
    return 1 / (1 + tl.exp((z + z * z * z * CUBIC) * -SLOPE))


@jit_for_packs
def forward_kernel(x_LD, bias_D, h_LD, x_stride, L, D, T: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0) * T + tl.arange(0, T)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None]
    at, inside = token.to(tl.int64), (token < L) & (d < D)
    x = tl.load(x_LD + at * x_stride + d, mask=inside, other=0.0)
    bias = tl.load(bias_D + d, mask=d < D, other=0.0)
    z = x.to(tl.float32) + bias.to(tl.float32)
    tl.store(h_LD + at * D + d, (z * gate(z)).to(h_LD.dtype.element_ty), mask=inside)


@jit_for_packs
def backward_kernel(
    grad_LD, x_LD, bias_D, h_LD, dx_LD, dbias_QD, grad_stride, x_stride, L, PROGRAM_TOKENS, D,
    T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None]
    bias = tl.load(bias_D + d, mask=d < D, other=0.0).to(tl.float32)
    sums = tl.zeros([T, BLOCK_D], tl.float32)
    start = tl.program_id(0) * PROGRAM_TOKENS
    for first in tl.range(start, tl.minimum(start + PROGRAM_TOKENS, L), T, num_stages=STAGES):
        token = first + tl.arange(0, T)[:, None]
        at, inside = token.to(tl.int64), (token < L) & (d < D)
        dh = tl.load(grad_LD + at * grad_stride + d, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(x_LD + at * x_stride + d, mask=inside, other=0.0).to(tl.float32) + bias
        s = gate(z)
        h = z * s
        dx = dh * (s + h * (1 - s) * (z * z * (3 * CUBIC) + 1) * SLOPE)
        tl.store(h_LD + at * D + d, h.to(h_LD.dtype.element_ty), mask=inside)
        tl.store(dx_LD + at * D + d, dx.to(dx_LD.dtype.element_ty), mask=inside)
        sums += dx
    total = tl.sum(sums, 0, keep_dims=True)
    tl.store(dbias_QD + tl.program_id(0).to(tl.int64) * D + d, total, mask=d < D)


@torch.library.custom_op("megasora::gelu", mutates_args=())
def forward_triton(x_LD: Tensor, bias_D: Tensor) -> Tensor:
    x_LD, bias_D = unit_stride(x_LD), unit_stride(bias_D)
    h_LD, (length, width) = x_LD.new_empty(x_LD.shape), x_LD.shape
    if h_LD.numel():
        config = launch_config(FORWARD, x_LD.device)
        tokens = config.vectors_per_tile(BLOCK)
        forward_kernel[cdiv(length, tokens), cdiv(width, BLOCK)](
            x_LD, bias_D, h_LD, x_LD.stride(0), length, width, tokens, BLOCK, num_warps=config.num_warps(BLOCK)
        )
    return h_LD


@forward_triton.register_fake
def _(x_LD, bias_D):
    return x_LD.new_empty(x_LD.shape)


@torch.library.custom_op("megasora::gelu_backward", mutates_args=())
def backward_triton(grad_LD: Tensor, x_LD: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h, dx, and db in fp32."""
    grad_LD, x_LD, bias_D = map(unit_stride, (grad_LD, x_LD, bias_D))
    h_LD, dx_LD, (length, width) = x_LD.new_empty(x_LD.shape), x_LD.new_empty(x_LD.shape), x_LD.shape
    num_programs = cdiv(length, PROGRAM_TOKENS)
    dbias_QD = x_LD.new_empty(num_programs, width, dtype=torch.float32)
    if h_LD.numel():
        config = launch_config(BACKWARD, x_LD.device)
        sizes = config.vectors_per_tile(BLOCK), BLOCK, config.num_stages
        backward_kernel[num_programs, cdiv(width, BLOCK)](
            grad_LD, x_LD, bias_D, h_LD, dx_LD, dbias_QD, grad_LD.stride(0), x_LD.stride(0), length, PROGRAM_TOKENS,
            width, *sizes, num_warps=config.num_warps(BLOCK),
        )  # fmt: skip
    return h_LD, dx_LD, dbias_QD.sum(0)


@backward_triton.register_fake
def _(grad_LD, x_LD, bias_D):
    return x_LD.new_empty(x_LD.shape), x_LD.new_empty(x_LD.shape), bias_D.new_empty(bias_D.shape, dtype=torch.float32)


def gelu_forward(x_LD: Tensor, bias_D: Tensor, backend: str = "auto") -> Tensor:
    """h [L, D], without a gradient; arguments and errors as of `gelu`."""
    check(x_LD, bias_D)
    if resolve_backend(backend, x_LD) == "triton":
        return call(forward_triton, x_LD, bias_D)
    return gelu_reference(x_LD, bias_D)


def gelu_backward(
    grad_LD: Tensor, x_LD: Tensor, bias_D: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dx [L, D], db [D]) from the gradient of h, in the dtypes of x and bias; arguments and errors as of `gelu`."""
    check(x_LD, bias_D)
    if resolve_backend(backend, x_LD) == "triton":
        h_LD, dx_LD, dbias_D = call(backward_triton, grad_LD, x_LD, bias_D)
    else:
        h_LD, dx_LD, dbias_D = backward_torch(grad_LD, x_LD, bias_D)
    return h_LD.to(x_LD.dtype), dx_LD.to(x_LD.dtype), dbias_D.to(bias_D.dtype)


def check(x_LD: Tensor, bias_D: Tensor) -> None:
    if x_LD.ndim != 2 or bias_D.shape != x_LD.shape[-1:]:
        raise ValueError(f"x {tuple(x_LD.shape)} must be [L, D], its bias {tuple(bias_D.shape)} [D]")
    check_device(x=x_LD, bias=bias_D)


class GELU(Function):
    @staticmethod
    def forward(ctx, x_LD: Tensor, bias_D: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x_LD, bias_D)
        ctx.backend = backend
        return gelu_forward(x_LD, bias_D, backend).detach()  # see launch.py

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LD: Tensor) -> tuple[Tensor | None, ...]:
        return *gelu_backward(grad_LD, *ctx.saved_tensors, ctx.backend)[1:], None


def gelu(x_LD: Tensor, bias_D: Tensor, backend: str = "auto") -> Tensor:
    """GELU of x + bias: `x_LD` [L, D] and `bias_D` [D] -> [L, D] in the dtype of `x_LD`. `backend`: see launch.py.

    Differentiable once. ValueError for shapes that do not match, or tensors on two devices.
    """
    return GELU.apply(x_LD, bias_D, backend)

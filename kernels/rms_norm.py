"""RMSNorm with a weight: vectors x [..., D] and w [D] in, y [..., D] out (arXiv 1910.07467).

    r = 1 / sqrt(sum x^2 / n + eps)            y = x r w
    dot = sum dy w x r                         over the elements of a vector
    dx = r (dy w - x r dot / n)                dw = sum over vectors of dy x r

A vector of n elements may be sharded over ranks, with D elements on this one: `all_reduce` then sums the local sums
over the ranks, once per pass. The backward pass saves x, as it came, and r. Computed in fp32 at least and rounded once.

Least traffic in bf16, bytes per element: 4 forward (x, y), 6 backward (x, dy, dx); with `all_reduce` all inputs are
read twice, since the sums are needed before the first output.

A program loads its tile of vectors in a few chunks, all loads in flight at once, and then computes. In the backward
pass it loops over many vectors and accumulates dw in registers; the sums of all programs are added up afterwards. Both
sums have a fixed order.

Letters: `M` vectors. In kernels: `T` vectors of a tile, in `C` chunks of `BLOCK` elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
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
from megasora.kernels.rows import tile_tokens_for
from megasora.kernels.vector_chunks import full_chunks, load_chunks, split_width, store_chunk, store_sums

FORWARD: LaunchTable = {"any": LaunchConfig(tile_elements=1024, elements_per_thread=8)}
BACKWARD: LaunchTable = {"any": LaunchConfig(tile_elements=1024, elements_per_thread=8)}
FORWARD_CHUNKS = 5  # of a vector, at most: widths 1536, 3072 and 5120 need no padding
BACKWARD_CHUNKS = 3  # fewer, as registers also hold the gradient and the sums of dw
ONE_CHUNK_WIDTH = 512  # vectors up to this width are one chunk

AllReduce = Callable[[Tensor], Tensor]


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Reference implementation for unsharded vectors, differentiable; arguments as of `rms_norm`."""
    wide, weight = upcast(x, weight_D)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def squares_torch(x: Tensor) -> Tensor:
    """sum x^2 [..., 1], in fp32 at least."""
    return upcast(x)[0].square().sum(-1, keepdim=True)


def forward_torch(x: Tensor, weight_D: Tensor, inverse: Tensor) -> Tensor:
    """y, in fp32 at least; `inverse`: r [..., 1]."""
    wide, weight = upcast(x, weight_D)
    return (wide * inverse).mul_(weight)


def backward_torch(
    grad: Tensor, x: Tensor, weight_D: Tensor, inverse: Tensor, size: int, all_reduce: AllReduce | None
) -> tuple[Tensor, Tensor]:
    """dx and dw, in fp32 at least."""
    dy, wide, weight = upcast(grad, x, weight_D)
    n = wide * inverse
    products = dy * n
    dot, dweight_D = (products @ weight)[..., None], products.flatten(0, -2).sum(0)
    if all_reduce is not None:
        dot = all_reduce(dot)
    dx = torch.mul(dy, weight, out=products).addcmul_(n, dot / size, value=-1).mul_(inverse)
    return dx, dweight_D


@triton.jit
def sum_of_squares(xs):
    """sum x^2 of each vector [T], in fp32."""
    squares = tl.zeros(xs[0].shape, tl.float32)
    for c in tl.static_range(len(xs)):
        x = xs[c].to(tl.float32)
        squares += x * x
    return tl.sum(squares, 1)


@triton.jit
def weighted_dot(grads, xs, ws):
    """sum dy w x of each vector [T], in fp32."""
    products = tl.zeros(xs[0].shape, tl.float32)
    for c in tl.static_range(len(xs)):
        products += grads[c].to(tl.float32) * ws[c].to(tl.float32) * xs[c].to(tl.float32)
    return tl.sum(products, 1)


@jit_for_packs
def sums_kernel(
    x_MD, grad_MD, weight_D, inverse_M, sums_M, x_stride, grad_stride, M,
    D: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0) * T + tl.arange(0, T)
    at, mask = vector.to(tl.int64)[:, None], (vector < M)[:, None]
    xs = load_chunks(x_MD + at * x_stride, mask, D, C, BLOCK)
    if grad_MD is None:
        sums = sum_of_squares(xs)
    else:
        grads = load_chunks(grad_MD + at * grad_stride, mask, D, C, BLOCK)
        ws = load_chunks(weight_D + at * 0, mask, D, C, BLOCK)
        sums = weighted_dot(grads, xs, ws) * tl.load(inverse_M + vector, mask=vector < M, other=0.0)
    tl.store(sums_M + vector, sums, mask=vector < M)


@jit_for_packs
def forward_kernel(
    x_MD, weight_D, squares_M, y_MD, inverse_M, x_stride, M, size, eps,
    D: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0) * T + tl.arange(0, T)
    at, mask = vector.to(tl.int64)[:, None], (vector < M)[:, None]
    xs = load_chunks(x_MD + at * x_stride, mask, D, C, BLOCK)
    ws = load_chunks(weight_D + at * 0, mask, D, C, BLOCK)  # one copy per vector, so that ws has the layout of xs
    if squares_M is None:
        squares = sum_of_squares(xs)
    else:
        squares = tl.load(squares_M + vector, mask=vector < M, other=0.0)
    inverse = tl.rsqrt(squares / size + eps)
    for c in tl.static_range(C):
        y = xs[c].to(tl.float32) * inverse[:, None] * ws[c].to(tl.float32)
        store_chunk(y_MD + at * D, c, y, mask, D)
    tl.store(inverse_M + vector, inverse, mask=vector < M)


@jit_for_packs
def backward_kernel(
    grad_MD, x_MD, weight_D, inverse_M, dots_M, dx_MD, dweight_QD, grad_stride, x_stride, M, PROGRAM_VECTORS, size,
    D: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * PROGRAM_VECTORS
    end = tl.minimum(start + PROGRAM_VECTORS, M)
    sums = full_chunks(0.0, T, C, BLOCK)
    for first in range(start, end, T):
        vector = first + tl.arange(0, T)
        at, mask = vector.to(tl.int64)[:, None], (vector < end)[:, None]
        grads = load_chunks(grad_MD + at * grad_stride, mask, D, C, BLOCK)
        xs = load_chunks(x_MD + at * x_stride, mask, D, C, BLOCK)
        ws = load_chunks(weight_D + at * 0, mask, D, C, BLOCK)
        inverse = tl.load(inverse_M + vector, mask=vector < end, other=0.0)
        if dots_M is None:
            dot = weighted_dot(grads, xs, ws) * inverse
        else:
            dot = tl.load(dots_M + vector, mask=vector < end, other=0.0)
        new_sums = ()
        for c in tl.static_range(C):
            dy, n = grads[c].to(tl.float32), xs[c].to(tl.float32) * inverse[:, None]
            dx = inverse[:, None] * (dy * ws[c].to(tl.float32) - n * (dot / size)[:, None])
            store_chunk(dx_MD + at * D, c, dx, mask, D)
            new_sums += (sums[c] + dy * n,)
        sums = new_sums
    store_sums(dweight_QD, tl.program_id(0), sums, D)


def tile_shape(config: LaunchConfig, width: int, max_chunks: int) -> tuple[int, int, int]:
    """(T, C, BLOCK): T vectors of C chunks of BLOCK elements."""
    count, block = split_width(width, 1 if width <= ONE_CHUNK_WIDTH else max_chunks)
    return config.vectors_per_tile(block), count, block


def as_vectors(x: Tensor) -> Tensor:
    """[M, D] with a last dim of stride 1, as kernels read it; a view if the strides allow it."""
    return unit_stride(x.reshape(-1, x.shape[-1]))


def empty_sums(x: Tensor) -> Tensor:
    """fp32 [..., 1]: one element per vector, uninitialised."""
    return x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.custom_op("megasora::rms_norm_sums", mutates_args=())
def sums_triton(x: Tensor, grad: Tensor | None, weight_D: Tensor | None, inverse: Tensor | None) -> Tensor:
    """fp32 [..., 1]: sum x^2 of each vector, or with `grad` sum dy w x r."""
    sums, width = empty_sums(x), x.shape[-1]
    if x.numel():
        x_MD, grad_MD, weight_D = as_vectors(x), None if grad is None else as_vectors(grad), unit_stride(weight_D)
        config = launch_config(FORWARD, x.device)
        tile = tile_shape(config, width, FORWARD_CHUNKS)
        sums_kernel[(cdiv(len(x_MD), tile[0]),)](
            x_MD, grad_MD, weight_D, inverse, sums, x_MD.stride(0), 0 if grad is None else grad_MD.stride(0),
            len(x_MD), width, *tile, num_warps=config.num_warps(tile[2]),
        )  # fmt: skip
    return sums


@sums_triton.register_fake
def _(x, grad, weight_D, inverse):
    return empty_sums(x)


@torch.library.custom_op("megasora::rms_norm", mutates_args=())
def forward_triton(x: Tensor, weight_D: Tensor, squares: Tensor | None, size: int, eps: float) -> tuple[Tensor, Tensor]:
    """y, and r [..., 1]. `squares`: sum x^2 of the full vectors [..., 1], if x is a shard of them."""
    y, inverse, width = x.new_empty(x.shape), empty_sums(x), x.shape[-1]
    if x.numel():
        x_MD, weight_D, config = as_vectors(x), unit_stride(weight_D), launch_config(FORWARD, x.device)
        squares = squares if squares is None else squares.contiguous()
        tile = tile_shape(config, width, FORWARD_CHUNKS)
        forward_kernel[(cdiv(len(x_MD), tile[0]),)](
            x_MD, weight_D, squares, y, inverse, x_MD.stride(0), len(x_MD), size, eps,
            width, *tile, num_warps=config.num_warps(tile[2]),
        )  # fmt: skip
    return y, inverse


@forward_triton.register_fake
def _(x, weight_D, squares, size, eps):
    return x.new_empty(x.shape), empty_sums(x)


@torch.library.custom_op("megasora::rms_norm_backward", mutates_args=())
def backward_triton(
    grad: Tensor, x: Tensor, weight_D: Tensor, inverse: Tensor, dots: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """dx, and dw in fp32. `dots`: sum dy w x r of the full vectors [..., 1], if x is a shard of them."""
    width = x.shape[-1]
    num_vectors = x.numel() // max(width, 1)
    program_vectors = tile_tokens_for(num_vectors)
    num_programs = cdiv(num_vectors, program_vectors)
    dx, dweight_QD = x.new_empty(x.shape), x.new_empty(num_programs, width, dtype=torch.float32)
    if x.numel():
        grad_MD, x_MD, weight_D = as_vectors(grad), as_vectors(x), unit_stride(weight_D)
        config = launch_config(BACKWARD, x.device)
        dots = dots if dots is None else dots.contiguous()
        tile = tile_shape(config, width, BACKWARD_CHUNKS)
        backward_kernel[(num_programs,)](
            grad_MD, x_MD, weight_D, inverse, dots, dx, dweight_QD, grad_MD.stride(0), x_MD.stride(0),
            num_vectors, program_vectors, size, width, *tile, num_warps=config.num_warps(tile[2]),
        )  # fmt: skip
    return dx, dweight_QD.sum(0)


@backward_triton.register_fake
def _(grad, x, weight_D, inverse, dots, size):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=torch.float32)


class RMSNorm(Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight_D: Tensor, eps: float, size: int, all_reduce: AllReduce | None, backend: str
    ) -> Tensor:
        if backend == "triton":
            squares = None if all_reduce is None else all_reduce(call(sums_triton, x, None, None, None))
            y, inverse = call(forward_triton, x, weight_D, squares, size, eps)
        else:
            squares = squares_torch(x)
            squares = squares if all_reduce is None else all_reduce(squares)
            inverse = torch.rsqrt(squares / size + eps)
            y = forward_torch(x, weight_D, inverse).to(x.dtype)
        ctx.save_for_backward(x, weight_D, inverse)
        ctx.size, ctx.all_reduce, ctx.backend = size, all_reduce, backend
        return y.detach()  # see launch.py

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        if ctx.backend == "triton":
            dots = None if ctx.all_reduce is None else ctx.all_reduce(call(sums_triton, x, grad, weight_D, inverse))
            dx, dweight_D = call(backward_triton, grad, x, weight_D, inverse, dots, ctx.size)
        else:
            dx, dweight_D = backward_torch(grad, x, weight_D, inverse, ctx.size, ctx.all_reduce)
        return dx.to(x.dtype), dweight_D.to(weight_D.dtype), None, None, None, None


def rms_norm(
    x: Tensor,
    weight_D: Tensor,
    eps: float,
    size: int | None = None,
    all_reduce: AllReduce | None = None,
    backend: str = "auto",
) -> Tensor:
    """`x` [..., D], at least two dims, and `weight_D` [D] -> [..., D] in the dtype of `x`. `backend`: see launch.py.

    For sharded vectors: `size` is the number of elements of a full vector, `all_reduce` takes the local sums [..., 1]
    and returns their sum over all shards, without recording a gradient. Differentiable once. ValueError for shapes or
    dtypes that do not match.
    """
    if x.ndim < 2 or weight_D.shape != x.shape[-1:]:
        raise ValueError(f"x {tuple(x.shape)} must be [..., D], its weight {tuple(weight_D.shape)} [D]")
    if not x.is_floating_point():
        raise ValueError(f"x {tuple(x.shape)} of {x.dtype} must be floating point")
    check_device(x=x, weight=weight_D)
    return RMSNorm.apply(
        x, weight_D, eps, x.shape[-1] if size is None else size, all_reduce, resolve_backend(backend, x)
    )

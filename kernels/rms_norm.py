"""RMSNorm with a weight: vectors x [..., D] and w [D] in, y [..., D] out (arXiv 1910.07467).

    r = 1 / sqrt(sum x^2 / n + eps)            y = x r w
    dx = r (dy w - x r^2 / n sum dy w x)       dw = sum over vectors of dy x r

A vector of n numbers may lie in parts on several ranks, D of them here: `total` then adds up what its parts give for a
sum, once in either pass. For the backward pass x is kept as it came, and r. Computed in fp32 at least and rounded once.

Least traffic in bf16: 4 bytes a number forward (x, y), 6 backward (x, dy, dx); with `total` one more reading of what is
read, since the sums must be known before the first number is written.

A program asks memory for whole vectors at once, in a few tiles, and only then computes. In the backward pass it works
through a run of vectors, over which it sums dw in registers; sums of runs are added up in a second pass; both have one
order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.kernels import rows
from megasora.kernels.launch import Launch, Table, check_device, chosen, dense, launch_for, widened

FORWARD: Table = {"any": Launch(tile=1024, numbers=8)}
BACKWARD: Table = {"any": Launch(tile=1024, numbers=8)}
FORWARD_CHUNKS = 5  # tiles that hold a vector: widths 1536, 3072 and 5120 leave no gap
BACKWARD_CHUNKS = 3  # fewer, as registers hold its gradient and sums of the weight as well
SHORT = 512  # a vector that is not longer is in one tile

Total = Callable[[Tensor], Tensor]


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The maths, of whole vectors, differentiable; arguments as of `rms_norm`."""
    wide, weight = widened(x, weight_D)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def squares_torch(x: Tensor) -> Tensor:
    """sum x^2 [..., 1], in fp32 at least."""
    return widened(x)[0].square().sum(-1, keepdim=True)


def forward_torch(x: Tensor, weight_D: Tensor, inverse: Tensor) -> Tensor:
    """y, in fp32 at least; `inverse`: r [..., 1]."""
    wide, weight = widened(x, weight_D)
    return (wide * inverse).mul_(weight)


def backward_torch(
    grad: Tensor, x: Tensor, weight_D: Tensor, inverse: Tensor, size: int, total: Total | None
) -> tuple[Tensor, Tensor]:
    """dx and dw, in fp32 at least."""
    dy, wide, weight = widened(grad, x, weight_D)
    n = wide * inverse
    products = dy * n
    along, dweight_D = (products @ weight)[..., None], products.flatten(0, -2).sum(0)
    if total is not None:
        along = total(along)
    dx = torch.mul(dy, weight, out=products).addcmul_(n, along / size, value=-1).mul_(inverse)
    return dx, dweight_D


@triton.jit
def load_chunks(x, there, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr):
    """C chunks [T, BLOCK_D], all on their way at once; `x` [T, 1] points to the first numbers of vectors."""
    chunks = ()
    for c in tl.static_range(C):
        d = (c * BLOCK_D + tl.arange(0, BLOCK_D))[None]
        chunks += (tl.load(x + d, mask=there & (d < D), other=0.0),)
    return chunks


@triton.jit
def store_chunk(y, c: tl.constexpr, chunk, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = (c * BLOCK_D + tl.arange(0, BLOCK_D))[None]
    tl.store(y + d, chunk.to(y.dtype.element_ty), mask=there & (d < D))


@triton.jit
def sum_of_squares(xs):
    total = tl.zeros(xs[0].shape, tl.float32)
    for c in tl.static_range(len(xs)):
        x = xs[c].to(tl.float32)
        total += x * x
    return tl.sum(total, 1)


@triton.jit
def sum_along(grads, xs, ws):
    """sum dy w x of each vector."""
    total = tl.zeros(xs[0].shape, tl.float32)
    for c in tl.static_range(len(xs)):
        total += grads[c].to(tl.float32) * ws[c].to(tl.float32) * xs[c].to(tl.float32)
    return tl.sum(total, 1)


@triton.jit
def sums_kernel(
    x_MD, grad_MD, weight_D, inverse_M, sums_M, x_stride, grad_stride, M,
    D: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0) * T + tl.arange(0, T)
    at, there = vector.to(tl.int64)[:, None], (vector < M)[:, None]
    xs = load_chunks(x_MD + at * x_stride, there, D, BLOCK_D, C)
    if grad_MD is None:
        sums = sum_of_squares(xs)
    else:
        grads = load_chunks(grad_MD + at * grad_stride, there, D, BLOCK_D, C)
        ws = load_chunks(weight_D + at * 0, there, D, BLOCK_D, C)
        sums = sum_along(grads, xs, ws) * tl.load(inverse_M + vector, mask=vector < M, other=0.0)
    tl.store(sums_M + vector, sums, mask=vector < M)


@triton.jit
def forward_kernel(
    x_MD, weight_D, squares_M, y_MD, inverse_M, x_stride, M, size, eps,
    D: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0) * T + tl.arange(0, T)
    at, there = vector.to(tl.int64)[:, None], (vector < M)[:, None]
    xs = load_chunks(x_MD + at * x_stride, there, D, BLOCK_D, C)
    # spread over vectors, so that every thread reads what its own numbers want
    ws = load_chunks(weight_D + at * 0, there, D, BLOCK_D, C)
    if squares_M is None:
        squares = sum_of_squares(xs)
    else:
        squares = tl.load(squares_M + vector, mask=vector < M, other=0.0)
    inverse = tl.rsqrt(squares / size + eps)
    for c in tl.static_range(C):
        y = xs[c].to(tl.float32) * inverse[:, None] * ws[c].to(tl.float32)
        store_chunk(y_MD + at * D, c, y, there, D, BLOCK_D)
    tl.store(inverse_M + vector, inverse, mask=vector < M)


@triton.jit
def backward_kernel(
    grad_MD, x_MD, weight_D, inverse_M, alongs_M, dx_MD, dweight_QD, grad_stride, x_stride, M, RUN, size,
    D: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * RUN
    end = tl.minimum(start + RUN, M)
    sums = ()
    for _ in tl.static_range(C):
        sums += (tl.zeros([T, BLOCK_D], tl.float32),)
    for first in range(start, end, T):
        vector = first + tl.arange(0, T)
        at, there = vector.to(tl.int64)[:, None], (vector < end)[:, None]
        grads = load_chunks(grad_MD + at * grad_stride, there, D, BLOCK_D, C)
        xs = load_chunks(x_MD + at * x_stride, there, D, BLOCK_D, C)
        ws = load_chunks(weight_D + at * 0, there, D, BLOCK_D, C)
        inverse = tl.load(inverse_M + vector, mask=vector < end, other=0.0)
        if alongs_M is None:
            along = sum_along(grads, xs, ws) * inverse
        else:
            along = tl.load(alongs_M + vector, mask=vector < end, other=0.0)
        added = ()
        for c in tl.static_range(C):
            dy, n = grads[c].to(tl.float32), xs[c].to(tl.float32) * inverse[:, None]
            dx = inverse[:, None] * (dy * ws[c].to(tl.float32) - n * (along / size)[:, None])
            store_chunk(dx_MD + at * D, c, dx, there, D, BLOCK_D)
            added += (sums[c] + dy * n,)
        sums = added
    run = tl.program_id(0).to(tl.int64)
    for c in tl.static_range(C):
        store_chunk(dweight_QD + run * D, c, tl.sum(sums[c], 0, keep_dims=True), True, D, BLOCK_D)


def tile_of(launch: Launch, width: int, chunks: int) -> tuple[int, int, int]:
    """Vectors and numbers of each in a tile, and the tiles that hold a vector."""
    block = triton.next_power_of_2(width if width <= SHORT else triton.cdiv(width, chunks))
    return launch.vectors(block), block, triton.cdiv(width, block)


def vectors(x: Tensor) -> Tensor:
    """[M, D], as kernels read it: a view, unless the vectors do not lie at one distance."""
    return dense(x.reshape(-1, x.shape[-1]))


def number_each(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.custom_op("megasora::rms_norm_sums", mutates_args=())
def sums_triton(x: Tensor, grad: Tensor | None, weight_D: Tensor | None, inverse: Tensor | None) -> Tensor:
    """fp32 [..., 1]: sum x^2 of each vector, or with `grad` sum dy w x r."""
    sums, width = number_each(x), x.shape[-1]
    if x.numel():
        x_MD, grad_MD, weight_D = vectors(x), None if grad is None else vectors(grad), dense(weight_D)
        launch = launch_for(FORWARD, x.device)
        tile = tile_of(launch, width, FORWARD_CHUNKS)
        sums_kernel[(triton.cdiv(len(x_MD), tile[0]),)](
            x_MD, grad_MD, weight_D, inverse, sums, x_MD.stride(0), 0 if grad is None else grad_MD.stride(0),
            len(x_MD), width, *tile, num_warps=launch.warps(tile[1]),
        )  # fmt: skip
    return sums


@sums_triton.register_fake
def _(x, grad, weight_D, inverse):
    return number_each(x)


@torch.library.custom_op("megasora::rms_norm", mutates_args=())
def forward_triton(x: Tensor, weight_D: Tensor, squares: Tensor | None, size: int, eps: float) -> tuple[Tensor, Tensor]:
    """y, and r [..., 1]; `squares`: sum x^2 of whole vectors, where they are not those of x."""
    y, inverse, width = x.new_empty(x.shape), number_each(x), x.shape[-1]
    if x.numel():
        x_MD, weight_D, launch = vectors(x), dense(weight_D), launch_for(FORWARD, x.device)
        squares = squares if squares is None else squares.contiguous()
        tile = tile_of(launch, width, FORWARD_CHUNKS)
        forward_kernel[(triton.cdiv(len(x_MD), tile[0]),)](
            x_MD, weight_D, squares, y, inverse, x_MD.stride(0), len(x_MD), size, eps,
            width, *tile, num_warps=launch.warps(tile[1]),
        )  # fmt: skip
    return y, inverse


@forward_triton.register_fake
def _(x, weight_D, squares, size, eps):
    return x.new_empty(x.shape), number_each(x)


@torch.library.custom_op("megasora::rms_norm_backward", mutates_args=())
def backward_triton(
    grad: Tensor, x: Tensor, weight_D: Tensor, inverse: Tensor, alongs: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """dx, and dw in fp32; `alongs`: sum dy w x r of whole vectors, where they are not those of x."""
    width = x.shape[-1]
    num_vectors = x.numel() // max(width, 1)
    run = rows.run_of(num_vectors)
    num_runs = triton.cdiv(num_vectors, run)
    dx, dweight_QD = x.new_empty(x.shape), x.new_empty(num_runs, width, dtype=torch.float32)
    if x.numel():
        grad_MD, x_MD, weight_D, launch = vectors(grad), vectors(x), dense(weight_D), launch_for(BACKWARD, x.device)
        alongs = alongs if alongs is None else alongs.contiguous()
        tile = tile_of(launch, width, BACKWARD_CHUNKS)
        backward_kernel[(num_runs,)](
            grad_MD, x_MD, weight_D, inverse, alongs, dx, dweight_QD, grad_MD.stride(0), x_MD.stride(0),
            num_vectors, run, size, width, *tile, num_warps=launch.warps(tile[1]),
        )  # fmt: skip
    return dx, dweight_QD.sum(0)


@backward_triton.register_fake
def _(grad, x, weight_D, inverse, alongs, size):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=torch.float32)


class RMSNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float, size: int, total: Total | None, via: str) -> Tensor:
        if via == "triton":
            squares = None if total is None else total(sums_triton(x, None, None, None))
            y, inverse = forward_triton(x, weight_D, squares, size, eps)
        else:
            squares = squares_torch(x)
            squares = squares if total is None else total(squares)
            inverse = torch.rsqrt(squares / size + eps)
            y = forward_torch(x, weight_D, inverse).to(x.dtype)
        ctx.save_for_backward(x, weight_D, inverse)
        ctx.size, ctx.total, ctx.via = size, total, via
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        if ctx.via == "triton":
            alongs = None if ctx.total is None else ctx.total(sums_triton(x, grad, weight_D, inverse))
            dx, dweight_D = backward_triton(grad, x, weight_D, inverse, alongs, ctx.size)
        else:
            dx, dweight_D = backward_torch(grad, x, weight_D, inverse, ctx.size, ctx.total)
        return dx.to(x.dtype), dweight_D.to(weight_D.dtype), None, None, None, None


def rms_norm(
    x: Tensor,
    weight_D: Tensor,
    eps: float,
    size: int | None = None,
    total: Total | None = None,
    via: str = "auto",
) -> Tensor:
    """`x` [..., D], at least two dims, and `weight_D` [D] -> [..., D] in the dtype of `x`. `via`: see launch.py.

    `size` and `total`, for vectors whose other parts lie elsewhere: numbers of a whole vector, and what adds up the
    parts' sums [..., 1] without recording a gradient. Differentiable once. ValueError on what does not fit.
    """
    if x.ndim < 2 or weight_D.shape != x.shape[-1:]:
        raise ValueError(f"x {tuple(x.shape)} must be [..., D], its weight {tuple(weight_D.shape)} [D]")
    if not x.is_floating_point():
        raise ValueError(f"x {tuple(x.shape)} of {x.dtype} must be of floating point")
    check_device(x=x, weight=weight_D)
    return RMSNorm.apply(x, weight_D, eps, x.shape[-1] if size is None else size, total, chosen(via, x))

"""adaLN: tokens [L, D] and the shift and scale [R, D] of their rows in, normed and modulated tokens [L, D] out
(DiT, arXiv 2212.09748).

    y[i] = m[i] (1 + scale[r]) + shift[r]        r the row of token i; without shift and scale, y = m
    m[i] = n[i] weight + bias                    without weight and bias, m = n
    n[i] = (x[i] - mean x[i]) / sqrt(var x[i] + eps)        norm="rms": n[i] = x[i] / sqrt(mean x[i]^2 + eps)

    f = (1 + scale[r]) weight,  a = dy[i] f
    dx[i] = (a - mean a - n mean(a n)) / sqrt(var + eps)    norm="rms": without mean a
    B[r] = sum dy[i],  A[r] = sum dy[i] n[i]     over the tokens i of row r
    dshift = B,  dscale = weight A + bias B,  dweight = sum_r (1 + scale) A,  dbias = sum_r (1 + scale) B

For the backward pass x is kept, and of each token its mean and 1 / sqrt(var + eps): n, and what belongs to rows spread
over the tokens, would be as large as x each. Computed in fp32 at least and rounded once. Padding comes out as 0 and
gives no gradient, whatever stands there.

Least traffic in bf16: 4 bytes a number forward (x, y), 6 backward (x, dy, dx). Sums by row take one order: see rows.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.kernels.launch import Launch, Table, check_device, chosen, dense, row_stride
from megasora.kernels.rows import (
    Rows,
    launch_runs,
    load_chunks,
    load_row_vector,
    load_vector,
    plus,
    scaled,
    store_chunk,
    store_sums,
    sum_of_runs,
    times,
    zero_chunks,
)

FORWARD: Table = {"any": Launch()}
BACKWARD: Table = {"any": Launch()}
NORMS = ("layer", "rms")


def adaln_modulate_reference(
    x_LD: Tensor,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    rows: Rows,
    eps: float,
    weight_D: Tensor | None = None,
    bias_D: Tensor | None = None,
    norm: str = "layer",
) -> Tensor:
    """The maths, differentiable; arguments as of `adaln_modulate`."""
    y = norm_reference(rows.real(x_LD), eps, weight_D, bias_D, norm)
    if scale_RD is not None:
        y = y * (1 + rows.spread(scale_RD).to(y.dtype)) + rows.spread(shift_RD).to(y.dtype)
    return rows.padded(y, x_LD.dtype)


def norm_reference(x: Tensor, eps: float, weight_D: Tensor | None, bias_D: Tensor | None, norm: str) -> Tensor:
    if norm == "layer":
        n = F.layer_norm(x, x.shape[-1:], eps=eps)
    else:
        n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    n = n if weight_D is None else n * weight_D.to(x.dtype)
    return n if bias_D is None else n + bias_D.to(x.dtype)


def norm_forward(x: Tensor, eps: float, norm: str) -> tuple[Tensor, Tensor]:
    """n of x [l, D], and what a token keeps: [2, l] mean and 1 / sqrt(var + eps), or [1, l] the latter for "rms"."""
    if norm == "layer":
        n, mean_L1, inverse_L1 = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        return n, torch.cat((mean_L1, inverse_L1), -1).T
    inverse_L1 = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * inverse_L1, inverse_L1.T


def normed(x: Tensor, kept_SL: Tensor) -> Tensor:
    return x * kept_SL[0, :, None] if len(kept_SL) == 1 else (x - kept_SL[0, :, None]) * kept_SL[1, :, None]


def norm_backward(a: Tensor, n: Tensor, kept_SL: Tensor) -> Tensor:
    """dx from a = dn and n, [l, D]."""
    dx = torch.addcmul(a, n, (a * n).mean(-1, keepdim=True), value=-1)
    if len(kept_SL) == 2:
        dx = dx - a.mean(-1, keepdim=True)
    return dx * kept_SL[-1, :, None]


def forward_torch(
    x_LD: Tensor,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    rows: Rows,
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor]:
    """y, and what of each token is kept."""
    x = rows.real(x_LD)
    y, kept_SL = norm_forward(x, eps, norm)
    y = y if weight_D is None else y * weight_D.to(x.dtype)
    y = y if bias_D is None else y + bias_D.to(x.dtype)
    if scale_RD is not None:
        y = torch.addcmul(rows.spread(shift_RD.to(x.dtype)), y, rows.spread(1 + scale_RD.to(x.dtype)))
    return rows.padded(y, x_LD.dtype), kept_SL


def backward_torch(
    grad_LD: Tensor, x_LD: Tensor, scale_RD: Tensor | None, weight_D: Tensor | None, kept_SL: Tensor, rows: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """dx of real tokens, not yet rounded, and B and A of the rows."""
    x, dy = rows.real(x_LD), rows.real(grad_LD)
    n = normed(x, kept_SL)
    a = dy if scale_RD is None else dy * rows.spread(1 + scale_RD.to(dy.dtype))
    a = a if weight_D is None else a * weight_D.to(dy.dtype)
    return norm_backward(a, n, kept_SL), rows.sum(dy), rows.sum(dy * n)


@triton.jit
def total(chunks):
    """[T, 1]: the sum of each token's numbers."""
    together = chunks[0]
    for c in tl.static_range(1, len(chunks)):
        together += chunks[c]
    return tl.sum(together, 1, keep_dims=True)


@triton.jit
def less_mean(chunks, mean, D):
    """x - mean, and 0 beyond the width."""
    less = ()
    for c in tl.static_range(len(chunks)):
        d = c * chunks[c].shape[1] + tl.arange(0, chunks[c].shape[1])[None]
        less += (tl.where(d < D, chunks[c] - mean, 0.0),)
    return less


@triton.jit
def norm_tokens(xs, D, eps, LAYER: tl.constexpr):
    """n of tokens, and their mean (of "layer") and 1 / sqrt(...), [T, 1]."""
    mean = total(xs) / D
    if LAYER:
        xs = less_mean(xs, mean, D)
    inverse = tl.rsqrt(total(times(xs, xs)) / D + eps)
    return scaled(xs, inverse), mean, inverse


@triton.jit
def store_kept(kept_SL, token, mean, inverse, real, REAL, LAYER: tl.constexpr):
    if LAYER:
        tl.store(kept_SL + token, mean, mask=real)
        kept_SL += REAL
    tl.store(kept_SL + token, inverse, mask=real)


@triton.jit
def norm_again(xs, kept_SL, token, real, REAL, D, LAYER: tl.constexpr):
    """n of tokens and 1 / sqrt(...), from what the forward kept of them."""
    if LAYER:
        xs = less_mean(xs, tl.load(kept_SL + token, mask=real, other=0.0), D)
        kept_SL += REAL
    inverse = tl.load(kept_SL + token, mask=real, other=0.0)
    return scaled(xs, inverse), inverse


@triton.jit
def norm_gradient(dys, factors, ns, inverse, D, LAYER: tl.constexpr):
    """dx, with a = dy factor = dn."""
    a = times(dys, factors)
    along = total(times(a, ns)) / D
    dxs = ()
    if LAYER:
        mean = total(a) / D
        for c in tl.static_range(len(ns)):
            dxs += ((a[c] - mean - ns[c] * along) * inverse,)
    else:
        for c in tl.static_range(len(ns)):
            dxs += ((a[c] - ns[c] * along) * inverse,)
    return dxs


@triton.jit
def factor_and_offset(
    shift_RD, scale_RD, weight_D, bias_D, row, shift_stride, scale_stride, R, D, C: tl.constexpr, BLOCK: tl.constexpr
):
    """y = n factor + offset, chunks [1, BLOCK]."""
    weight, bias = load_vector(weight_D, D, 1.0, C, BLOCK), load_vector(bias_D, D, 0.0, C, BLOCK)
    scale = load_row_vector(scale_RD, row, scale_stride, R, D, C, BLOCK)
    shift = load_row_vector(shift_RD, row, shift_stride, R, D, C, BLOCK)
    factors, offsets = (), ()
    for c in tl.static_range(C):
        factors += ((1 + scale[c]) * weight[c],)
        offsets += ((1 + scale[c]) * bias[c] + shift[c],)
    return factors, offsets


@triton.jit
def forward_kernel(
    x_LD, shift_RD, scale_RD, weight_D, bias_D, start_Q, row_Q, y_LD, kept_SL,
    x_stride, shift_stride, scale_stride, R, REAL, D, eps,
    LAYER: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0)
    row, start, end = tl.load(row_Q + run), tl.load(start_Q + run), tl.load(start_Q + run + 1)
    factors, offsets = factor_and_offset(
        shift_RD, scale_RD, weight_D, bias_D, row, shift_stride, scale_stride, R, D, C, BLOCK
    )
    for first in tl.range(start, end, T, num_stages=STAGES):
        token = first + tl.arange(0, T)[:, None]
        at, inside, real = token.to(tl.int64), token < end, (token < end) & (row < R)
        xs = load_chunks(x_LD + at * x_stride, real, D, C, BLOCK)
        ns, mean, inverse = norm_tokens(xs, D, eps, LAYER)
        for c in tl.static_range(C):
            store_chunk(y_LD + at * D, c, tl.where(real, ns[c] * factors[c] + offsets[c], 0.0), inside, D)
        store_kept(kept_SL, token, mean, inverse, real, REAL, LAYER)


@triton.jit
def backward_kernel(
    grad_LD, x_LD, scale_RD, weight_D, kept_SL, start_Q, row_Q, dx_LD, grad_runs_QD, along_runs_QD,
    grad_stride, x_stride, scale_stride, R, REAL, D,
    LAYER: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0)
    row, start, end = tl.load(row_Q + run), tl.load(start_Q + run), tl.load(start_Q + run + 1)
    factors, _ = factor_and_offset(None, scale_RD, weight_D, None, row, 0, scale_stride, R, D, C, BLOCK)
    grads, alongs = zero_chunks(T, C, BLOCK), zero_chunks(T, C, BLOCK)
    for first in tl.range(start, end, T, num_stages=STAGES):
        token = first + tl.arange(0, T)[:, None]
        at, inside, real = token.to(tl.int64), token < end, (token < end) & (row < R)
        xs = load_chunks(x_LD + at * x_stride, real, D, C, BLOCK)
        dys = load_chunks(grad_LD + at * grad_stride, real, D, C, BLOCK)
        ns, inverse = norm_again(xs, kept_SL, token, real, REAL, D, LAYER)
        dxs = norm_gradient(dys, factors, ns, inverse, D, LAYER)
        for c in tl.static_range(C):
            store_chunk(dx_LD + at * D, c, dxs[c], inside, D)
        grads, alongs = plus(grads, dys), plus(alongs, times(dys, ns))
    store_sums(grad_runs_QD, run, grads, D)
    store_sums(along_runs_QD, run, alongs, D)


@torch.library.custom_op("megasora::adaln_modulate", mutates_args=())
def forward_triton(
    x_LD: Tensor,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    start_Q: Tensor,
    row_Q: Tensor,
    num_rows: int,
    num_real: int,
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor]:
    x_LD, shift_RD, scale_RD, weight_D, bias_D = map(dense, (x_LD, shift_RD, scale_RD, weight_D, bias_D))
    y_LD, kept_SL = empty_forward(x_LD, num_real, norm)
    width = x_LD.shape[1]
    launch_runs(
        forward_kernel, FORWARD, row_Q, width,
        x_LD, shift_RD, scale_RD, weight_D, bias_D, start_Q, row_Q, y_LD, kept_SL,
        x_LD.stride(0), row_stride(shift_RD), row_stride(scale_RD), num_rows, num_real, width, eps, norm == "layer",
    )  # fmt: skip
    return y_LD, kept_SL


@forward_triton.register_fake
def _(x_LD, shift_RD, scale_RD, weight_D, bias_D, start_Q, row_Q, num_rows, num_real, eps, norm):
    return empty_forward(x_LD, num_real, norm)


def empty_forward(x_LD: Tensor, num_real: int, norm: str) -> tuple[Tensor, Tensor]:
    kept_SL = x_LD.new_empty(2 if norm == "layer" else 1, num_real, dtype=torch.float32)
    return x_LD.new_empty(x_LD.shape), kept_SL


@torch.library.custom_op("megasora::adaln_modulate_backward", mutates_args=())
def backward_triton(
    grad_LD: Tensor,
    x_LD: Tensor,
    scale_RD: Tensor | None,
    weight_D: Tensor | None,
    kept_SL: Tensor,
    start_Q: Tensor,
    row_Q: Tensor,
    first_run_R: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_LD, x_LD, scale_RD, weight_D = map(dense, (grad_LD, x_LD, scale_RD, weight_D))
    num_rows, width = len(first_run_R) - 1, x_LD.shape[1]
    dx_LD = x_LD.new_empty(x_LD.shape)
    runs_2QD = x_LD.new_empty(2, len(row_Q), width, dtype=torch.float32)
    launch_runs(
        backward_kernel, BACKWARD, row_Q, width,
        grad_LD, x_LD, scale_RD, weight_D, kept_SL, start_Q, row_Q, dx_LD, *runs_2QD,
        grad_LD.stride(0), x_LD.stride(0), row_stride(scale_RD), num_rows, kept_SL.shape[1], width, len(kept_SL) == 2,
    )  # fmt: skip
    return dx_LD, *(sum_of_runs(runs_QD, first_run_R) for runs_QD in runs_2QD)


@backward_triton.register_fake
def _(grad_LD, x_LD, scale_RD, weight_D, kept_SL, start_Q, row_Q, first_run_R):
    sums_RD = (x_LD.new_empty(len(first_run_R) - 1, x_LD.shape[1], dtype=torch.float32) for _ in range(2))
    return x_LD.new_empty(x_LD.shape), *sums_RD


def vector_gradients(
    grad_RD: Tensor,
    along_RD: Tensor,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of shift, scale, weight and bias from B and A of the rows; None where there is no such vector."""
    dshift = dscale = dweight = dbias = None
    if scale_RD is not None:
        along_m = along_RD if weight_D is None else along_RD * weight_D
        dscale = along_m if bias_D is None else along_m + grad_RD * bias_D
        dshift, dscale = grad_RD.to(shift_RD.dtype), dscale.to(scale_RD.dtype)
        factor_RD = 1 + scale_RD.to(grad_RD.dtype)
        grad_RD, along_RD = grad_RD * factor_RD, along_RD * factor_RD
    if weight_D is not None:
        dweight = along_RD.sum(0).to(weight_D.dtype)
    if bias_D is not None:
        dbias = grad_RD.sum(0).to(bias_D.dtype)
    return dshift, dscale, dweight, dbias


class AdalnModulate(Function):
    @staticmethod
    def forward(ctx, x_LD, shift_RD, scale_RD, weight_D, bias_D, rows: Rows, eps: float, norm: str, via: str) -> Tensor:
        given = x_LD, shift_RD, scale_RD, weight_D, bias_D
        if via == "triton":
            of_rows = rows.start_Q, rows.row_Q, rows.num_rows, rows.num_real
            y_LD, kept_SL = forward_triton(*given, *of_rows, eps, norm)
        else:
            y_LD, kept_SL = forward_torch(*given, rows, eps, norm)
        ctx.save_for_backward(*given, kept_SL)
        ctx.rows, ctx.via = rows, via
        return y_LD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LD: Tensor) -> tuple[Tensor | None, ...]:
        x_LD, shift_RD, scale_RD, weight_D, bias_D, kept_SL = ctx.saved_tensors
        rows = ctx.rows
        given = grad_LD, x_LD, scale_RD, weight_D, kept_SL
        if ctx.via == "triton":
            dx_LD, *sums = backward_triton(*given, rows.start_Q, rows.row_Q, rows.first_run_R)
        else:
            dx_LD, *sums = backward_torch(*given, rows)
            dx_LD = rows.padded(dx_LD, x_LD.dtype)
        return dx_LD, *vector_gradients(*sums, shift_RD, scale_RD, weight_D, bias_D), None, None, None, None


def adaln_modulate(
    x_LD: Tensor,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    rows: Rows,
    eps: float,
    weight_D: Tensor | None = None,
    bias_D: Tensor | None = None,
    norm: str = "layer",
    via: str = "auto",
) -> Tensor:
    """norm(x) (1 + scale) + shift, [L, D] in the dtype of `x_LD`; 0 at tokens past the last row.

    `shift_RD` and `scale_RD` are both given or both None. `norm`: "layer" or "rms", with an optional weight and bias
    of its own. `via`: see launch.py. Differentiable once, in all tensors. ValueError on shapes that do not fit.
    """
    check_norm(x_LD, shift_RD, scale_RD, rows, weight_D, bias_D, norm)
    return AdalnModulate.apply(x_LD, shift_RD, scale_RD, weight_D, bias_D, rows, eps, norm, chosen(via, x_LD))


def check_norm(
    x_LD: Tensor,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    rows: Rows,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    norm: str,
) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} must be one of {', '.join(NORMS)}")
    if (shift_RD is None) != (scale_RD is None):
        raise ValueError("shift and scale belong together: give both or neither")
    rows.check(x_LD, shift=shift_RD, scale=scale_RD)
    for name, vector in (("weight", weight_D), ("bias", bias_D)):
        if vector is not None and vector.shape != x_LD.shape[1:]:
            raise ValueError(f"{name} {tuple(vector.shape)} must be [D], as x is {tuple(x_LD.shape)}")
    check_device(x=x_LD, shift=shift_RD, scale=scale_RD, rows=rows.row_L, weight=weight_D, bias=bias_D)

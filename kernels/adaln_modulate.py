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

from megasora.kernels.launch import Launch, Table, check_device, chosen, dense, launch_for, row_stride
from megasora.kernels.rows import Rows, load_row_vector, load_vector, sum_of_runs

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
def norm_tokens(x, inside, D, eps, LAYER: tl.constexpr):
    """n, mean (of "layer") and 1 / sqrt(...) of tokens [T, BLOCK_D], 0 outside."""
    mean = tl.sum(x, 1) / D
    if LAYER:
        x = tl.where(inside, x - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    return x * inverse[:, None], mean, inverse


@triton.jit
def norm_again(x, kept_SL, token, real, inside, REAL, LAYER: tl.constexpr):
    """n of tokens [T, BLOCK_D] and 1 / sqrt(...), from what the forward kept of them."""
    if LAYER:
        mean = tl.load(kept_SL + token, mask=real, other=0.0)
        kept_SL += REAL
        x = tl.where(inside, x - mean[:, None], 0.0)
    inverse = tl.load(kept_SL + token, mask=real, other=0.0)
    return x * inverse[:, None], inverse


@triton.jit
def norm_gradient(a, n, inverse, D, LAYER: tl.constexpr):
    """dx from a = dn and n."""
    along = tl.sum(a * n, 1) / D
    dx = a - n * along[:, None]
    if LAYER:
        dx -= (tl.sum(a, 1) / D)[:, None]
    return dx * inverse[:, None]


@triton.jit
def forward_kernel(
    x_LD, shift_RD, scale_RD, weight_D, bias_D, start_Q, row_Q, y_LD, kept_SL,
    x_stride, shift_stride, scale_stride, R, REAL, D, eps,
    LAYER: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run, d = tl.program_id(0), tl.arange(0, BLOCK_D)
    row, start, end = tl.load(row_Q + run), tl.load(start_Q + run), tl.load(start_Q + run + 1)
    weight, bias = load_vector(weight_D, d, D, 1.0), load_vector(bias_D, d, D, 0.0)
    factor = 1 + load_row_vector(scale_RD, row, scale_stride, R, d, D)
    offset = bias * factor + load_row_vector(shift_RD, row, shift_stride, R, d, D)
    factor *= weight
    for first in tl.range(start, end, T, num_stages=STAGES):
        token = first + tl.arange(0, T)
        inside, real = (token < end)[:, None] & (d < D)[None], (token < end) & (row < R)
        at = token.to(tl.int64)[:, None]
        x = tl.load(x_LD + at * x_stride + d[None], mask=inside & real[:, None], other=0.0).to(tl.float32)
        n, mean, inverse = norm_tokens(x, inside, D, eps, LAYER)
        y = tl.where(real[:, None], n * factor[None] + offset[None], 0.0)
        tl.store(y_LD + at * D + d[None], y.to(y_LD.dtype.element_ty), mask=inside)
        if LAYER:
            tl.store(kept_SL + token, mean, mask=real)
        tl.store(kept_SL + token + (REAL if LAYER else 0), inverse, mask=real)


@triton.jit
def backward_kernel(
    grad_LD, x_LD, scale_RD, weight_D, kept_SL, start_Q, row_Q, dx_LD, grad_runs_QD, along_runs_QD,
    grad_stride, x_stride, scale_stride, R, REAL, D,
    LAYER: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run, d = tl.program_id(0), tl.arange(0, BLOCK_D)
    row, start, end = tl.load(row_Q + run), tl.load(start_Q + run), tl.load(start_Q + run + 1)
    factor = (1 + load_row_vector(scale_RD, row, scale_stride, R, d, D)) * load_vector(weight_D, d, D, 1.0)
    grads, alongs = tl.zeros([T, BLOCK_D], tl.float32), tl.zeros([T, BLOCK_D], tl.float32)
    for first in tl.range(start, end, T, num_stages=STAGES):
        token = first + tl.arange(0, T)
        inside, real = (token < end)[:, None] & (d < D)[None], (token < end) & (row < R)
        at, loaded = token.to(tl.int64)[:, None], inside & real[:, None]
        x = tl.load(x_LD + at * x_stride + d[None], mask=loaded, other=0.0).to(tl.float32)
        dy = tl.load(grad_LD + at * grad_stride + d[None], mask=loaded, other=0.0).to(tl.float32)
        n, inverse = norm_again(x, kept_SL, token, real, inside, REAL, LAYER)
        dx = norm_gradient(dy * factor[None], n, inverse, D, LAYER)
        tl.store(dx_LD + at * D + d[None], dx.to(dx_LD.dtype.element_ty), mask=inside)
        grads += dy
        alongs += dy * n
    to = run.to(tl.int64) * D + d
    tl.store(grad_runs_QD + to, tl.sum(grads, 0), mask=d < D)
    tl.store(along_runs_QD + to, tl.sum(alongs, 0), mask=d < D)


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
    launch, block = launch_for(FORWARD, x_LD.device), triton.next_power_of_2(x_LD.shape[1])
    if len(row_Q):
        forward_kernel[(len(row_Q),)](
            x_LD, shift_RD, scale_RD, weight_D, bias_D, start_Q, row_Q, y_LD, kept_SL,
            x_LD.stride(0), row_stride(shift_RD), row_stride(scale_RD), num_rows, num_real, x_LD.shape[1], eps,
            norm == "layer", launch.vectors(block), block, launch.stages, num_warps=launch.warps(block),
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
    launch, block = launch_for(BACKWARD, x_LD.device), triton.next_power_of_2(width)
    if len(row_Q):
        backward_kernel[(len(row_Q),)](
            grad_LD, x_LD, scale_RD, weight_D, kept_SL, start_Q, row_Q, dx_LD, *runs_2QD,
            grad_LD.stride(0), x_LD.stride(0), row_stride(scale_RD), num_rows, kept_SL.shape[1], width,
            len(kept_SL) == 2, launch.vectors(block), block, launch.stages, num_warps=launch.warps(block),
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

"""What lies between two branches of a block, in one pass: the last branch comes back to the residual stream, and the
stream is normed and modulated for the next. x, branch [L, D] and row vectors [R, D] in, y and z [L, D] out.

    y[i] = x[i] + gate[r] branch[i]                    r the row of token i; without a gate, y = x + branch
    z[i] = m(y[i]) (1 + scale[r]) + shift[r]           norm, weight, bias, shift, scale: as of adaln_modulate.py

    h = dy + (gradient of z's norm and modulation in y)
    dx = h,  dbranch[i] = h[i] gate[r],  dgate[r] = sum h[i] branch[i] over the tokens i of row r

z is computed from y as it was rounded, so that it equals adaln_modulate of it. For the backward pass y is kept, which
is needed anyway, and the branch where it is gated; all else as in adaln_modulate.py. At padding z is 0, and y is x, or
x + branch without a gate.

Least traffic in bf16: 8 bytes a number forward (x, branch, y, z), 12 backward (dy, dz, y, branch, dx, dbranch); without
a gate, dbranch is dx, and backward 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.kernels import adaln_modulate, gated_add
from megasora.kernels.adaln_modulate import (
    adaln_modulate_reference,
    check_norm,
    empty_forward,
    factor_and_offset,
    norm_again,
    norm_gradient,
    norm_tokens,
    store_kept,
    vector_gradients,
)
from megasora.kernels.gated_add import check_branch, gated_add_reference
from megasora.kernels.launch import Launch, Table, check_device, chosen, dense, row_stride
from megasora.kernels.rows import (
    Rows,
    launch_runs,
    load_chunks,
    load_row_vector,
    plus,
    store_chunk,
    store_sums,
    sum_of_runs,
    times,
    zero_chunks,
)

FORWARD: Table = {"any": Launch()}
BACKWARD: Table = {"any": Launch()}


def gated_residual_adaln_reference(
    x_LD: Tensor,
    branch_LD: Tensor,
    gate_RD: Tensor | None,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    rows: Rows,
    eps: float,
    weight_D: Tensor | None = None,
    bias_D: Tensor | None = None,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """The maths, differentiable; arguments as of `gated_residual_adaln`."""
    if gate_RD is None:
        y_LD = (x_LD + branch_LD).to(x_LD.dtype)
    else:
        y_LD = gated_add_reference(x_LD, branch_LD, gate_RD, rows)
    return y_LD, adaln_modulate_reference(y_LD, shift_RD, scale_RD, rows, eps, weight_D, bias_D, norm)


def forward_torch(
    x_LD: Tensor,
    branch_LD: Tensor,
    gate_RD: Tensor | None,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    rows: Rows,
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, z, and what of each token is kept."""
    if gate_RD is None:
        y_LD = (x_LD + branch_LD).to(x_LD.dtype)
    else:
        y_LD = gated_add.forward_torch(x_LD, branch_LD, gate_RD, rows)
    return y_LD, *adaln_modulate.forward_torch(y_LD, shift_RD, scale_RD, weight_D, bias_D, rows, eps, norm)


def backward_torch(
    grad_y_LD: Tensor,
    grad_z_LD: Tensor,
    y_LD: Tensor,
    branch_LD: Tensor | None,
    gate_RD: Tensor | None,
    scale_RD: Tensor | None,
    weight_D: Tensor | None,
    kept_SL: Tensor,
    rows: Rows,
) -> tuple[Tensor, ...]:
    """dx, B and A of the rows; with a gate also dbranch and dgate."""
    through_z, *sums = adaln_modulate.backward_torch(grad_z_LD, y_LD, scale_RD, weight_D, kept_SL, rows)
    h = rows.real(grad_y_LD) + through_z
    dx_LD = torch.cat((h.to(y_LD.dtype), grad_y_LD[rows.num_real :]))
    if gate_RD is None:
        return dx_LD, *sums
    return dx_LD, *sums, *gated_add.backward_torch(h, branch_LD, gate_RD, rows)


@triton.jit
def forward_kernel(
    x_LD, branch_LD, gate_RD, shift_RD, scale_RD, weight_D, bias_D, start_Q, row_Q, y_LD, z_LD, kept_SL,
    x_stride, branch_stride, gate_stride, shift_stride, scale_stride, R, REAL, D, eps,
    LAYER: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0)
    row, start, end = tl.load(row_Q + run), tl.load(start_Q + run), tl.load(start_Q + run + 1)
    factors, offsets = factor_and_offset(
        shift_RD, scale_RD, weight_D, bias_D, row, shift_stride, scale_stride, R, D, C, BLOCK
    )
    gates = load_row_vector(gate_RD, row, gate_stride, R, D, C, BLOCK)
    for first in tl.range(start, end, T, num_stages=STAGES):
        token = first + tl.arange(0, T)[:, None]
        at, inside, real = token.to(tl.int64), token < end, (token < end) & (row < R)
        xs = load_chunks(x_LD + at * x_stride, inside, D, C, BLOCK)
        if gate_RD is None:
            updates = load_chunks(branch_LD + at * branch_stride, inside, D, C, BLOCK)
        else:
            updates = times(load_chunks(branch_LD + at * branch_stride, real, D, C, BLOCK), gates)
        ys = ()
        for c in tl.static_range(C):
            y = (xs[c] + updates[c]).to(y_LD.dtype.element_ty)
            store_chunk(y_LD + at * D, c, y, inside, D)
            ys += (y.to(tl.float32),)
        ns, mean, inverse = norm_tokens(ys, D, eps, LAYER)
        for c in tl.static_range(C):
            store_chunk(z_LD + at * D, c, tl.where(real, ns[c] * factors[c] + offsets[c], 0.0), inside, D)
        store_kept(kept_SL, token, mean, inverse, real, REAL, LAYER)


@triton.jit
def backward_kernel(
    grad_y_LD, grad_z_LD, y_LD, branch_LD, gate_RD, scale_RD, weight_D, kept_SL, start_Q, row_Q,
    dx_LD, dbranch_LD, grad_runs_QD, along_runs_QD, gate_runs_QD,
    grad_y_stride, grad_z_stride, y_stride, branch_stride, gate_stride, scale_stride, R, REAL, D,
    LAYER: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0)
    row, start, end = tl.load(row_Q + run), tl.load(start_Q + run), tl.load(start_Q + run + 1)
    factors, _ = factor_and_offset(None, scale_RD, weight_D, None, row, 0, scale_stride, R, D, C, BLOCK)
    gates = load_row_vector(gate_RD, row, gate_stride, R, D, C, BLOCK)
    grads, alongs, dgates = zero_chunks(T, C, BLOCK), zero_chunks(T, C, BLOCK), zero_chunks(T, C, BLOCK)
    for first in tl.range(start, end, T, num_stages=STAGES):
        token = first + tl.arange(0, T)[:, None]
        at, inside, real = token.to(tl.int64), token < end, (token < end) & (row < R)
        ys = load_chunks(y_LD + at * y_stride, real, D, C, BLOCK)
        dzs = load_chunks(grad_z_LD + at * grad_z_stride, real, D, C, BLOCK)
        dys = load_chunks(grad_y_LD + at * grad_y_stride, inside, D, C, BLOCK)
        ns, inverse = norm_again(ys, kept_SL, token, real, REAL, D, LAYER)
        dxs = plus(dys, norm_gradient(dzs, factors, ns, inverse, D, LAYER))
        for c in tl.static_range(C):
            store_chunk(dx_LD + at * D, c, dxs[c], inside, D)
        grads, alongs = plus(grads, dzs), plus(alongs, times(dzs, ns))
        if gate_RD is not None:
            branches = load_chunks(branch_LD + at * branch_stride, real, D, C, BLOCK)
            for c in tl.static_range(C):
                store_chunk(dbranch_LD + at * D, c, dxs[c] * gates[c], inside, D)
            dgates = plus(dgates, times(dxs, branches))
    store_sums(grad_runs_QD, run, grads, D)
    store_sums(along_runs_QD, run, alongs, D)
    if gate_RD is not None:
        store_sums(gate_runs_QD, run, dgates, D)


@torch.library.custom_op("megasora::gated_residual_adaln", mutates_args=())
def forward_triton(
    x_LD: Tensor,
    branch_LD: Tensor,
    gate_RD: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x_LD, branch_LD = dense(x_LD), dense(branch_LD)
    vectors = gate_RD, shift_RD, scale_RD = tuple(map(dense, (gate_RD, shift_RD, scale_RD)))
    z_LD, kept_SL = empty_forward(x_LD, num_real, norm)
    y_LD, width = x_LD.new_empty(x_LD.shape), x_LD.shape[1]
    launch_runs(
        forward_kernel, FORWARD, row_Q, width,
        *tokens, *vectors, dense(weight_D), dense(bias_D), start_Q, row_Q, y_LD, z_LD, kept_SL,
        *map(row_stride, tokens + vectors), num_rows, num_real, width, eps, norm == "layer",
    )  # fmt: skip
    return y_LD, z_LD, kept_SL


@forward_triton.register_fake
def _(x_LD, branch_LD, gate_RD, shift_RD, scale_RD, weight_D, bias_D, start_Q, row_Q, num_rows, num_real, eps, norm):
    return x_LD.new_empty(x_LD.shape), *empty_forward(x_LD, num_real, norm)


@torch.library.custom_op("megasora::gated_residual_adaln_backward", mutates_args=())
def backward_triton(
    grad_y_LD: Tensor,
    grad_z_LD: Tensor,
    y_LD: Tensor,
    branch_LD: Tensor | None,
    gate_RD: Tensor | None,
    scale_RD: Tensor | None,
    weight_D: Tensor | None,
    kept_SL: Tensor,
    start_Q: Tensor,
    row_Q: Tensor,
    first_run_R: Tensor,
) -> list[Tensor]:
    strided = tuple(map(dense, (grad_y_LD, grad_z_LD, y_LD, branch_LD, gate_RD, scale_RD)))
    num_rows, width, gated = len(first_run_R) - 1, y_LD.shape[1], gate_RD is not None
    dx_LD = y_LD.new_empty(y_LD.shape)
    dbranch_LD = branch_LD.new_empty(branch_LD.shape) if gated else None
    runs = [y_LD.new_empty(len(row_Q), width, dtype=torch.float32) for _ in range(3 if gated else 2)]
    launch_runs(
        backward_kernel, BACKWARD, row_Q, width,
        *strided, dense(weight_D), kept_SL, start_Q, row_Q, dx_LD, dbranch_LD, *runs, *[None] * (3 - len(runs)),
        *map(row_stride, strided), num_rows, kept_SL.shape[1], width, len(kept_SL) == 2,
    )  # fmt: skip
    grad_RD, along_RD, *dgate_RD = (sum_of_runs(runs_QD, first_run_R) for runs_QD in runs)
    return [dx_LD, grad_RD, along_RD, dbranch_LD, *dgate_RD] if gated else [dx_LD, grad_RD, along_RD]


@backward_triton.register_fake
def _(grad_y_LD, grad_z_LD, y_LD, branch_LD, gate_RD, scale_RD, weight_D, kept_SL, start_Q, row_Q, first_run_R):
    def empty_vectors() -> Tensor:
        return y_LD.new_empty(len(first_run_R) - 1, y_LD.shape[1], dtype=torch.float32)

    of_norm = [y_LD.new_empty(y_LD.shape), empty_vectors(), empty_vectors()]
    return of_norm if gate_RD is None else [*of_norm, branch_LD.new_empty(branch_LD.shape), empty_vectors()]


class GatedResidualAdaln(Function):
    @staticmethod
    def forward(
        ctx, x_LD, branch_LD, gate_RD, shift_RD, scale_RD, weight_D, bias_D, rows: Rows, eps: float, norm: str, via: str
    ) -> tuple[Tensor, Tensor]:
        given = x_LD, branch_LD, gate_RD, shift_RD, scale_RD, weight_D, bias_D
        if via == "triton":
            of_rows = rows.start_Q, rows.row_Q, rows.num_rows, rows.num_real
            y_LD, z_LD, kept_SL = forward_triton(*given, *of_rows, eps, norm)
        else:
            y_LD, z_LD, kept_SL = forward_torch(*given, rows, eps, norm)
        kept_branch_LD = None if gate_RD is None else branch_LD
        ctx.save_for_backward(y_LD, kept_branch_LD, gate_RD, shift_RD, scale_RD, weight_D, bias_D, kept_SL)
        ctx.rows, ctx.via = rows, via
        return y_LD, z_LD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y_LD: Tensor, grad_z_LD: Tensor) -> tuple[Tensor | None, ...]:
        y_LD, branch_LD, gate_RD, shift_RD, scale_RD, weight_D, bias_D, kept_SL = ctx.saved_tensors
        rows = ctx.rows
        given = grad_y_LD, grad_z_LD, y_LD, branch_LD, gate_RD, scale_RD, weight_D, kept_SL
        if ctx.via == "triton":
            dx_LD, *sums = backward_triton(*given, rows.start_Q, rows.row_Q, rows.first_run_R)
        else:
            dx_LD, *sums = backward_torch(*given, rows)
        of_norm = vector_gradients(*sums[:2], shift_RD, scale_RD, weight_D, bias_D)
        dbranch_LD, dgate_RD = (dx_LD, None) if gate_RD is None else (sums[2], sums[3].to(gate_RD.dtype))
        return dx_LD, dbranch_LD, dgate_RD, *of_norm, None, None, None, None


def gated_residual_adaln(
    x_LD: Tensor,
    branch_LD: Tensor,
    gate_RD: Tensor | None,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    rows: Rows,
    eps: float,
    weight_D: Tensor | None = None,
    bias_D: Tensor | None = None,
    norm: str = "layer",
    via: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y = x + gate branch, and z = norm(y) (1 + scale) + shift, both [L, D] in the dtype of `x_LD`.

    `gate_RD` may be None, for 1. Tokens past the last row: y is x, z is 0. Everything else: as of `adaln_modulate`.
    Differentiable once, in all tensors. ValueError on shapes that do not fit.
    """
    check_branch(x_LD, branch_LD)
    check_norm(x_LD, shift_RD, scale_RD, rows, weight_D, bias_D, norm)
    rows.check(x_LD, gate=gate_RD)
    check_device(x=x_LD, branch=branch_LD, gate=gate_RD)
    given = x_LD, branch_LD, gate_RD, shift_RD, scale_RD, weight_D, bias_D
    return GatedResidualAdaln.apply(*given, rows, eps, norm, chosen(via, x_LD))

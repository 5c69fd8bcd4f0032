"""adaLN: norm and modulation of tokens by the shift and scale of their row, alone (`adaln_modulate`) or right after a
branch is added to the residual stream (`gated_residual_adaln`). x, branch [L, D] and row vectors [R, D] in, y and z
[L, D] out (DiT, arXiv 2212.09748).

    y[i] = x[i] + gate[r] branch[i]         r the row of token i; without gate: y = x + branch; without branch: y = x
    n[i] = (y[i] - mean y[i]) / sqrt(var y[i] + eps)        norm="rms": n[i] = y[i] / sqrt(mean y[i]^2 + eps)
    z[i] = (n[i] weight + bias) (1 + scale[r]) + shift[r]   weight, bias, and the pair of shift and scale are optional

    a = dz[i] (1 + scale[r]) weight
    dx[i] = dy[i] + (a - mean a - n mean(a n)) / sqrt(var + eps)        norm="rms": without mean a
    dbranch[i] = dx[i] gate[r],  dgate[r] = sum dx[i] branch[i]
    sum_dz[r] = sum dz[i],  sum_dz_n[r] = sum dz[i] n[i]                sums over the tokens i of row r
    dshift = sum_dz,  dscale = weight sum_dz_n + bias sum_dz
    dweight = sum_r (1 + scale) sum_dz_n,  dbias = sum_r (1 + scale) sum_dz

The backward pass saves y, the branch if it has a gate, and of each token its mean and 1 / sqrt(var + eps); n and the
row vectors expanded to tokens would be as large as x each. Computed in fp32 at least and rounded once; z is computed
from y as rounded, so the fused operation equals gated_add and then adaln_modulate. At padding y = x (or x + branch) and
z = 0; gradients of z there are ignored.

Least traffic in bf16, bytes per element: adaln_modulate 4 forward (x, z), 6 backward (x, dz, dx). gated_residual_adaln
8 forward (x, branch, y, z), 12 backward (dy, dz, y, branch, dx, dbranch); without a gate dbranch is dx, and backward 8.
The order of the sums by row is fixed: see rows.py. Letters: `Q` row tiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.kernels import gated_add
from megasora.kernels.gated_add import check_branch, gated_add_reference
from megasora.kernels.launch import (
    LaunchConfig,
    LaunchTable,
    check_device,
    jit_for_packs,
    resolve_backend,
    row_stride,
    unit_stride,
)
from megasora.kernels.row_tiles import launch_row_tiles, load_row_vector, sum_of_tiles, tile_range
from megasora.kernels.rows import Rows
from megasora.kernels.vector_chunks import (
    add,
    full_chunks,
    load_chunks,
    load_vector,
    mul,
    scale,
    store_chunk,
    store_sums,
    sum_width,
    upcast,
)

FORWARD: LaunchTable = {"any": LaunchConfig()}
BACKWARD: LaunchTable = {"any": LaunchConfig()}
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
    """Reference implementation, differentiable; arguments as of `adaln_modulate`."""
    x = rows.unpad(x_LD)
    if norm == "layer":
        z = F.layer_norm(x, x.shape[-1:], eps=eps)
    else:
        z = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    z = z if weight_D is None else z * weight_D.to(x.dtype)
    z = z if bias_D is None else z + bias_D.to(x.dtype)
    if scale_RD is not None:
        z = z * (1 + rows.expand(scale_RD).to(z.dtype)) + rows.expand(shift_RD).to(z.dtype)
    return rows.pad(z, x_LD.dtype)


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
    """Reference implementation, differentiable; arguments as of `gated_residual_adaln`."""
    if gate_RD is None:
        y_LD = (x_LD + branch_LD).to(x_LD.dtype)
    else:
        y_LD = gated_add_reference(x_LD, branch_LD, gate_RD, rows)
    return y_LD, adaln_modulate_reference(y_LD, shift_RD, scale_RD, rows, eps, weight_D, bias_D, norm)


# ---- PyTorch. `stats`: what the backward pass needs of the norm, [2, num_real] mean and 1 / sqrt(var + eps) of each
# token, or [1, num_real] the latter for norm="rms".


def norm_forward(y: Tensor, eps: float, norm: str) -> tuple[Tensor, Tensor]:
    """n of y [l, D], and stats."""
    if norm == "layer":
        n, mean_L1, inverse_L1 = torch.native_layer_norm(y, y.shape[-1:], None, None, eps)
        return n, torch.cat((mean_L1, inverse_L1), -1).T
    inverse_L1 = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y * inverse_L1, inverse_L1.T


def normalize(y: Tensor, stats: Tensor) -> Tensor:
    """n of y [l, D] from stats."""
    return y * stats[0, :, None] if len(stats) == 1 else (y - stats[0, :, None]) * stats[1, :, None]


def norm_backward(a: Tensor, n: Tensor, stats: Tensor) -> Tensor:
    """The gradient in y from a, the gradient in n; [l, D] each."""
    dy = torch.addcmul(a, n, (a * n).mean(-1, keepdim=True), value=-1)
    if len(stats) == 2:
        dy = dy - a.mean(-1, keepdim=True)
    return dy * stats[-1, :, None]


def forward_torch(
    x_LD: Tensor,
    branch_LD: Tensor | None,
    gate_RD: Tensor | None,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    rows: Rows,
    eps: float,
    norm: str,
) -> list[Tensor]:
    """z, stats, and y if there is a branch."""
    if branch_LD is None:
        y_LD = x_LD
    elif gate_RD is None:
        y_LD = (x_LD + branch_LD).to(x_LD.dtype)
    else:
        y_LD = gated_add.forward_torch(x_LD, branch_LD, gate_RD, rows)
    y = rows.unpad(y_LD)
    z, stats = norm_forward(y, eps, norm)
    z = z if weight_D is None else z * weight_D.to(y.dtype)
    z = z if bias_D is None else z + bias_D.to(y.dtype)
    if scale_RD is not None:
        z = torch.addcmul(rows.expand(shift_RD.to(y.dtype)), z, rows.expand(1 + scale_RD.to(y.dtype)))
    outputs = [rows.pad(z, x_LD.dtype), stats]
    return outputs if branch_LD is None else [*outputs, y_LD]


def backward_torch(
    grad_z_LD: Tensor,
    grad_y_LD: Tensor | None,
    y_LD: Tensor,
    branch_LD: Tensor | None,
    gate_RD: Tensor | None,
    scale_RD: Tensor | None,
    weight_D: Tensor | None,
    stats: Tensor,
    rows: Rows,
) -> list[Tensor]:
    """dx, sum_dz, sum_dz_n; with a gate also dbranch and dgate."""
    dz = rows.unpad(grad_z_LD)
    n = normalize(rows.unpad(y_LD), stats)
    a = dz if scale_RD is None else dz * rows.expand(1 + scale_RD.to(dz.dtype))
    a = a if weight_D is None else a * weight_D.to(dz.dtype)
    dx = norm_backward(a, n, stats)
    sums = rows.sum(dz), rows.sum(dz * n)
    if grad_y_LD is None:
        return [rows.pad(dx, y_LD.dtype), *sums]
    dx = rows.unpad(grad_y_LD) + dx
    dx_LD = torch.cat((dx.to(y_LD.dtype), grad_y_LD[rows.num_real :]))
    if gate_RD is None:
        return [dx_LD, *sums]
    return [dx_LD, *sums, *gated_add.backward_torch(dx, branch_LD, gate_RD, rows)]


# ---- Triton


@triton.jit
def subtract_mean(ys, mean, D):
    """y - mean, and 0 beyond the width."""
    differences = ()
    for c in tl.static_range(len(ys)):
        d = c * ys[c].shape[1] + tl.arange(0, ys[c].shape[1])[None]
        differences += (tl.where(d < D, ys[c] - mean, 0.0),)
    return differences


@triton.jit
def norm_tokens(ys, D, eps, LAYER: tl.constexpr):
    """n of tokens, and their stats: mean (of "layer") and 1 / sqrt(...), [T, 1]."""
    mean = sum_width(ys) / D
    if LAYER:
        ys = subtract_mean(ys, mean, D)
    inverse = tl.rsqrt(sum_width(mul(ys, ys)) / D + eps)
    return scale(ys, inverse), mean, inverse


@triton.jit
def store_stats(stats, token, mean, inverse, real, REAL, LAYER: tl.constexpr):
    if LAYER:
        tl.store(stats + token, mean, mask=real)
        stats += REAL
    tl.store(stats + token, inverse, mask=real)


@triton.jit
def renormalize(ys, stats, token, real, REAL, D, LAYER: tl.constexpr):
    """n of tokens and 1 / sqrt(...), from their stats."""
    if LAYER:
        ys = subtract_mean(ys, tl.load(stats + token, mask=real, other=0.0), D)
        stats += REAL
    inverse = tl.load(stats + token, mask=real, other=0.0)
    return scale(ys, inverse), inverse


@triton.jit
def norm_gradient(dzs, factors, ns, inverse, D, LAYER: tl.constexpr):
    """The gradient in y, with a = dz factor."""
    a = mul(dzs, factors)
    mean_a_n = sum_width(mul(a, ns)) / D
    dys = ()
    if LAYER:
        mean_a = sum_width(a) / D
        for c in tl.static_range(len(ns)):
            dys += ((a[c] - mean_a - ns[c] * mean_a_n) * inverse,)
    else:
        for c in tl.static_range(len(ns)):
            dys += ((a[c] - ns[c] * mean_a_n) * inverse,)
    return dys


@triton.jit
def factor_and_offset(
    shift_RD, scale_RD, weight_D, bias_D, row, shift_stride, scale_stride, R, D, C: tl.constexpr, BLOCK: tl.constexpr
):
    """z = n factor + offset, chunks [1, BLOCK]."""
    weights, biases = load_vector(weight_D, D, 1.0, C, BLOCK), load_vector(bias_D, D, 0.0, C, BLOCK)
    scales = load_row_vector(scale_RD, row, scale_stride, R, D, C, BLOCK)
    shifts = load_row_vector(shift_RD, row, shift_stride, R, D, C, BLOCK)
    factors, offsets = (), ()
    for c in tl.static_range(C):
        factors += ((1 + scales[c]) * weights[c],)
        offsets += ((1 + scales[c]) * biases[c] + shifts[c],)
    return factors, offsets


@jit_for_packs
def forward_kernel(
    x_LD, branch_LD, gate_RD, shift_RD, scale_RD, weight_D, bias_D, tile_start_Q, tile_row_Q, y_LD, z_LD, stats,
    x_stride, branch_stride, gate_stride, shift_stride, scale_stride, R, REAL, D, eps,
    LAYER: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, start, end = tile_range(tile_row_Q, tile_start_Q)
    factors, offsets = factor_and_offset(
        shift_RD, scale_RD, weight_D, bias_D, row, shift_stride, scale_stride, R, D, C, BLOCK
    )
    gates = load_row_vector(gate_RD, row, gate_stride, R, D, C, BLOCK)
    for first in tl.range(start, end, T, num_stages=STAGES):
        token = first + tl.arange(0, T)[:, None]
        at, inside, real = token.to(tl.int64), token < end, (token < end) & (row < R)
        if branch_LD is None:
            ys = upcast(load_chunks(x_LD + at * x_stride, real, D, C, BLOCK))
        else:
            xs = upcast(load_chunks(x_LD + at * x_stride, inside, D, C, BLOCK))
            if gate_RD is None:
                updates = upcast(load_chunks(branch_LD + at * branch_stride, inside, D, C, BLOCK))
            else:
                updates = mul(upcast(load_chunks(branch_LD + at * branch_stride, real, D, C, BLOCK)), gates)
            ys = ()
            for c in tl.static_range(C):
                y = (xs[c] + updates[c]).to(y_LD.dtype.element_ty)
                store_chunk(y_LD + at * D, c, y, inside, D)
                ys += (y.to(tl.float32),)
        ns, mean, inverse = norm_tokens(ys, D, eps, LAYER)
        for c in tl.static_range(C):
            store_chunk(z_LD + at * D, c, tl.where(real, ns[c] * factors[c] + offsets[c], 0.0), inside, D)
        store_stats(stats, token, mean, inverse, real, REAL, LAYER)


@jit_for_packs
def backward_kernel(
    grad_z_LD, grad_y_LD, y_LD, branch_LD, gate_RD, scale_RD, weight_D, stats, tile_start_Q, tile_row_Q,
    dx_LD, dbranch_LD, tile_dz_QD, tile_dz_n_QD, tile_dgate_QD,
    grad_z_stride, grad_y_stride, y_stride, branch_stride, gate_stride, scale_stride, R, REAL, D,
    LAYER: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, start, end = tile_range(tile_row_Q, tile_start_Q)
    factors, _ = factor_and_offset(None, scale_RD, weight_D, None, row, 0, scale_stride, R, D, C, BLOCK)
    gates = load_row_vector(gate_RD, row, gate_stride, R, D, C, BLOCK)
    sum_dz, sum_dz_n = full_chunks(0.0, T, C, BLOCK), full_chunks(0.0, T, C, BLOCK)
    dgates = full_chunks(0.0, T, C, BLOCK)
    for first in tl.range(start, end, T, num_stages=STAGES):
        token = first + tl.arange(0, T)[:, None]
        at, inside, real = token.to(tl.int64), token < end, (token < end) & (row < R)
        ys = upcast(load_chunks(y_LD + at * y_stride, real, D, C, BLOCK))
        dzs = upcast(load_chunks(grad_z_LD + at * grad_z_stride, real, D, C, BLOCK))
        if grad_y_LD is None:
            ns, inverse = renormalize(ys, stats, token, real, REAL, D, LAYER)
            dxs = norm_gradient(dzs, factors, ns, inverse, D, LAYER)
        else:
            dys = upcast(load_chunks(grad_y_LD + at * grad_y_stride, inside, D, C, BLOCK))
            ns, inverse = renormalize(ys, stats, token, real, REAL, D, LAYER)
            dxs = add(dys, norm_gradient(dzs, factors, ns, inverse, D, LAYER))
        for c in tl.static_range(C):
            store_chunk(dx_LD + at * D, c, dxs[c], inside, D)
        sum_dz, sum_dz_n = add(sum_dz, dzs), add(sum_dz_n, mul(dzs, ns))
        if gate_RD is not None:
            branches = upcast(load_chunks(branch_LD + at * branch_stride, real, D, C, BLOCK))
            for c in tl.static_range(C):
                store_chunk(dbranch_LD + at * D, c, dxs[c] * gates[c], inside, D)
            dgates = add(dgates, mul(dxs, branches))
    tile = tl.program_id(0)
    store_sums(tile_dz_QD, tile, sum_dz, D)
    store_sums(tile_dz_n_QD, tile, sum_dz_n, D)
    if gate_RD is not None:
        store_sums(tile_dgate_QD, tile, dgates, D)


@torch.library.custom_op("megasora::adaln", mutates_args=())
def forward_triton(
    x_LD: Tensor,
    branch_LD: Tensor | None,
    gate_RD: Tensor | None,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    tile_start_Q: Tensor,
    tile_row_Q: Tensor,
    num_rows: int,
    num_real: int,
    eps: float,
    norm: str,
) -> list[Tensor]:
    """z, stats, and y if there is a branch."""
    strided = tuple(map(unit_stride, (x_LD, branch_LD, gate_RD, shift_RD, scale_RD)))
    z_LD, stats, *y_LD = outputs = empty_forward(x_LD, branch_LD, num_real, norm)
    width = x_LD.shape[1]
    launch_row_tiles(
        forward_kernel, FORWARD, tile_row_Q, width,
        *strided, unit_stride(weight_D), unit_stride(bias_D), tile_start_Q, tile_row_Q,
        y_LD[0] if y_LD else None, z_LD, stats,
        *map(row_stride, strided), num_rows, num_real, width, eps, norm == "layer",
    )  # fmt: skip
    return outputs


@forward_triton.register_fake
def _(
    x_LD, branch_LD, gate_RD, shift_RD, scale_RD, weight_D, bias_D, tile_start_Q, tile_row_Q, num_rows, num_real, eps,
    norm,
):  # fmt: skip
    return empty_forward(x_LD, branch_LD, num_real, norm)


def empty_forward(x_LD: Tensor, branch_LD: Tensor | None, num_real: int, norm: str) -> list[Tensor]:
    stats = x_LD.new_empty(2 if norm == "layer" else 1, num_real, dtype=torch.float32)
    outputs = [x_LD.new_empty(x_LD.shape), stats]
    return outputs if branch_LD is None else [*outputs, x_LD.new_empty(x_LD.shape)]


@torch.library.custom_op("megasora::adaln_backward", mutates_args=())
def backward_triton(
    grad_z_LD: Tensor,
    grad_y_LD: Tensor | None,
    y_LD: Tensor,
    branch_LD: Tensor | None,
    gate_RD: Tensor | None,
    scale_RD: Tensor | None,
    weight_D: Tensor | None,
    stats: Tensor,
    tile_start_Q: Tensor,
    tile_row_Q: Tensor,
    first_tile_R: Tensor,
) -> list[Tensor]:
    """dx, sum_dz, sum_dz_n; with a gate also dbranch and dgate."""
    strided = tuple(map(unit_stride, (grad_z_LD, grad_y_LD, y_LD, branch_LD, gate_RD, scale_RD)))
    num_rows, width, gated = len(first_tile_R) - 1, y_LD.shape[1], gate_RD is not None
    dx_LD = y_LD.new_empty(y_LD.shape)
    dbranch_LD = branch_LD.new_empty(branch_LD.shape) if gated else None
    tile_sums = [y_LD.new_empty(len(tile_row_Q), width, dtype=torch.float32) for _ in range(3 if gated else 2)]
    launch_row_tiles(
        backward_kernel, BACKWARD, tile_row_Q, width,
        *strided, unit_stride(weight_D), stats, tile_start_Q, tile_row_Q,
        dx_LD, dbranch_LD, *tile_sums, *[None] * (3 - len(tile_sums)),
        *map(row_stride, strided), num_rows, stats.shape[1], width, len(stats) == 2,
    )  # fmt: skip
    sum_dz_RD, sum_dz_n_RD, *dgate_RD = (sum_of_tiles(x_QD, first_tile_R) for x_QD in tile_sums)
    return [dx_LD, sum_dz_RD, sum_dz_n_RD, *([dbranch_LD, *dgate_RD] if gated else [])]


@backward_triton.register_fake
def _(
    grad_z_LD, grad_y_LD, y_LD, branch_LD, gate_RD, scale_RD, weight_D, stats, tile_start_Q, tile_row_Q, first_tile_R
):
    def empty_sums() -> Tensor:
        return y_LD.new_empty(len(first_tile_R) - 1, y_LD.shape[1], dtype=torch.float32)

    gradients = [y_LD.new_empty(y_LD.shape), empty_sums(), empty_sums()]
    return gradients if gate_RD is None else [*gradients, branch_LD.new_empty(branch_LD.shape), empty_sums()]


# ---- the operations


def vector_gradients(
    sum_dz_RD: Tensor,
    sum_dz_n_RD: Tensor,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """dshift, dscale, dweight, dbias; None for each vector that is None."""
    dshift = dscale = dweight = dbias = None
    if scale_RD is not None:
        dscale = sum_dz_n_RD if weight_D is None else sum_dz_n_RD * weight_D
        dscale = dscale if bias_D is None else dscale + sum_dz_RD * bias_D
        dshift, dscale = sum_dz_RD.to(shift_RD.dtype), dscale.to(scale_RD.dtype)
        factor_RD = 1 + scale_RD.to(sum_dz_RD.dtype)
        sum_dz_RD, sum_dz_n_RD = sum_dz_RD * factor_RD, sum_dz_n_RD * factor_RD
    if weight_D is not None:
        dweight = sum_dz_n_RD.sum(0).to(weight_D.dtype)
    if bias_D is not None:
        dbias = sum_dz_RD.sum(0).to(bias_D.dtype)
    return dshift, dscale, dweight, dbias


class Adaln(Function):
    """Returns z, or (y, z) if there is a branch."""

    @staticmethod
    def forward(
        ctx,
        x_LD: Tensor,
        branch_LD: Tensor | None,
        gate_RD: Tensor | None,
        shift_RD: Tensor | None,
        scale_RD: Tensor | None,
        weight_D: Tensor | None,
        bias_D: Tensor | None,
        rows: Rows,
        eps: float,
        norm: str,
        backend: str,
    ) -> Tensor | tuple[Tensor, Tensor]:
        tensors = x_LD, branch_LD, gate_RD, shift_RD, scale_RD, weight_D, bias_D
        if backend == "triton":
            index = rows.tile_start_Q, rows.tile_row_Q, rows.num_rows, rows.num_real
            z_LD, stats, *y_LD = forward_triton(*tensors, *index, eps, norm)
        else:
            z_LD, stats, *y_LD = forward_torch(*tensors, rows, eps, norm)
        saved_branch_LD = None if gate_RD is None else branch_LD
        vectors = gate_RD, shift_RD, scale_RD, weight_D, bias_D
        ctx.save_for_backward(*y_LD or (x_LD,), saved_branch_LD, *vectors, stats)
        ctx.has_branch, ctx.rows, ctx.backend = branch_LD is not None, rows, backend
        return (y_LD[0].detach(), z_LD.detach()) if y_LD else z_LD.detach()  # see launch.py

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y_LD, grad_z_LD = grads if ctx.has_branch else (None, *grads)
        y_LD, branch_LD, gate_RD, shift_RD, scale_RD, weight_D, bias_D, stats = ctx.saved_tensors
        rows = ctx.rows
        tensors = grad_z_LD, grad_y_LD, y_LD, branch_LD, gate_RD, scale_RD, weight_D, stats
        if ctx.backend == "triton":
            dx_LD, *sums = backward_triton(*tensors, rows.tile_start_Q, rows.tile_row_Q, rows.first_tile_R)
        else:
            dx_LD, *sums = backward_torch(*tensors, rows)
        dbranch_LD = dgate_RD = None
        if gate_RD is not None:
            dbranch_LD, dgate_RD = sums[2], sums[3].to(gate_RD.dtype)
        elif ctx.has_branch:
            dbranch_LD = dx_LD
        dvectors = vector_gradients(*sums[:2], shift_RD, scale_RD, weight_D, bias_D)
        return dx_LD, dbranch_LD, dgate_RD, *dvectors, None, None, None, None


def adaln_modulate(
    x_LD: Tensor,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    rows: Rows,
    eps: float,
    weight_D: Tensor | None = None,
    bias_D: Tensor | None = None,
    norm: str = "layer",
    backend: str = "auto",
) -> Tensor:
    """norm(x) (1 + scale) + shift: [L, D] in the dtype of `x_LD`; 0 at tokens after the last row.

    `shift_RD` and `scale_RD`: both or neither. `norm`: "layer" or "rms", with an optional weight and bias of its own.
    `backend`: see launch.py. Differentiable once, in all tensors. ValueError for shapes that do not match.
    """
    check_norm(x_LD, shift_RD, scale_RD, rows, weight_D, bias_D, norm)
    vectors = shift_RD, scale_RD, weight_D, bias_D
    return Adaln.apply(x_LD, None, None, *vectors, rows, eps, norm, resolve_backend(backend, x_LD))


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y = x + gate branch and z = norm(y) (1 + scale) + shift, both [L, D] in the dtype of `x_LD`.

    `gate_RD` None means 1. At tokens after the last row y is x and z is 0. All else as of `adaln_modulate`.
    """
    check_branch(x_LD, branch_LD)
    check_norm(x_LD, shift_RD, scale_RD, rows, weight_D, bias_D, norm)
    rows.check_shapes(x_LD, gate=gate_RD)
    check_device(x=x_LD, branch=branch_LD, gate=gate_RD)
    vectors = gate_RD, shift_RD, scale_RD, weight_D, bias_D
    return Adaln.apply(x_LD, branch_LD, *vectors, rows, eps, norm, resolve_backend(backend, x_LD))


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
    rows.check_shapes(x_LD, shift=shift_RD, scale=scale_RD)
    for name, vector in (("weight", weight_D), ("bias", bias_D)):
        if vector is not None and vector.shape != x_LD.shape[1:]:
            raise ValueError(f"{name} {tuple(vector.shape)} must be [D], as x is {tuple(x_LD.shape)}")
    check_device(x=x_LD, shift=shift_RD, scale=scale_RD, rows=rows.row_L, weight=weight_D, bias=bias_D)

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
The order of the sums by row is fixed: see rows.py. The Triton kernels are in adaln_triton.py. Letters: `S` sums by row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.kernels import gated_add
from megasora.kernels.adaln_triton import backward_triton, forward_triton
from megasora.kernels.gated_add import check_branch, gated_add_reference
from megasora.kernels.launch import call, check_device, resolve_backend
from megasora.kernels.rows import Rows

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
    """dx, the sums sum_dz, sum_dz_n and, with a gate, dgate, [S, R, D], and dbranch if there is a gate."""
    dz = rows.unpad(grad_z_LD)
    n = normalize(rows.unpad(y_LD), stats)
    a = dz if scale_RD is None else dz * rows.expand(1 + scale_RD.to(dz.dtype))
    a = a if weight_D is None else a * weight_D.to(dz.dtype)
    dx = norm_backward(a, n, stats)
    sums = [rows.sum(dz), rows.sum(dz * n)]
    if grad_y_LD is None:
        return [rows.pad(dx, y_LD.dtype), torch.stack(sums)]
    dx = rows.unpad(grad_y_LD) + dx
    dx_LD = torch.cat((dx.to(y_LD.dtype), grad_y_LD[rows.num_real :]))
    if gate_RD is None:
        return [dx_LD, torch.stack(sums)]
    dbranch_LD, dgate_RD = gated_add.backward_torch(dx, branch_LD, gate_RD, rows)
    return [dx_LD, torch.stack([*sums, dgate_RD]), dbranch_LD]


# ---- the operations


def vector_gradients(
    sums_SRD: Tensor,
    gate_RD: Tensor | None,
    shift_RD: Tensor | None,
    scale_RD: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """dgate, dshift, dscale, dweight, dbias; None for each vector that is None."""
    dshift = dscale = dweight = dbias = None
    dtypes = {x.dtype for x in (gate_RD, shift_RD, scale_RD) if x is not None}
    if weight_D is None and bias_D is None and len(dtypes) == 1:
        sums_SRD = sums_SRD.to(*dtypes)  # all at once
    sum_dz_RD, sum_dz_n_RD, *dgate = sums_SRD.unbind()
    if scale_RD is not None:
        dscale = sum_dz_n_RD if weight_D is None else sum_dz_n_RD * weight_D
        dscale = dscale if bias_D is None else dscale + sum_dz_RD * bias_D
        dshift, dscale = sum_dz_RD.to(shift_RD.dtype), dscale.to(scale_RD.dtype)
        if weight_D is not None or bias_D is not None:
            factor_RD = 1 + scale_RD.to(sums_SRD.dtype)
            sum_dz_RD, sum_dz_n_RD = sum_dz_RD * factor_RD, sum_dz_n_RD * factor_RD
    if weight_D is not None:
        dweight = sum_dz_n_RD.sum(0).to(weight_D.dtype)
    if bias_D is not None:
        dbias = sum_dz_RD.sum(0).to(bias_D.dtype)
    return None if gate_RD is None else dgate[0].to(gate_RD.dtype), dshift, dscale, dweight, dbias


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
            index = rows.tile_start_Q, rows.tile_row_Q, rows.first_tile_P, rows.num_rows, rows.num_real
            z_LD, stats, *y_LD = call(forward_triton, *tensors, *index, eps, norm)
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
            index = rows.tile_start_Q, rows.tile_row_Q, rows.first_tile_R, rows.first_tile_P
            dx_LD, sums_SRD, *dbranch = call(backward_triton, *tensors, *index)
        else:
            dx_LD, sums_SRD, *dbranch = backward_torch(*tensors, rows)
        dbranch_LD = None
        if gate_RD is not None:
            dbranch_LD = dbranch[0]
        elif ctx.has_branch:
            dbranch_LD = dx_LD
        dvectors = vector_gradients(sums_SRD, gate_RD, shift_RD, scale_RD, weight_D, bias_D)
        return dx_LD, dbranch_LD, *dvectors, None, None, None, None


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

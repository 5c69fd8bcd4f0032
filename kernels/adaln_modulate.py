"""adaLN-Zero around a branch of a block: what it reads, and how it comes back (DiT, arXiv 2212.09748).

    adaln_modulate   y[i] = n[i] (1 + scale[r]) + shift[r]      n[i] = (x[i] - mean x[i]) / sqrt(var x[i] + eps)
    gated_add        y[i] = x[i] + gate[r] branch[i]            r = row[i], the row of token i

    adaln_modulate   dn[i] = dy[i] (1 + scale[r])               dx[i] = (dn - mean dn - n mean(dn n)) / sqrt(var + eps)
                     dshift[r] = sum dy[i],  dscale[r] = sum dy[i] n[i]      over the tokens i of row r
    gated_add        dbranch[i] = dy[i] gate[r],  dgate[r] = sum dy[i] branch[i],  dx = dy

Tokens `[L, D]` and vectors of their rows `[R, D]` in. For the backward pass a token keeps x, its mean and deviation, or
its branch: n and the rows' vectors, spread over the tokens, would be as large as x each, and cost little to make again.
Everything is computed in fp32 at least and rounded once. The tokens of a row lie side by side; sums over them are taken
in one order on every device, unlike those of atomic additions at an index.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

RUN = 128  # tokens that are summed one after the other


def adaln_modulate_reference(x_LD: Tensor, shift_RD: Tensor, scale_RD: Tensor, row_L: Tensor, eps: float) -> Tensor:
    """The maths; arguments as of `adaln_modulate`."""
    x, shift, scale = widened(x_LD, shift_RD[row_L], scale_RD[row_L])
    return (F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x_LD.dtype)


def gated_add_reference(x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, row_L: Tensor) -> Tensor:
    """The maths; arguments as of `gated_add`."""
    x, branch, gate = widened(x_LD, branch_LD, gate_RD[row_L])
    return (x + gate * branch).to(x_LD.dtype)


def widened(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def sum_by_row(x_LD: Tensor, row_L: Tensor, num_rows: int) -> Tensor:
    """[R, D]: short runs of a row's tokens, then the runs of each row. `row_L` rises."""
    device = x_LD.device
    start_R = torch.searchsorted(row_L, torch.arange(num_rows, device=device))
    start_Q = torch.cat((start_R, torch.arange(0, len(x_LD), RUN, device=device))).sort().values
    length_Q = start_Q.diff(append=start_Q.new_tensor([len(x_LD)]))
    runs_R = torch.bincount(torch.searchsorted(start_R, start_Q, right=True) - 1, minlength=num_rows)
    sum_QD = torch.segment_reduce(x_LD.contiguous(), "sum", lengths=length_Q, initial=0.0, unsafe=True)
    return torch.segment_reduce(sum_QD, "sum", lengths=runs_R, initial=0.0, unsafe=True)


class AdalnModulate(Function):
    @staticmethod
    def forward(ctx, x_LD: Tensor, shift_RD: Tensor, scale_RD: Tensor, row_L: Tensor, eps: float) -> Tensor:
        x, shift, scale = widened(x_LD, shift_RD, scale_RD)
        normed, mean_L1, inverse_L1 = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x_LD, scale_RD, row_L, mean_L1, inverse_L1)
        return torch.addcmul(shift[row_L], normed, (1 + scale)[row_L]).to(x_LD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LD: Tensor) -> tuple[Tensor | None, ...]:
        x_LD, scale_RD, row_L, mean_L1, inverse_L1 = ctx.saved_tensors
        x, scale, grad = widened(x_LD, scale_RD, grad_LD)
        normed = (x - mean_L1) * inverse_L1
        grad_shift = sum_by_row(grad, row_L, len(scale))
        grad_scale = sum_by_row(grad * normed, row_L, len(scale))
        grad_normed = grad * (1 + scale)[row_L]
        along_normed = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = (grad_normed - grad_normed.mean(-1, keepdim=True) - normed * along_normed) * inverse_L1
        return grad_x.to(x_LD.dtype), grad_shift.to(scale_RD.dtype), grad_scale.to(scale_RD.dtype), None, None


class GatedAdd(Function):
    @staticmethod
    def forward(ctx, x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, row_L: Tensor) -> Tensor:
        ctx.save_for_backward(branch_LD, gate_RD, row_L)
        x, branch, gate = widened(x_LD, branch_LD, gate_RD)
        return torch.addcmul(x, gate[row_L], branch).to(x_LD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LD: Tensor) -> tuple[Tensor | None, ...]:
        branch_LD, gate_RD, row_L = ctx.saved_tensors
        branch, gate, grad = widened(branch_LD, gate_RD, grad_LD)
        grad_gate = sum_by_row(grad * branch, row_L, len(gate))
        return grad_LD, (grad * gate[row_L]).to(branch_LD.dtype), grad_gate.to(gate_RD.dtype), None


def adaln_modulate(x_LD: Tensor, shift_RD: Tensor, scale_RD: Tensor, row_L: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, [L, D] in the dtype of `x_LD`. `row_L`: int64, the row of each token,
    rising; rows may have none.

    Differentiable once, in x, shift and scale. ValueError on shapes that do not fit; on a CPU, where rows do not rise.
    """
    check_inputs(x_LD, row_L, shift=shift_RD, scale=scale_RD)
    return AdalnModulate.apply(x_LD, shift_RD, scale_RD, row_L, eps)


def gated_add(x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, row_L: Tensor) -> Tensor:
    """x + gate branch, [L, D] in the dtype of `x_LD`. `row_L`, errors: as of `adaln_modulate`.

    Differentiable once, in x, branch and gate.
    """
    check_inputs(x_LD, row_L, gate=gate_RD)
    if branch_LD.shape != x_LD.shape:
        raise ValueError(f"branch is {tuple(branch_LD.shape)}, x {tuple(x_LD.shape)}")
    return GatedAdd.apply(x_LD, branch_LD, gate_RD, row_L)


def check_inputs(x_LD: Tensor, row_L: Tensor, **vectors: Tensor) -> None:
    if x_LD.ndim != 2 or row_L.shape != x_LD.shape[:1]:
        raise ValueError(f"x {tuple(x_LD.shape)} must be [L, D], its rows {tuple(row_L.shape)} [L]")
    shapes = {name: tuple(vector.shape) for name, vector in vectors.items()}
    if len(set(shapes.values())) > 1 or any(v.ndim != 2 or v.shape[1] != x_LD.shape[1] for v in vectors.values()):
        raise ValueError(f"{shapes} must be [R, {x_LD.shape[1]}], as x is {tuple(x_LD.shape)}")
    if row_L.device.type == "cpu" and bool((row_L.diff() < 0).any()):  # elsewhere a look would wait for the device
        raise ValueError(f"tokens of a row must lie side by side, rows rising: {row_L.tolist()[:16]}")

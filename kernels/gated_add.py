"""A branch comes back to the residual stream through the gate of its row: x, branch [L, D] and gate [R, D] in,
[L, D] out (DiT, arXiv 2212.09748).

    y[i] = x[i] + gate[r] branch[i]         r the row of token i
    dx = dy,  dbranch[i] = dy[i] gate[r],  dgate[r] = sum dy[i] branch[i] over the tokens i of row r

For the backward pass the branch is kept; the gate, spread over the tokens, would be as large. Computed in fp32 at least
and rounded once. Padding comes out as x and gives the branch no gradient.

Least traffic in bf16: 6 bytes a number forward (x, branch, y), 6 backward (dy, branch, dbranch).
"""

from __future__ import annotations

import torch
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
    plus,
    store_chunk,
    store_sums,
    sum_of_runs,
    times,
    zero_chunks,
)

FORWARD: Table = {"any": Launch()}
BACKWARD: Table = {"any": Launch()}


def gated_add_reference(x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, rows: Rows) -> Tensor:
    """The maths, differentiable; arguments as of `gated_add`."""
    branch = rows.real(branch_LD)
    update = rows.padded(rows.spread(gate_RD.to(branch.dtype)) * branch, branch.dtype)
    return (x_LD + update).to(x_LD.dtype)


def forward_torch(x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, rows: Rows) -> Tensor:
    x, branch = rows.real(x_LD), rows.real(branch_LD)
    y = torch.addcmul(x, rows.spread(gate_RD.to(x.dtype)), branch).to(x_LD.dtype)
    return y if rows.num_real == len(x_LD) else torch.cat((y, x_LD[rows.num_real :]))


def backward_torch(grad_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """dbranch, dgate"""
    dy, branch = rows.real(grad_LD), rows.real(branch_LD)
    dbranch = dy * rows.spread(gate_RD.to(dy.dtype))
    return rows.padded(dbranch, branch_LD.dtype), rows.sum(dy * branch)


@triton.jit
def forward_kernel(
    x_LD, branch_LD, gate_RD, start_Q, row_Q, y_LD, x_stride, branch_stride, gate_stride, R, D,
    T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0)
    row, start, end = tl.load(row_Q + run), tl.load(start_Q + run), tl.load(start_Q + run + 1)
    gates = load_row_vector(gate_RD, row, gate_stride, R, D, C, BLOCK)
    for first in tl.range(start, end, T, num_stages=STAGES):
        token = first + tl.arange(0, T)[:, None]
        at, inside = token.to(tl.int64), token < end
        xs = load_chunks(x_LD + at * x_stride, inside, D, C, BLOCK)
        branches = load_chunks(branch_LD + at * branch_stride, inside & (row < R), D, C, BLOCK)
        for c in tl.static_range(C):
            store_chunk(y_LD + at * D, c, xs[c] + gates[c] * branches[c], inside, D)


@triton.jit
def backward_kernel(
    grad_LD, branch_LD, gate_RD, start_Q, row_Q, dbranch_LD, gate_runs_QD,
    grad_stride, branch_stride, gate_stride, R, D,
    T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0)
    row, start, end = tl.load(row_Q + run), tl.load(start_Q + run), tl.load(start_Q + run + 1)
    gates = load_row_vector(gate_RD, row, gate_stride, R, D, C, BLOCK)
    dgates = zero_chunks(T, C, BLOCK)
    for first in tl.range(start, end, T, num_stages=STAGES):
        token = first + tl.arange(0, T)[:, None]
        at, inside, real = token.to(tl.int64), token < end, (token < end) & (row < R)
        dys = load_chunks(grad_LD + at * grad_stride, real, D, C, BLOCK)
        branches = load_chunks(branch_LD + at * branch_stride, real, D, C, BLOCK)
        for c in tl.static_range(C):
            store_chunk(dbranch_LD + at * D, c, dys[c] * gates[c], inside, D)
        dgates = plus(dgates, times(dys, branches))
    store_sums(gate_runs_QD, run, dgates, D)


@torch.library.custom_op("megasora::gated_add", mutates_args=())
def forward_triton(x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, start_Q: Tensor, row_Q: Tensor) -> Tensor:
    x_LD, branch_LD, gate_RD = map(dense, (x_LD, branch_LD, gate_RD))
    y_LD, width = x_LD.new_empty(x_LD.shape), x_LD.shape[1]
    launch_runs(
        forward_kernel, FORWARD, row_Q, width,
        x_LD, branch_LD, gate_RD, start_Q, row_Q, y_LD,
        x_LD.stride(0), branch_LD.stride(0), row_stride(gate_RD), len(gate_RD), width,
    )  # fmt: skip
    return y_LD


@forward_triton.register_fake
def _(x_LD, branch_LD, gate_RD, start_Q, row_Q):
    return x_LD.new_empty(x_LD.shape)


@torch.library.custom_op("megasora::gated_add_backward", mutates_args=())
def backward_triton(
    grad_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, start_Q: Tensor, row_Q: Tensor, first_run_R: Tensor
) -> tuple[Tensor, Tensor]:
    grad_LD, branch_LD, gate_RD = map(dense, (grad_LD, branch_LD, gate_RD))
    dbranch_LD, width = branch_LD.new_empty(branch_LD.shape), branch_LD.shape[1]
    gate_runs_QD = grad_LD.new_empty(len(row_Q), width, dtype=torch.float32)
    launch_runs(
        backward_kernel, BACKWARD, row_Q, width,
        grad_LD, branch_LD, gate_RD, start_Q, row_Q, dbranch_LD, gate_runs_QD,
        grad_LD.stride(0), branch_LD.stride(0), row_stride(gate_RD), len(gate_RD), width,
    )  # fmt: skip
    return dbranch_LD, sum_of_runs(gate_runs_QD, first_run_R)


@backward_triton.register_fake
def _(grad_LD, branch_LD, gate_RD, start_Q, row_Q, first_run_R):
    return branch_LD.new_empty(branch_LD.shape), gate_RD.new_empty(gate_RD.shape, dtype=torch.float32)


class GatedAdd(Function):
    @staticmethod
    def forward(ctx, x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, rows: Rows, via: str) -> Tensor:
        ctx.save_for_backward(branch_LD, gate_RD)
        ctx.rows, ctx.via = rows, via
        if via == "triton":
            return forward_triton(x_LD, branch_LD, gate_RD, rows.start_Q, rows.row_Q)
        return forward_torch(x_LD, branch_LD, gate_RD, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LD: Tensor) -> tuple[Tensor | None, ...]:
        branch_LD, gate_RD = ctx.saved_tensors
        rows = ctx.rows
        if ctx.via == "triton":
            of_rows = rows.start_Q, rows.row_Q, rows.first_run_R
            dbranch_LD, dgate_RD = backward_triton(grad_LD, branch_LD, gate_RD, *of_rows)
        else:
            dbranch_LD, dgate_RD = backward_torch(grad_LD, branch_LD, gate_RD, rows)
        return grad_LD, dbranch_LD, dgate_RD.to(gate_RD.dtype), None, None


def gated_add(x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, rows: Rows, via: str = "auto") -> Tensor:
    """x + gate branch, [L, D] in the dtype of `x_LD`; x at tokens past the last row. `via`: see launch.py.

    Differentiable once, in x, branch and gate. ValueError on shapes that do not fit.
    """
    check_branch(x_LD, branch_LD)
    rows.check(x_LD, gate=gate_RD)
    check_device(x=x_LD, branch=branch_LD, gate=gate_RD, rows=rows.row_L)
    return GatedAdd.apply(x_LD, branch_LD, gate_RD, rows, chosen(via, x_LD))


def check_branch(x_LD: Tensor, branch_LD: Tensor) -> None:
    if branch_LD.shape != x_LD.shape:
        raise ValueError(f"branch {tuple(branch_LD.shape)} must have the shape of x {tuple(x_LD.shape)}")

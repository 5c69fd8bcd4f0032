"""Gated residual: adds a branch to the residual stream, times the gate of its row. x, branch [L, D] and gate [R, D] in,
y [L, D] out (DiT, arXiv 2212.09748).

    y[i] = x[i] + gate[r] branch[i]         r the row of token i
    dx = dy,  dbranch[i] = dy[i] gate[r],  dgate[r] = sum dy[i] branch[i] over the tokens i of row r

The backward pass saves the branch; the gate expanded to tokens would be as large. Computed in fp32 at least and rounded
once. At padding y = x, and the branch gets no gradient.

Least traffic in bf16, bytes per element: 6 forward (x, branch, y), 6 backward (dy, branch, dbranch).

Letters: `Q` row tiles (rows.py).
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.kernels.launch import (
    LaunchConfig,
    LaunchTable,
    call,
    check_device,
    jit_for_packs,
    resolve_backend,
    row_stride,
    unit_stride,
)
from megasora.kernels.row_tiles import (
    launch_row_tiles,
    load_vector,
    program_tiles,
    sum_of_tiles,
    tile_range,
    vector_chunk,
)
from megasora.kernels.rows import Rows
from megasora.kernels.vector_chunks import full_chunks, load_chunks, store_chunk, store_sums

FORWARD: LaunchTable = {"any": LaunchConfig(tile_elements=3072)}
BACKWARD: LaunchTable = {"any": LaunchConfig(tile_elements=3072)}


def gated_add_reference(x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, rows: Rows) -> Tensor:
    """Reference implementation, differentiable; arguments as of `gated_add`."""
    branch = rows.unpad(branch_LD)
    update = rows.pad(rows.expand(gate_RD.to(branch.dtype)) * branch, branch.dtype)
    return (x_LD + update).to(x_LD.dtype)


def forward_torch(x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, rows: Rows) -> Tensor:
    x, branch = rows.unpad(x_LD), rows.unpad(branch_LD)
    y = torch.addcmul(x, rows.expand(gate_RD.to(x.dtype)), branch).to(x_LD.dtype)
    return y if rows.num_real == len(x_LD) else torch.cat((y, x_LD[rows.num_real :]))


def backward_torch(grad_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """dbranch, dgate"""
    dy, branch = rows.unpad(grad_LD), rows.unpad(branch_LD)
    dbranch = dy * rows.expand(gate_RD.to(dy.dtype))
    return rows.pad(dbranch, branch_LD.dtype), rows.sum(dy * branch)


@jit_for_packs
def forward_kernel(
    x_LD, branch_LD, gate_RD, tile_start_Q, tile_row_Q, first_tile_P, y_LD, x_stride, branch_stride, gate_stride, R,
    D: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first_tile, end_tile = program_tiles(first_tile_P)
    for tile in range(first_tile, end_tile):
        row, start, end = tile_range(tile, tile_row_Q, tile_start_Q)
        gate = gate_RD + row.to(tl.int64) * gate_stride
        gates = load_vector(gate, row < R, T, D, C, BLOCK, STAGES > 1)
        for first in tl.range(start, end, T, num_stages=STAGES):
            token = first + tl.arange(0, T)[:, None]
            at, inside = token.to(tl.int64), token < end
            xs = load_chunks(x_LD + at * x_stride, inside, D, C, BLOCK)
            branches = load_chunks(branch_LD + at * branch_stride, inside & (row < R), D, C, BLOCK)
            for c in tl.static_range(C):
                update = vector_chunk(gates, gate, c, row < R, T, D, BLOCK) * branches[c].to(tl.float32)
                store_chunk(y_LD + at * D, c, xs[c].to(tl.float32) + update, inside, D)


@jit_for_packs
def backward_kernel(
    grad_LD, branch_LD, gate_RD, tile_start_Q, tile_row_Q, first_tile_P, dbranch_LD, tile_dgate_SQD,
    grad_stride, branch_stride, gate_stride, R,
    D: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first_tile, end_tile = program_tiles(first_tile_P)
    for tile in range(first_tile, end_tile):
        row, start, end = tile_range(tile, tile_row_Q, tile_start_Q)
        gate = gate_RD + row.to(tl.int64) * gate_stride
        gates = load_vector(gate, row < R, T, D, C, BLOCK, STAGES > 1)
        dgates = full_chunks(0.0, T, C, BLOCK)
        for first in tl.range(start, end, T, num_stages=STAGES):
            token = first + tl.arange(0, T)[:, None]
            at, inside, real = token.to(tl.int64), token < end, (token < end) & (row < R)
            dys = load_chunks(grad_LD + at * grad_stride, real, D, C, BLOCK)
            branches = load_chunks(branch_LD + at * branch_stride, real, D, C, BLOCK)
            new_dgates = ()
            for c in tl.static_range(C):
                dy = dys[c].to(tl.float32)
                dbranch = dy * vector_chunk(gates, gate, c, row < R, T, D, BLOCK)
                store_chunk(dbranch_LD + at * D, c, dbranch, inside, D)
                new_dgates += (dgates[c] + dy * branches[c].to(tl.float32),)
            dgates = new_dgates
        store_sums(tile_dgate_SQD, tl.zeros([], tl.int64) + tile, dgates, D)


@torch.library.custom_op("megasora::gated_add", mutates_args=())
def forward_triton(
    x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, tile_start_Q: Tensor, tile_row_Q: Tensor, first_tile_P: Tensor
) -> Tensor:
    x_LD, branch_LD, gate_RD = map(unit_stride, (x_LD, branch_LD, gate_RD))
    y_LD = x_LD.new_empty(x_LD.shape)
    launch_row_tiles(
        forward_kernel, FORWARD, first_tile_P, x_LD, 0,
        x_LD, branch_LD, gate_RD, tile_start_Q, tile_row_Q, first_tile_P, y_LD,
        x_LD.stride(0), branch_LD.stride(0), row_stride(gate_RD), len(gate_RD),
    )  # fmt: skip
    return y_LD


@forward_triton.register_fake
def _(x_LD, branch_LD, gate_RD, tile_start_Q, tile_row_Q, first_tile_P):
    return x_LD.new_empty(x_LD.shape)


@torch.library.custom_op("megasora::gated_add_backward", mutates_args=())
def backward_triton(
    grad_LD: Tensor,
    branch_LD: Tensor,
    gate_RD: Tensor,
    tile_start_Q: Tensor,
    tile_row_Q: Tensor,
    first_tile_R: Tensor,
    first_tile_P: Tensor,
) -> tuple[Tensor, Tensor]:
    """dbranch, and dgate in fp32"""
    grad_LD, branch_LD, gate_RD = map(unit_stride, (grad_LD, branch_LD, gate_RD))
    dbranch_LD = branch_LD.new_empty(branch_LD.shape)
    tile_dgate_SQD = grad_LD.new_empty(1, len(tile_row_Q), grad_LD.shape[1], dtype=torch.float32)
    launch_row_tiles(
        backward_kernel, BACKWARD, first_tile_P, grad_LD, 1,
        grad_LD, branch_LD, gate_RD, tile_start_Q, tile_row_Q, first_tile_P, dbranch_LD, tile_dgate_SQD,
        grad_LD.stride(0), branch_LD.stride(0), row_stride(gate_RD), len(gate_RD),
    )  # fmt: skip
    return dbranch_LD, sum_of_tiles(tile_dgate_SQD, tile_row_Q, first_tile_R)[0]


@backward_triton.register_fake
def _(grad_LD, branch_LD, gate_RD, tile_start_Q, tile_row_Q, first_tile_R, first_tile_P):
    return branch_LD.new_empty(branch_LD.shape), gate_RD.new_empty(gate_RD.shape, dtype=torch.float32)


class GatedAdd(Function):
    @staticmethod
    def forward(ctx, x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, rows: Rows, backend: str) -> Tensor:
        ctx.save_for_backward(branch_LD, gate_RD)
        ctx.rows, ctx.backend = rows, backend
        if backend == "triton":
            y_LD = call(forward_triton, x_LD, branch_LD, gate_RD, rows.tile_start_Q, rows.tile_row_Q, rows.first_tile_P)
        else:
            y_LD = forward_torch(x_LD, branch_LD, gate_RD, rows)
        return y_LD.detach()  # see launch.py

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LD: Tensor) -> tuple[Tensor | None, ...]:
        branch_LD, gate_RD = ctx.saved_tensors
        rows = ctx.rows
        if ctx.backend == "triton":
            index = rows.tile_start_Q, rows.tile_row_Q, rows.first_tile_R, rows.first_tile_P
            dbranch_LD, dgate_RD = call(backward_triton, grad_LD, branch_LD, gate_RD, *index)
        else:
            dbranch_LD, dgate_RD = backward_torch(grad_LD, branch_LD, gate_RD, rows)
        return grad_LD, dbranch_LD, dgate_RD.to(gate_RD.dtype), None, None


def gated_add(x_LD: Tensor, branch_LD: Tensor, gate_RD: Tensor, rows: Rows, backend: str = "auto") -> Tensor:
    """x + gate branch: [L, D] in the dtype of `x_LD`; x at tokens after the last row. `backend`: see launch.py.

    Differentiable once, in x, branch and gate. ValueError for shapes that do not match.
    """
    check_branch(x_LD, branch_LD)
    rows.check_shapes(x_LD, gate=gate_RD)
    check_device(x=x_LD, branch=branch_LD, gate=gate_RD, rows=rows.row_L)
    return GatedAdd.apply(x_LD, branch_LD, gate_RD, rows, resolve_backend(backend, x_LD))


def check_branch(x_LD: Tensor, branch_LD: Tensor) -> None:
    if branch_LD.shape != x_LD.shape:
        raise ValueError(f"branch {tuple(branch_LD.shape)} must have the shape of x {tuple(x_LD.shape)}")

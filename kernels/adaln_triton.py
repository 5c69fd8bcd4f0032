"""Triton side of adaln.py: its two kernels and their operators. Names and maths: see there.

A token is read once and held in registers in its own dtype, while the sums over its width are added up and then used.

Letters: `S` the sums sum_dz, sum_dz_n and, with a gate, dgate; others: see row_tiles.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megasora.kernels.launch import LaunchConfig, LaunchTable, jit_for_packs, row_stride, unit_stride
from megasora.kernels.row_tiles import (
    launch_row_tiles,
    load_vector,
    program_tiles,
    sum_of_tiles,
    tile_range,
    vector_chunk,
)
from megasora.kernels.vector_chunks import (
    full_chunks,
    in_width,
    load_chunk,
    load_chunks,
    load_vector_chunk,
    store_chunk,
    store_sums,
)

FORWARD: LaunchTable = {"any": LaunchConfig(tile_elements=3072)}
BACKWARD: LaunchTable = {"any": LaunchConfig(tile_elements=3072)}


@triton.jit
def factor_chunk(scale, weight, c: tl.constexpr, mask, T: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """(1 + scale) weight: z = n factor + offset."""
    factor = 1 + load_vector_chunk(scale, c, mask, T, D, BLOCK)
    if weight is not None:
        factor *= load_vector_chunk(weight, c, mask, T, D, BLOCK)
    return factor


@triton.jit
def offset_chunk(shift, scale, bias, c: tl.constexpr, mask, T: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """(1 + scale) bias + shift."""
    offset = load_vector_chunk(shift, c, mask, T, D, BLOCK)
    if bias is not None:
        offset += factor_chunk(scale, bias, c, mask, T, D, BLOCK)
    return offset


@triton.jit
def centered(ys, c: tl.constexpr, mean, D: tl.constexpr):
    """y - mean in fp32, and 0 beyond the width."""
    y = ys[c].to(tl.float32) - mean
    if (c + 1) * ys[c].shape[1] > D:
        y = tl.where(in_width(True, c, D, ys[c].shape[1]), y, 0.0)
    return y


@triton.jit
def norm_stats(ys, D: tl.constexpr, eps, LAYER: tl.constexpr):
    """Mean of tokens, 0 without LAYER, and 1 / sqrt(...); [T, 1]."""
    mean = tl.zeros([ys[0].shape[0], 1], tl.float32)
    if LAYER:
        total = ys[0].to(tl.float32)
        for c in tl.static_range(1, len(ys)):
            total += ys[c].to(tl.float32)
        mean = tl.sum(total, 1, keep_dims=True) / D
    first = centered(ys, 0, mean, D)
    squares = first * first
    for c in tl.static_range(1, len(ys)):
        y = centered(ys, c, mean, D)
        squares += y * y
    return mean, tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / D + eps)


@jit_for_packs
def forward_kernel(
    x_LD, branch_LD, gate_RD, shift_RD, scale_RD, weight_D, bias_D, tile_start_Q, tile_row_Q, first_tile_P,
    y_LD, z_LD, stats, x_stride, branch_stride, gate_stride, shift_stride, scale_stride, R, REAL, eps,
    LAYER: tl.constexpr, D: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    KEEP: tl.constexpr = STAGES > 1
    first_tile, end_tile = program_tiles(first_tile_P)
    for tile in range(first_tile, end_tile):
        row, start, end = tile_range(tile, tile_row_Q, tile_start_Q)
        is_real = row < R
        gate = None if gate_RD is None else gate_RD + row.to(tl.int64) * gate_stride
        shift = None if shift_RD is None else shift_RD + row.to(tl.int64) * shift_stride
        scale = None if scale_RD is None else scale_RD + row.to(tl.int64) * scale_stride
        gates, factors, offsets = load_vector(gate, is_real, T, D, C, BLOCK, KEEP), (), ()
        if KEEP:
            for c in tl.static_range(C):
                factors += (factor_chunk(scale, weight_D, c, is_real, T, D, BLOCK),)
                offsets += (offset_chunk(shift, scale, bias_D, c, is_real, T, D, BLOCK),)
        for first in tl.range(start, end, T, num_stages=STAGES):
            token = first + tl.arange(0, T)[:, None]
            at, inside, real = token.to(tl.int64), token < end, (token < end) & is_real
            if branch_LD is None:
                ys = load_chunks(x_LD + at * x_stride, real, D, C, BLOCK)
            else:
                xs = load_chunks(x_LD + at * x_stride, inside, D, C, BLOCK)
                branches = load_chunks(branch_LD + at * branch_stride, inside if gate_RD is None else real, D, C, BLOCK)
                ys = ()
                for c in tl.static_range(C):
                    update = branches[c].to(tl.float32)
                    if gate_RD is not None:
                        update *= vector_chunk(gates, gate, c, is_real, T, D, BLOCK)
                    y = (xs[c].to(tl.float32) + update).to(y_LD.dtype.element_ty)
                    store_chunk(y_LD + at * D, c, y, inside, D)
                    ys += (y,)
            mean, inverse = norm_stats(ys, D, eps, LAYER)
            for c in tl.static_range(C):
                n = (ys[c].to(tl.float32) - mean) * inverse
                if KEEP:
                    z = n * factors[c] + offsets[c]
                else:
                    z = n * factor_chunk(scale, weight_D, c, is_real, T, D, BLOCK)
                    z += offset_chunk(shift, scale, bias_D, c, is_real, T, D, BLOCK)
                store_chunk(z_LD + at * D, c, tl.where(real, z, 0.0), inside, D)
            if LAYER:
                tl.store(stats + token, mean, mask=real)
            tl.store(stats + (REAL if LAYER else 0) + token, inverse, mask=real)


@triton.jit
def width_means(dzs, ys, factors, scale, weight_D, mean, inverse, is_real, D: tl.constexpr, LAYER: tl.constexpr):
    """mean a, 0 without LAYER, and mean(a n), with a = dz factor; [T, 1]."""
    T: tl.constexpr = ys[0].shape[0]
    BLOCK: tl.constexpr = ys[0].shape[1]
    sum_a, sum_a_n = tl.zeros([T, BLOCK], tl.float32), tl.zeros([T, BLOCK], tl.float32)
    for c in tl.static_range(len(ys)):
        if len(factors) > 0:
            factor = factors[c]
        else:
            factor = factor_chunk(scale, weight_D, c, is_real, T, D, BLOCK)
        a = dzs[c].to(tl.float32) * factor
        sum_a += a
        sum_a_n += a * ((ys[c].to(tl.float32) - mean) * inverse)
    if LAYER:
        mean_a, mean_a_n = tl.split(tl.sum(tl.join(sum_a, sum_a_n), 1) / D)  # in one exchange between threads
        mean_a, mean_a_n = mean_a[:, None], mean_a_n[:, None]
    else:
        mean_a, mean_a_n = tl.zeros([T, 1], tl.float32), tl.sum(sum_a_n, 1, keep_dims=True) / D
    return mean_a, mean_a_n


@jit_for_packs
def backward_kernel(
    grad_z_LD, grad_y_LD, y_LD, branch_LD, gate_RD, scale_RD, weight_D, stats, tile_start_Q, tile_row_Q, first_tile_P,
    dx_LD, dbranch_LD, tile_sums_SQD,
    grad_z_stride, grad_y_stride, y_stride, branch_stride, gate_stride, scale_stride, R, REAL, COUNT,
    LAYER: tl.constexpr, D: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    KEEP: tl.constexpr = STAGES > 1
    first_tile, end_tile = program_tiles(first_tile_P)
    for tile in range(first_tile, end_tile):
        row, start, end = tile_range(tile, tile_row_Q, tile_start_Q)
        is_real = row < R
        gate = None if gate_RD is None else gate_RD + row.to(tl.int64) * gate_stride
        scale = None if scale_RD is None else scale_RD + row.to(tl.int64) * scale_stride
        gates, factors = load_vector(gate, is_real, T, D, C, BLOCK, KEEP), ()
        if KEEP:
            for c in tl.static_range(C):
                factors += (factor_chunk(scale, weight_D, c, is_real, T, D, BLOCK),)
        sum_dz, sum_dz_n = full_chunks(0.0, T, C, BLOCK), full_chunks(0.0, T, C, BLOCK)
        dgates = full_chunks(0.0, T, C, BLOCK)
        for first in tl.range(start, end, T, num_stages=STAGES):
            token = first + tl.arange(0, T)[:, None]
            at, inside, real = token.to(tl.int64), token < end, (token < end) & is_real
            ys = load_chunks(y_LD + at * y_stride, real, D, C, BLOCK)
            dzs = load_chunks(grad_z_LD + at * grad_z_stride, real, D, C, BLOCK)
            mean = tl.zeros([T, 1], tl.float32)
            stat, is_stat = first + tl.arange(0, T), (first + tl.arange(0, T) < end) & is_real
            if LAYER:
                mean = tl.load(stats + stat, mask=is_stat, other=0.0)[:, None]
            inverse = tl.load(stats + (REAL if LAYER else 0) + stat, mask=is_stat, other=0.0)[:, None]
            mean_a, mean_a_n = width_means(dzs, ys, factors, scale, weight_D, mean, inverse, is_real, D, LAYER)
            new_sum_dz, new_sum_dz_n, new_dgates = (), (), ()
            for c in tl.static_range(C):
                if KEEP:
                    factor = factors[c]
                else:
                    factor = factor_chunk(scale, weight_D, c, is_real, T, D, BLOCK)
                dz, n = dzs[c].to(tl.float32), (ys[c].to(tl.float32) - mean) * inverse
                dx = (dz * factor - mean_a - n * mean_a_n) * inverse
                if grad_y_LD is not None:
                    dx += load_chunk(grad_y_LD + at * grad_y_stride, c, inside, D, BLOCK).to(tl.float32)
                store_chunk(dx_LD + at * D, c, dx, inside, D)
                new_sum_dz += (sum_dz[c] + dz,)
                new_sum_dz_n += (sum_dz_n[c] + dz * n,)
                if gate_RD is not None:
                    branch = load_chunk(branch_LD + at * branch_stride, c, real, D, BLOCK).to(tl.float32)
                    new_dgates += (dgates[c] + dx * branch,)
                    dbranch = dx * vector_chunk(gates, gate, c, is_real, T, D, BLOCK)
                    store_chunk(dbranch_LD + at * D, c, dbranch, inside, D)
            sum_dz, sum_dz_n = new_sum_dz, new_sum_dz_n
            if gate_RD is not None:
                dgates = new_dgates
        index = tl.zeros([], tl.int64) + tile
        store_sums(tile_sums_SQD, index, sum_dz, D)
        store_sums(tile_sums_SQD, index + COUNT, sum_dz_n, D)
        if gate_RD is not None:
            store_sums(tile_sums_SQD, index + 2 * COUNT, dgates, D)


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
    first_tile_P: Tensor,
    num_rows: int,
    num_real: int,
    eps: float,
    norm: str,
) -> list[Tensor]:
    """z, stats, and y if there is a branch."""
    strided = tuple(map(unit_stride, (x_LD, branch_LD, gate_RD, shift_RD, scale_RD)))
    z_LD, stats, *y_LD = outputs = empty_forward(x_LD, branch_LD, num_real, norm)
    launch_row_tiles(
        forward_kernel, FORWARD, first_tile_P, x_LD, 0,
        *strided, unit_stride(weight_D), unit_stride(bias_D), tile_start_Q, tile_row_Q, first_tile_P,
        y_LD[0] if y_LD else None, z_LD, stats,
        *map(row_stride, strided), num_rows, num_real, eps, norm == "layer",
    )  # fmt: skip
    return outputs


@forward_triton.register_fake
def _(
    x_LD, branch_LD, gate_RD, shift_RD, scale_RD, weight_D, bias_D, tile_start_Q, tile_row_Q, first_tile_P, num_rows,
    num_real, eps, norm,
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
    first_tile_P: Tensor,
) -> list[Tensor]:
    """dx, sums [S, R, D], and dbranch if there is a gate."""
    strided = tuple(map(unit_stride, (grad_z_LD, grad_y_LD, y_LD, branch_LD, gate_RD, scale_RD)))
    dx_LD, *dbranch_LD = empty_backward(y_LD, branch_LD, gate_RD)
    num_tiles, num_sums = len(tile_row_Q), 2 if gate_RD is None else 3
    tile_sums_SQD = y_LD.new_empty(num_sums, num_tiles, y_LD.shape[1], dtype=torch.float32)
    launch_row_tiles(
        backward_kernel, BACKWARD, first_tile_P, y_LD, num_sums,
        *strided, unit_stride(weight_D), stats, tile_start_Q, tile_row_Q, first_tile_P,
        dx_LD, dbranch_LD[0] if dbranch_LD else None, tile_sums_SQD,
        *map(row_stride, strided), len(first_tile_R) - 1, stats.shape[1], num_tiles, len(stats) == 2,
    )  # fmt: skip
    return [dx_LD, sum_of_tiles(tile_sums_SQD, tile_row_Q, first_tile_R), *dbranch_LD]


@backward_triton.register_fake
def _(
    grad_z_LD, grad_y_LD, y_LD, branch_LD, gate_RD, scale_RD, weight_D, stats, tile_start_Q, tile_row_Q, first_tile_R,
    first_tile_P,
):  # fmt: skip
    dx_LD, *dbranch_LD = empty_backward(y_LD, branch_LD, gate_RD)
    shape = 2 if gate_RD is None else 3, len(first_tile_R) - 1, y_LD.shape[1]
    return [dx_LD, y_LD.new_empty(shape, dtype=torch.float32), *dbranch_LD]


def empty_backward(y_LD: Tensor, branch_LD: Tensor | None, gate_RD: Tensor | None) -> list[Tensor]:
    """dx, and dbranch if there is a gate."""
    dx_LD = y_LD.new_empty(y_LD.shape)
    return [dx_LD] if gate_RD is None else [dx_LD, branch_LD.new_empty(branch_LD.shape)]

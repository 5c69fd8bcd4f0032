"""Triton side of rows.py: launching one program per row tile, and what such programs share.

A program reads its row and its range of tokens with `tile_range`, and processes T tokens per loop iteration.

Letters: `Q` row tiles (rows.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megasora.kernels.launch import LaunchTable, jit_for_packs, launch_config
from megasora.kernels.vector_chunks import full_chunks, load_chunks, split_width, upcast

MAX_CHUNKS = 6  # of a width: their number determines the size of the compiled code
SUM_BLOCK = 256  # elements of a row that a program of sum_of_tiles_kernel adds up


def launch_row_tiles(
    kernel: triton.JITFunction, table: LaunchTable, tile_row_Q: Tensor, width: int, *arguments: object
) -> None:
    """One program per row tile; T, C, BLOCK and STAGES follow after the `arguments`."""
    config, chunks = launch_config(table, tile_row_Q.device), split_width(width, MAX_CHUNKS, prefer_few=True)
    if len(tile_row_Q):
        sizes = config.vectors_per_tile(*chunks), *chunks, config.num_stages
        kernel[(len(tile_row_Q),)](*arguments, *sizes, num_warps=config.num_warps(*chunks))


@triton.jit
def tile_range(tile_row_Q, tile_start_Q):
    """Row, first token and end of the tile of this program."""
    tile = tl.program_id(0)
    return tl.load(tile_row_Q + tile), tl.load(tile_start_Q + tile), tl.load(tile_start_Q + tile + 1)


@triton.jit
def load_row_vector(pointer, row, stride, R, D, C: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 chunks [1, BLOCK] of the vector of `row`; zeros for padding, which is row R, and if `pointer` is None."""
    if pointer is None:
        chunks = full_chunks(0.0, 1, C, BLOCK)
    else:
        chunks = upcast(load_chunks(pointer + row.to(tl.int64) * stride, row < R, D, C, BLOCK))
    return chunks


@jit_for_packs
def sum_of_tiles_kernel(tile_sums_QD, first_tile_R, sums_RD, D, BLOCK_D: tl.constexpr):
    row, d = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, end = tl.load(first_tile_R + row), tl.load(first_tile_R + row + 1)
    tile_sums_QD += first.to(tl.int64) * D + d
    sums = tl.zeros([BLOCK_D], tl.float32)
    for _ in range(first, end):
        sums += tl.load(tile_sums_QD, mask=d < D, other=0.0)
        tile_sums_QD += D
    tl.store(sums_RD + row.to(tl.int64) * D + d, sums, mask=d < D)


def sum_of_tiles(tile_sums_QD: Tensor, first_tile_R: Tensor) -> Tensor:
    """fp32 [Q, D] -> [R, D]: adds up the sums of the tiles of each row, in order."""
    num_rows, width = len(first_tile_R) - 1, tile_sums_QD.shape[1]
    sums_RD = tile_sums_QD.new_empty(num_rows, width)
    if sums_RD.numel():
        grid = num_rows, triton.cdiv(width, SUM_BLOCK)
        sum_of_tiles_kernel[grid](tile_sums_QD, first_tile_R, sums_RD, width, SUM_BLOCK)
    return sums_RD

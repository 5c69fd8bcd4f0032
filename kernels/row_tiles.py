"""Triton side of rows.py: launching the programs of a pack, what they share, and the sums over their row tiles.

A program processes the row tiles `program_tiles` one after the other: it reads the row and the tokens of each with
`tile_range`, and takes T tokens at once.

A program of few elements per thread (STAGES > 1) keeps the vectors of its row in registers, and loads the next tokens
while it computes. One of more has no registers left for this beside its sums: it reads the vectors from the cache for
every token, and the other programs of its multiprocessor keep loads in flight.

Letters: `Q` row tiles, `P` programs (rows.py); `S` sums of a kernel; `G` groups of row tiles and, in each, its rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from megasora.kernels.launch import LaunchConfig, LaunchTable, cdiv, jit_for_packs, launch_config
from megasora.kernels.vector_chunks import load_vector_chunk, split_width

MAX_CHUNKS = 6  # of a width: their number determines the size of the compiled code
VECTOR_BYTES = 16  # of one load or store instruction of a thread
# So many VECTOR_BYTES of a token a thread holds, of each tensor, at most, if a kernel with 0, 1, 2 or 3 sums by row has
# registers left to load ahead.
LOADS_AHEAD = 3, 3, 2, 3
# Likewise, of all its tokens, if it is compiled into 128 registers: 16 warps then fit a multiprocessor; else 255.
IN_128_REGISTERS = 6, 6, 6, 2
GROUP_TILES = 16  # consecutive row tiles that a program of sum_groups_kernel adds up
SUM_BLOCK = 128  # elements of a row that a program of these kernels adds up


class LaunchSizes(NamedTuple):
    """Constants of a kernel after its width, and options of its launch."""

    constants: tuple[int, int, int, int]  # T tokens at once, C chunks of BLOCK elements, STAGES
    num_warps: int
    maxnreg: int | None  # registers per thread, at most


@functools.cache
def launch_sizes(config: LaunchConfig, width: int, itemsize: int, num_sums: int) -> LaunchSizes:
    """So many warps that a thread has at most `elements_per_thread` elements, but at least VECTOR_BYTES of a chunk."""
    count, block = split_width(width, MAX_CHUNKS, prefer_few=True)
    if count * block > width:  # small blocks gain nothing then: they would be read by too few warps
        count, block = split_width(width, MAX_CHUNKS // 2)
    tokens = config.vectors_per_tile(count, block)
    chunk_vectors = tokens * block * itemsize // VECTOR_BYTES
    num_warps = max(1, min(config.num_warps(count, block), chunk_vectors // 32))
    vectors = count * chunk_vectors // (32 * num_warps)
    stages = config.num_stages if vectors <= LOADS_AHEAD[num_sums] else 1
    few = vectors <= max(LOADS_AHEAD) and tokens * vectors <= IN_128_REGISTERS[num_sums]
    return LaunchSizes((tokens, count, block, stages), num_warps, 128 if few else None)


def launch_row_tiles(
    kernel: triton.JITFunction,
    table: LaunchTable,
    first_tile_P: Tensor,
    x_LD: Tensor,
    num_sums: int,
    *arguments: object,
) -> None:
    """One program for each of `first_tile_P`; D, T, C, BLOCK and STAGES follow after the `arguments`.

    `num_sums`: by row, that the kernel accumulates in registers.
    """
    num_programs, width = len(first_tile_P) - 1, x_LD.shape[1]
    if num_programs and width:
        sizes = launch_sizes(launch_config(table, x_LD.device), width, x_LD.element_size(), num_sums)
        kernel[(num_programs,)](*arguments, width, *sizes.constants, num_warps=sizes.num_warps, maxnreg=sizes.maxnreg)


@triton.jit
def program_tiles(first_tile_P):
    """First row tile of this program, and of the next."""
    program = tl.program_id(0)
    return tl.load(first_tile_P + program), tl.load(first_tile_P + program + 1)


@triton.jit
def tile_range(tile, tile_row_Q, tile_start_Q):
    """Row, first token and end of a row tile."""
    return tl.load(tile_row_Q + tile), tl.load(tile_start_Q + tile), tl.load(tile_start_Q + tile + 1)


@triton.jit
def load_vector(
    pointer, mask, T: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr
):
    """All chunks of a vector, to be kept in registers if KEEP; else none."""
    chunks = ()
    if KEEP:
        for c in tl.static_range(C):
            chunks += (load_vector_chunk(pointer, c, mask, T, D, BLOCK),)
    return chunks


@triton.jit
def vector_chunk(kept, pointer, c: tl.constexpr, mask, T: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Chunk number `c` of a vector: the one that is kept in registers, or from memory."""
    if len(kept) > 0:
        chunk = kept[c]
    else:
        chunk = load_vector_chunk(pointer, c, mask, T, D, BLOCK)
    return chunk


@jit_for_packs
def sum_groups_kernel(
    tile_sums_SQD, tile_row_Q, group_sums_SGD, R, COUNT, GROUPS,
    D: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of TILES consecutive tiles, the sum for each row among them, as number group + row."""
    group, index = tl.program_id(0), tl.program_id(2).to(tl.int64)
    d, tile = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), group * TILES + tl.arange(0, TILES)
    row_of_tile = tl.load(tile_row_Q + tile, mask=tile < COUNT, other=R)
    mask = (row_of_tile < R)[:, None] & (d < D)[None]
    sums = tl.load(tile_sums_SQD + (index * COUNT + tile)[:, None] * D + d[None], mask=mask, other=0.0)
    first, last = tl.min(row_of_tile, 0), tl.max(tl.where(row_of_tile < R, row_of_tile, -1), 0)
    for row in range(first, last + 1):
        total = tl.sum(tl.where((row_of_tile == row)[:, None], sums, 0.0), 0)
        tl.store(group_sums_SGD + (index * GROUPS + group + row) * D + d, total, mask=d < D)


@jit_for_packs
def sum_rows_kernel(
    group_sums_SGD, first_tile_R, sums_SRD, R, GROUPS, D: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of each row, the sum of its groups."""
    row, index = tl.program_id(0), tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first_tile, end_tile = tl.load(first_tile_R + row), tl.load(first_tile_R + row + 1)
    first = first_tile // TILES
    end = tl.where(end_tile > first_tile, (end_tile + TILES - 1) // TILES, first)
    sums = tl.zeros([TILES, BLOCK], tl.float32)
    for start in range(first, end, TILES):
        group = start + tl.arange(0, TILES)
        at = (index * GROUPS + group + row)[:, None] * D + d[None]
        sums += tl.load(group_sums_SGD + at, mask=(group < end)[:, None] & (d < D)[None], other=0.0)
    tl.store(sums_SRD + (index * R + row) * D + d, tl.sum(sums, 0), mask=d < D)


def sum_of_tiles(tile_sums_SQD: Tensor, tile_row_Q: Tensor, first_tile_R: Tensor) -> Tensor:
    """fp32 [S, Q, D] -> [S, R, D]: the sums of the tiles of each row: groups of tiles first, in order."""
    (num_sums, num_tiles, width), num_rows = tile_sums_SQD.shape, len(first_tile_R) - 1
    if not num_tiles or not width:
        return tile_sums_SQD.new_zeros(num_sums, num_rows, width)
    sums_SRD = tile_sums_SQD.new_empty(num_sums, num_rows, width)
    num_groups, blocks = cdiv(num_tiles, GROUP_TILES), cdiv(width, SUM_BLOCK)
    group_sums_SGD = tile_sums_SQD.new_empty(num_sums, num_groups + num_rows, width)
    constants = width, GROUP_TILES, SUM_BLOCK
    sum_groups_kernel[num_groups, blocks, num_sums](
        tile_sums_SQD, tile_row_Q, group_sums_SGD, num_rows, num_tiles, num_groups + num_rows, *constants
    )
    sum_rows_kernel[num_rows, blocks, num_sums](
        group_sums_SGD, first_tile_R, sums_SRD, num_rows, num_groups + num_rows, *constants
    )
    return sums_SRD

"""Triton helpers for vectors that are wider than one block: tuples of chunks, each [T, BLOCK] of T vectors.

A width is split into C chunks of BLOCK elements, a power of two. Elements beyond the width are 0; a chunk without any
is loaded and stored without a mask for it, as D, the width, is a constant of the compiled kernel.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

MIN_BLOCK = 16


@functools.cache
def split_width(width: int, max_chunks: int, prefer_few: bool = False) -> tuple[int, int]:
    """(C, BLOCK): a width as at most `max_chunks` chunks of BLOCK elements, with the fewest elements beyond the width.

    5,120 is 5 x 1,024, where one block would be 8,192. Where several splits waste as little, this is the one with the
    smallest block, or with the largest if `prefer_few`.
    """
    block = max(MIN_BLOCK, triton.next_power_of_2(triton.cdiv(width, max_chunks)))
    count = triton.cdiv(width, block)
    while prefer_few and count % 2 == 0 and count > 0:
        count, block = count // 2, block * 2
    return count, block


@triton.jit
def in_width(mask, c: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """`mask` without the elements of chunk number `c` beyond the width; `mask` itself if there are none."""
    if (c + 1) * BLOCK > D:
        mask = (c * BLOCK + tl.arange(0, BLOCK)[None] < D) & mask
    return mask


@triton.jit
def load_chunk(x, c: tl.constexpr, mask, D: tl.constexpr, BLOCK: tl.constexpr):
    """Chunk number `c` in the dtype of `x`, 0 where `mask` is false; `x` [T, 1] points to the start of each vector."""
    return tl.load(x + (c * BLOCK + tl.arange(0, BLOCK)[None]), mask=in_width(mask, c, D, BLOCK), other=0.0)


@triton.jit
def load_chunks(x, mask, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """All chunks, as of `load_chunk`. All loads are issued at once."""
    chunks = ()
    for c in tl.static_range(C):
        chunks += (load_chunk(x, c, mask, D, BLOCK),)
    return chunks


@triton.jit
def load_vector_chunk(
    pointer, c: tl.constexpr, mask, T: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, default: tl.constexpr = 0.0
):
    """fp32 chunk of one vector, T times; `default` if `pointer` is None, 0 where `mask` is false.

    For a vector that many vectors are combined with: it stays in the cache.
    """
    if pointer is None:
        chunk = tl.full([T, BLOCK], default, tl.float32)
    else:
        at = tl.zeros([T, 1], tl.int32) + (c * BLOCK + tl.arange(0, BLOCK)[None])  # T times, for the layout of tokens
        chunk = tl.load(pointer + at, mask=in_width(mask, c, D, BLOCK), other=0.0, eviction_policy="evict_last")
    return chunk.to(tl.float32)


@triton.jit
def store_chunk(y, c: tl.constexpr, chunk, mask, D: tl.constexpr):
    """Chunk number `c`, in the dtype of `y` [T, 1], which points to the first element of each vector."""
    BLOCK: tl.constexpr = chunk.shape[1]
    tl.store(
        y + (c * BLOCK + tl.arange(0, BLOCK)[None]), chunk.to(y.dtype.element_ty), mask=in_width(mask, c, D, BLOCK)
    )


@triton.jit
def full_chunks(value: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    chunks = ()
    for _ in tl.static_range(C):
        chunks += (tl.full([T, BLOCK], value, tl.float32),)
    return chunks


@triton.jit
def store_sums(sums_QD, index, xs, D: tl.constexpr):
    """The sum over the T vectors, stored as vector number `index` of `sums_QD`."""
    for c in tl.static_range(len(xs)):
        store_chunk(sums_QD + index.to(tl.int64) * D, c, tl.sum(xs[c], 0, keep_dims=True), True, D)

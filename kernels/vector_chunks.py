"""Triton helpers for vectors that are wider than one block: tuples of chunks, each [T, BLOCK] of T vectors.

A width is split into C chunks of BLOCK elements, a power of two. T is 1 for a vector that is shared by tokens. Elements
beyond the width are 0. Helpers that compute take and return fp32 chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

MIN_BLOCK = 16


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
def load_chunks(x, mask, D, C: tl.constexpr, BLOCK: tl.constexpr):
    """Chunks in the dtype of `x`, 0 where `mask` is false; `x` [T, 1] points to the first element of each vector.

    All loads are issued at once.
    """
    chunks = ()
    for c in tl.static_range(C):
        d = c * BLOCK + tl.arange(0, BLOCK)[None]
        chunks += (tl.load(x + d, mask=mask & (d < D), other=0.0),)
    return chunks


@triton.jit
def upcast(xs):
    chunks = ()
    for c in tl.static_range(len(xs)):
        chunks += (xs[c].to(tl.float32),)
    return chunks


@triton.jit
def store_chunk(y, c: tl.constexpr, chunk, mask, D):
    """Chunk number `c`, in the dtype of `y` [T, 1], which points to the first element of each vector."""
    d = c * chunk.shape[1] + tl.arange(0, chunk.shape[1])[None]
    tl.store(y + d, chunk.to(y.dtype.element_ty), mask=mask & (d < D))


@triton.jit
def full_chunks(value: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    chunks = ()
    for _ in tl.static_range(C):
        chunks += (tl.full([T, BLOCK], value, tl.float32),)
    return chunks


@triton.jit
def load_vector(pointer, D, default: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 chunks [1, BLOCK] of a vector; filled with `default` if `pointer` is None."""
    if pointer is None:
        chunks = full_chunks(default, 1, C, BLOCK)
    else:
        chunks = upcast(load_chunks(pointer, True, D, C, BLOCK))
    return chunks


@triton.jit
def mul(xs, ys):
    """Elementwise product; chunks of `ys` may be [1, BLOCK]."""
    products = ()
    for c in tl.static_range(len(xs)):
        products += (xs[c] * ys[c],)
    return products


@triton.jit
def scale(xs, factor):
    """Each vector times its element of `factor` [T, 1]."""
    products = ()
    for c in tl.static_range(len(xs)):
        products += (xs[c] * factor,)
    return products


@triton.jit
def add(xs, ys):
    sums = ()
    for c in tl.static_range(len(xs)):
        sums += (xs[c] + ys[c],)
    return sums


@triton.jit
def sum_width(xs):
    """[T, 1]: the sum of the elements of each vector."""
    sums = xs[0]
    for c in tl.static_range(1, len(xs)):
        sums += xs[c]
    return tl.sum(sums, 1, keep_dims=True)


@triton.jit
def store_sums(sums_QD, index, xs, D):
    """The sum over the T vectors, stored as vector number `index` of `sums_QD`."""
    for c in tl.static_range(len(xs)):
        store_chunk(sums_QD + index.to(tl.int64) * D, c, tl.sum(xs[c], 0, keep_dims=True), True, D)

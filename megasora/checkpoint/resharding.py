"""Which elements of saved local tensors make a range of a local tensor of another placement.

A tensor sharded along dim d is seen as [A, N, B]: A and B are the dims before and after it. Its local tensor on rank r
of S is [A, N / S, B], in `num_chunks` chunks of N if several matrices are one parameter. Along the first dim (A = 1)
rows are contiguous in both, so ranges are read straight into place. Along another dim a row of the wanted tensor has
columns of several saved ones: the same rows of these are read, and their columns copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.placement import Placement


@dataclass(frozen=True)
class Layout:
    """How a parameter is sharded over `size` tensor ranks."""

    shape: torch.Size  # of the full tensor
    placement: Placement
    size: int

    @property
    def is_split(self) -> bool:
        return self.placement.shard_dim is not None and self.size > 1

    @property
    def key(self) -> tuple:
        return (self.placement.shard_dim, self.placement.num_chunks, self.size) if self.is_split else ()


@dataclass(frozen=True)
class Piece:
    """Elements `start .. start + count - 1` of the flattened saved local tensor of `tensor_rank`.

    They are elements `out ...` of the wanted range; or `take(elements, wanted range)` copies some of them.
    """

    tensor_rank: int
    start: int
    count: int
    out: int = 0
    take: Callable[[Tensor, Tensor], None] | None = None


def local_pieces(saved: Layout, wanted: Layout, tensor_rank: int, start: int, count: int) -> Iterator[Piece]:
    """The pieces that make elements `start .. start + count - 1` of the wanted local tensor of `tensor_rank`."""
    if not count:
        return
    if saved.key == wanted.key:
        yield Piece(tensor_rank if wanted.is_split else 0, start, count)
        return
    split = saved if saved.is_split else wanted
    dim, chunks = split.placement.shard_dim, split.placement.num_chunks
    sizes = [x.size if x.is_split else 1 for x in (saved, wanted)]
    if saved.is_split and wanted.is_split and saved.key[:2] != wanted.key[:2]:
        raise ValueError(f"a parameter sharded along {saved.key} cannot be read along {wanted.key}")
    rank = tensor_rank if wanted.is_split else 0
    before, along, after = math.prod(saved.shape[:dim]), saved.shape[dim], math.prod(saved.shape[dim + 1 :])
    if before == 1:
        yield from row_pieces(along, after, chunks, *sizes, rank, start, count)
    else:
        yield from column_pieces(along, after, chunks, *sizes, rank, start, count)


def row_pieces(
    rows: int, width: int, chunks: int, saved_size: int, size: int, rank: int, start: int, count: int
) -> Iterator[Piece]:
    """Of [rows, width], sharded by rows within each chunk."""
    saved_rows, own_rows = rows // (chunks * saved_size), rows // (chunks * size)  # of a chunk on one rank
    position, stop = start, start + count
    while position < stop:
        chunk, own_row = divmod(position // width, own_rows)
        saved_rank, saved_row = divmod(rank * own_rows + own_row, saved_rows)  # row of the chunk
        # to the end of what is contiguous in both
        run = min(own_rows - own_row, saved_rows - saved_row) * width - position % width
        run = min(run, stop - position)
        saved_start = (chunk * saved_rows + saved_row) * width + position % width
        yield Piece(saved_rank, saved_start, run, position - start)
        position += run


def column_pieces(
    along: int, after: int, chunks: int, saved_size: int, size: int, rank: int, start: int, count: int
) -> Iterator[Piece]:
    """Of [A, along, after], sharded along the second dim within each chunk."""
    saved_along, own_along = along // saved_size, along // size
    saved_chunk, own_chunk = saved_along // chunks, own_along // chunks
    first, last = start // (own_along * after), -(-(start + count) // (own_along * after))  # rows of A
    for saved_rank in range(saved_size):
        begin = max(rank * own_chunk, saved_rank * saved_chunk)
        end = min((rank + 1) * own_chunk, (saved_rank + 1) * saved_chunk)
        if begin >= end:
            continue

        def take(elements: Tensor, out: Tensor, begin=begin, end=end, saved_rank=saved_rank) -> None:
            read = elements.view(last - first, chunks, saved_chunk, after)
            columns = read[:, :, begin - saved_rank * saved_chunk : end - saved_rank * saved_chunk]
            copy_columns(columns, out, begin - rank * own_chunk, own_chunk, start - first * own_along * after)

        saved_row = saved_along * after
        yield Piece(saved_rank, first * saved_row, (last - first) * saved_row, take=take)


def copy_columns(columns: Tensor, out: Tensor, at: int, own_chunk: int, skipped: int) -> None:
    """Writes columns [A, chunks, n, B] to columns `at ...` of each chunk of a tensor [A, chunks, own_chunk, B], of
    which `out` has the flattened elements from `skipped` on."""
    rows, chunks, n, after = columns.shape
    row = chunks * own_chunk * after
    first, last = -(-skipped // row), (skipped + len(out)) // row  # the rows that `out` has whole
    if first < last:
        whole = out[first * row - skipped : last * row - skipped].view(last - first, chunks, own_chunk, after)
        whole[:, :, at : at + n] = columns[first:last]
    for index in {0, rows - 1} - set(range(first, last)):
        for chunk in range(chunks):
            place = index * row - skipped + (chunk * own_chunk + at) * after
            begin, end = max(place, 0), min(place + n * after, len(out))
            if begin < end:
                out[begin:end] = columns[index, chunk].reshape(-1)[begin - place : end - place]

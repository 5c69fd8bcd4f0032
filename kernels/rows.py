"""Which token is in which row, and sums over the tokens of each row.

    cu_rows [R + 1]: row r is tokens cu_rows[r] .. cu_rows[r + 1] - 1, side by side from token 0; rows may have none.
    Tokens past the last row are padding.

Rows are cut into runs of at most `RUN` tokens, and so is the padding. A kernel's program works on a run: what belongs
to the row (shift, scale, gate) is read once, what is summed over the row's tokens is summed in registers and written
once, and `sum_of_runs` then adds up the runs of every row. Both sums have one order, on every device and at every call,
unlike those of atomic additions.

All of it is made on the CPU from cu_rows alone, once a pack, and goes to the device in one piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megasora.kernels.launch import Table, launch_for

RUN = {0: 32, 16_384: 64, 65_536: 128}  # tokens of a pack, at least: tokens of a run; a GPU wants some hundred runs


def run_of(count: int) -> int:
    """The length of a run, of so many tokens or vectors in all."""
    return max(size for at_least, size in RUN.items() if count >= at_least)


@dataclass(frozen=True)
class Rows:
    """Build one per pack, by `from_cu_seqlens`, and use it in every layer."""

    num_tokens: int
    num_rows: int
    num_real: int  # tokens in a row; those behind are padding
    num_runs: int  # of rows, without those of padding
    start_Q: Tensor  # int32 [Q + 1]: first token of each run, then `num_tokens`
    row_Q: Tensor  # int32 [Q]: its row; `num_rows` for runs of padding, which are the last
    first_run_R: Tensor  # int32 [R + 1]: first run of each row, then the first run of padding
    row_L: Tensor  # int32 [num_real]: the row of each token that is in one

    @classmethod
    def from_cu_seqlens(cls, cu_rows: Tensor, num_tokens: int, device: torch.device | str) -> Rows:
        """`cu_rows`: integers [R + 1] on the CPU that rise from 0 to at most `num_tokens`; ValueError for others."""
        if cu_rows.ndim != 1 or len(cu_rows) < 2 or int(cu_rows[0]) != 0 or bool((cu_rows.diff() < 0).any()):
            raise ValueError(f"cu_rows {tuple(cu_rows.shape)} must rise from 0, [R + 1], not {cu_rows.tolist()[:8]}")
        if int(cu_rows[-1]) > num_tokens:
            raise ValueError(f"cu_rows ends at {int(cu_rows[-1])}, behind the last of {num_tokens} tokens")
        cu = cu_rows.to(torch.int64)
        num_rows, num_real = len(cu) - 1, int(cu[-1])
        cuts = torch.cat((cu, torch.arange(0, num_tokens + 1, run_of(num_tokens)), cu.new_tensor([num_tokens])))
        start_Q = cuts.unique()
        row_Q = torch.searchsorted(cu, start_Q[:-1], right=True) - 1
        first_run_R = torch.searchsorted(row_Q, torch.arange(num_rows + 1))
        row_L = torch.searchsorted(cu, torch.arange(num_real), right=True) - 1
        packed = torch.cat((start_Q, row_Q, first_run_R, row_L)).to(torch.int32).to(device)
        parts = packed.split([len(start_Q), len(row_Q), len(first_run_R), len(row_L)])
        return cls(num_tokens, num_rows, num_real, int(first_run_R[-1]), *parts)

    def spread(self, vectors_RD: Tensor) -> Tensor:
        """[num_real, D]: to each token the vector of its row."""
        return vectors_RD.index_select(0, self.row_L)

    def real(self, x_LD: Tensor) -> Tensor:
        """[L, D] -> [num_real, D], in fp32 at least."""
        return x_LD[: self.num_real].to(torch.promote_types(x_LD.dtype, torch.float32))

    def padded(self, x_LD: Tensor, dtype: torch.dtype) -> Tensor:
        """[num_real, D] -> [L, D] in `dtype`, 0 at padding."""
        x_LD = x_LD.to(dtype)
        missing = self.num_tokens - self.num_real
        return F.pad(x_LD, (0, 0, 0, missing)) if missing else x_LD

    def sum(self, x_LD: Tensor) -> Tensor:
        """[num_real, D] -> [R, D]: over the tokens of each row, as the kernels do: by runs, then the runs."""
        lengths_Q = self.start_Q.diff()[: self.num_runs]
        sums_QD = torch.segment_reduce(x_LD.contiguous(), "sum", lengths=lengths_Q, initial=0.0, unsafe=True)
        return torch.segment_reduce(sums_QD, "sum", lengths=self.first_run_R.diff(), initial=0.0, unsafe=True)

    def check(self, x_LD: Tensor, **vectors: Tensor | None) -> None:
        """ValueError unless these rows are of the tokens of `x_LD` [L, D], and each of `vectors` is [R, D]."""
        if x_LD.ndim != 2 or len(x_LD) != self.num_tokens:
            raise ValueError(f"x {tuple(x_LD.shape)} must be [L, D], of the {self.num_tokens} tokens that rows are of")
        for name, x in {"x": x_LD, **vectors}.items():
            if x is not None and not x.is_floating_point():
                raise ValueError(f"{name} {tuple(x.shape)} of {x.dtype} must be of floating point")
        for name, vector in vectors.items():
            if vector is not None and vector.shape != (self.num_rows, x_LD.shape[1]):
                raise ValueError(f"{name} {tuple(vector.shape)} must be [R, D] = {self.num_rows, x_LD.shape[1]}")


CHUNKS = 6  # of a width, at most: their number sets the size of the compiled code


def chunks_of(width: int) -> tuple[int, int]:
    """(C, BLOCK): a width as C chunks of BLOCK numbers, a power of two, with as few beyond the width as can be.

    5,120 is 5 x 1,024 and 1,536 3 x 512, where one block would be 8,192 and 2,048: registers for nothing.
    """
    cuts = [(-(-width // block), block) for block in (1 << n for n in range(4, 15)) if -(-width // block) <= CHUNKS]
    return min(cuts, key=lambda cut: (cut[0] * cut[1], cut[0]))


def launch_runs(kernel: triton.JITFunction, table: Table, row_Q: Tensor, width: int, *arguments: object) -> None:
    """`kernel` with a program a run, cut for vectors of `width`; how it is cut follows behind its `arguments`."""
    launch, cut = launch_for(table, row_Q.device), chunks_of(width)
    if len(row_Q):
        how = launch.vectors(*cut), *cut, launch.stages
        kernel[(len(row_Q),)](*arguments, *how, num_warps=launch.warps(*cut))


@triton.jit
def load_chunks(x, there, D, C: tl.constexpr, BLOCK: tl.constexpr):
    """C chunks [T, BLOCK] in fp32, 0 beyond the width and where not `there`; `x` [T, 1] points to the first numbers."""
    chunks = ()
    for c in tl.static_range(C):
        d = c * BLOCK + tl.arange(0, BLOCK)[None]
        chunks += (tl.load(x + d, mask=there & (d < D), other=0.0).to(tl.float32),)
    return chunks


@triton.jit
def store_chunk(y, c: tl.constexpr, chunk, there, D):
    d = c * chunk.shape[1] + tl.arange(0, chunk.shape[1])[None]
    tl.store(y + d, chunk.to(y.dtype.element_ty), mask=there & (d < D))


@triton.jit
def zero_chunks(T: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    chunks = ()
    for _ in tl.static_range(C):
        chunks += (tl.zeros([T, BLOCK], tl.float32),)
    return chunks


@triton.jit
def load_vector(pointer, D, other: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Chunks [1, BLOCK] of a vector, or of `other` where there is none."""
    if pointer is None:
        chunks = ()
        for _ in tl.static_range(C):
            chunks += (tl.full([1, BLOCK], other, tl.float32),)
    else:
        chunks = load_chunks(pointer, True, D, C, BLOCK)
    return chunks


@triton.jit
def load_row_vector(pointer, row, stride, R, D, C: tl.constexpr, BLOCK: tl.constexpr):
    """Chunks [1, BLOCK] of the vector of `row`; zeros for padding, which is in row R, and where there are none."""
    if pointer is None:
        chunks = zero_chunks(1, C, BLOCK)
    else:
        chunks = load_chunks(pointer + row.to(tl.int64) * stride, row < R, D, C, BLOCK)
    return chunks


@triton.jit
def times(xs, ys):
    """Products, chunk by chunk."""
    products = ()
    for c in tl.static_range(len(xs)):
        products += (xs[c] * ys[c],)
    return products


@triton.jit
def scaled(xs, factor):
    """Chunks times one number a token."""
    products = ()
    for c in tl.static_range(len(xs)):
        products += (xs[c] * factor,)
    return products


@triton.jit
def plus(xs, ys):
    sums = ()
    for c in tl.static_range(len(xs)):
        sums += (xs[c] + ys[c],)
    return sums


@triton.jit
def store_sums(runs_QD, run, chunks, D):
    """The sum over the tokens of a run, [T, BLOCK] each chunk, to its place."""
    for c in tl.static_range(len(chunks)):
        store_chunk(runs_QD + run.to(tl.int64) * D, c, tl.sum(chunks[c], 0, keep_dims=True), True, D)


@triton.jit
def sum_of_runs_kernel(runs_QD, first_run_R, sums_RD, D, BLOCK_D: tl.constexpr):
    row, d = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, end = tl.load(first_run_R + row), tl.load(first_run_R + row + 1)
    runs_QD += first.to(tl.int64) * D + d
    total = tl.zeros([BLOCK_D], tl.float32)
    for _ in range(first, end):
        total += tl.load(runs_QD, mask=d < D, other=0.0)
        runs_QD += D
    tl.store(sums_RD + row.to(tl.int64) * D + d, total, mask=d < D)


def sum_of_runs(runs_QD: Tensor, first_run_R: Tensor) -> Tensor:
    """fp32 [Q, D] -> [R, D]: the second of a kernel's two passes over the rows; runs in their order."""
    num_rows, width = len(first_run_R) - 1, runs_QD.shape[1]
    sums_RD = runs_QD.new_empty(num_rows, width)
    block = 256
    if sums_RD.numel():
        sum_of_runs_kernel[num_rows, triton.cdiv(width, block)](runs_QD, first_run_R, sums_RD, width, block)
    return sums_RD

"""Rows of a pack: the row of each token, and sums over the tokens of each row.

    cu_rows [R + 1]: row r is tokens cu_rows[r] .. cu_rows[r + 1] - 1, contiguous from token 0; rows may be empty.
    Tokens after the last row are padding.

The tokens of a pack, with its padding, are divided evenly among the programs of a kernel, `tile_tokens_for(L)`
consecutive ones each. The tokens of one program in one row are a row tile: the program processes its row tiles one
after the other, accumulates sums over the tokens of each in registers, and stores them once. `row_tiles.sum_of_tiles`
then adds up the tiles of each row. Both sums have a fixed order, unlike atomic additions, so results repeat bit by
bit; it depends on the lengths of the rows alone, not on the GPU.

The index is computed on the CPU from cu_rows, once per pack, and copied to the device in one transfer.

Letters: `Q` row tiles, those of padding included; `P` programs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Programs of a kernel in a pack of at least PROGRAMS x MIN_TILE_TOKENS tokens. An H100 has 132 multiprocessors; with 1,
# 2 or 4 programs of a kernel on each, the last wave is a full one (tests/kernels/test_compiled.py).
PROGRAMS = 528
MIN_TILE_TOKENS, MAX_TILE_TOKENS = 32, 144  # of a program: shorter ones store many sums, longer ones round them more


def tile_tokens_for(num_tokens: int) -> int:
    """Tokens of a program, and so of a row tile at most, in a pack of `num_tokens` tokens; likewise other vectors."""
    num_programs = PROGRAMS * max(1, math.ceil(num_tokens / (PROGRAMS * MAX_TILE_TOKENS)))
    return max(MIN_TILE_TOKENS, 4 * math.ceil(num_tokens / (4 * num_programs)))


@dataclass(frozen=True)
class Rows:
    """Offsets and row tiles of the rows of a pack. Build one per pack, and use it in every layer."""

    num_tokens: int
    num_rows: int
    num_real: int  # tokens in rows; those after them are padding
    num_row_tiles: int  # tiles of rows, without those of padding: the first ones
    tile_start_Q: Tensor  # int32 [Q + 1]: first token of each tile, then `num_tokens`
    tile_row_Q: Tensor  # int32 [Q]: row of each tile; `num_rows` for tiles of padding, which come last
    first_tile_R: Tensor  # int32 [R + 1]: first tile of each row, then the first tile of padding
    first_tile_P: Tensor  # int32 [P + 1]: first tile of each program, then Q
    row_L: Tensor  # int32 [num_real]: row of each real token

    @classmethod
    def from_cu_seqlens(cls, cu_rows: Tensor, num_tokens: int, device: torch.device | str) -> Rows:
        """`cu_rows`: integers [R + 1] on the CPU, non-decreasing, from 0 to at most `num_tokens`; else ValueError."""
        if cu_rows.ndim != 1 or len(cu_rows) < 2 or int(cu_rows[0]) != 0 or bool((cu_rows.diff() < 0).any()):
            raise ValueError(f"cu_rows {tuple(cu_rows.shape)} must rise from 0, [R + 1], not {cu_rows.tolist()[:8]}")
        if int(cu_rows[-1]) > num_tokens:
            raise ValueError(f"cu_rows ends at {int(cu_rows[-1])}, after the last of {num_tokens} tokens")
        cu = cu_rows.to(torch.int64)
        num_rows, num_real = len(cu) - 1, int(cu[-1])
        program_tokens = tile_tokens_for(num_tokens)
        ends = torch.arange(0, num_tokens + program_tokens, program_tokens).clamp(max=num_tokens)
        tile_start_Q = torch.cat((cu, ends)).unique()
        tile_row_Q = torch.searchsorted(cu, tile_start_Q[:-1], right=True) - 1
        first_tile_R = torch.searchsorted(tile_row_Q, torch.arange(num_rows + 1))
        first_tile_P = torch.searchsorted(tile_start_Q, ends)
        row_L = torch.searchsorted(cu, torch.arange(num_real), right=True) - 1
        tensors = tile_start_Q, tile_row_Q, first_tile_R, first_tile_P, row_L
        on_device = torch.cat(tensors).to(torch.int32).to(device).split([len(x) for x in tensors])
        return cls(num_tokens, num_rows, num_real, int(first_tile_R[-1]), *on_device)

    def expand(self, vectors_RD: Tensor) -> Tensor:
        """[R, D] -> [num_real, D]: for each real token the vector of its row."""
        return vectors_RD.index_select(0, self.row_L)

    def unpad(self, x_LD: Tensor) -> Tensor:
        """[L, D] -> [num_real, D]: without padding, in fp32 at least."""
        return x_LD[: self.num_real].to(torch.promote_types(x_LD.dtype, torch.float32))

    def pad(self, x_LD: Tensor, dtype: torch.dtype) -> Tensor:
        """[num_real, D] -> [L, D] in `dtype`, 0 at padding."""
        x_LD = x_LD.to(dtype)
        missing = self.num_tokens - self.num_real
        return F.pad(x_LD, (0, 0, 0, missing)) if missing else x_LD

    def sum(self, x_LD: Tensor) -> Tensor:
        """[num_real, D] -> [R, D]: sums over the tokens of each row, tile by tile, in a fixed order."""
        lengths_Q = self.tile_start_Q.diff()[: self.num_row_tiles]
        sums_QD = torch.segment_reduce(x_LD.contiguous(), "sum", lengths=lengths_Q, initial=0.0, unsafe=True)
        return torch.segment_reduce(sums_QD, "sum", lengths=self.first_tile_R.diff(), initial=0.0, unsafe=True)

    def check_shapes(self, x_LD: Tensor, **vectors: Tensor | None) -> None:
        """Raises ValueError unless `x_LD` is [L, D] with L = `num_tokens`, and each of `vectors` is [R, D]."""
        if x_LD.ndim != 2 or len(x_LD) != self.num_tokens:
            raise ValueError(f"x {tuple(x_LD.shape)} must be [L, D] with L = {self.num_tokens}, the tokens of the pack")
        for name, x in {"x": x_LD, **vectors}.items():
            if x is not None and not x.is_floating_point():
                raise ValueError(f"{name} {tuple(x.shape)} of {x.dtype} must be floating point")
        for name, vector in vectors.items():
            if vector is not None and vector.shape != (self.num_rows, x_LD.shape[1]):
                raise ValueError(f"{name} {tuple(vector.shape)} must be [R, D] = {self.num_rows, x_LD.shape[1]}")

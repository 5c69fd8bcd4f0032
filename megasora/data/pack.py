"""Builds one pack: records (clips ready for the model) in; a VideoBatch out.

Patches are most of a pack's bytes, so clips are read directly to their place in a PackBuffer. `make_batch` uses the
buffer as it is if the patches of its records are contiguous in it from token 0; otherwise it copies them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from megasora.batch import VideoBatch

POSITION_BYTES, COORDS_BYTES = 8, 12  # per token


@dataclass(frozen=True)
class Record:
    """One clip as it is trained on, or some of its tokens."""

    sample_id: int
    patches_LP: Tensor  # [l, P]
    grid: tuple[int, int, int]  # latent frames, rows, columns of tokens of the whole clip
    text_SE: Tensor  # [S, E]: the encoded caption
    native_size: tuple[float, float, float, float]  # height, width (pixels), frames, frames per second
    caption: str = ""
    positions_L: Tensor | None = None  # int64: which tokens of the clip these are, increasing; None: all of them


class PackBuffer:
    """The memory of a pack's tokens, before its clips are known: `positions_L`, `coords_L3`, `patches_LP`."""

    def __init__(self, memory: np.ndarray, tokens: int, dtype: torch.dtype):
        """`memory`: uint8 [num_bytes(...)]. `dtype`: of the patches."""
        coords_at, patches_at = POSITION_BYTES * tokens, (POSITION_BYTES + COORDS_BYTES) * tokens
        self.positions_L = torch.from_numpy(memory[:coords_at]).view(torch.int64)
        self.coords_L3 = torch.from_numpy(memory[coords_at:patches_at]).view(torch.int32).view(tokens, 3)
        self.patches_LP = torch.from_numpy(memory[patches_at:]).view(dtype).view(tokens, -1)

    @staticmethod
    def num_bytes(tokens: int, patch_dim: int, dtype: torch.dtype) -> int:
        return tokens * (POSITION_BYTES + COORDS_BYTES + patch_dim * dtype.itemsize)


def make_batch(records: Sequence[Record], tokens_per_pack: int, buffer: PackBuffer | None = None) -> VideoBatch:
    """One clean pack: one row per segment, at t = 0. Patches keep the precision in which they are stored.

    `buffer`: contains the records' patches already, contiguously from token 0; None: they are copied. Raises ValueError
    if there are no records, or they have more than `tokens_per_pack` tokens.
    """
    lengths = [record.patches_LP.shape[0] for record in records]
    cu = [0, *accumulate(lengths)]
    if not records or cu[-1] > tokens_per_pack:
        raise ValueError(f"{len(records)} clips of {cu[-1]} tokens do not fit a pack of {tokens_per_pack}")
    if buffer is None:
        buffer = copy_into_buffer(records, cu, tokens_per_pack)
    positions, coords, ramp = buffer.positions_L.numpy(), buffer.coords_L3.numpy(), np.arange(max(lengths))
    for record, start, end in zip(records, cu, cu[1:], strict=False):
        if record.positions_L is None:
            positions[start:end] = ramp[: end - start]
            write_coords(coords[start:end], record.grid, ramp)
        else:
            positions[start:end] = record.positions_L
            coords[start:end] = np.stack(np.unravel_index(positions[start:end], record.grid), axis=1)
    positions[cu[-1] :], coords[cu[-1] :] = 0, 0
    buffer.patches_LP[cu[-1] :].zero_()
    cu_segments = as_tensor(cu, np.int32)
    return VideoBatch(
        patches_LP=buffer.patches_LP,
        coords_L3=buffer.coords_L3,
        positions_L=buffer.positions_L,
        grids_G3=as_tensor([r.grid for r in records], np.int64),
        cu_segments=cu_segments,
        cu_rows=cu_segments,
        timesteps_R=torch.zeros(len(records)),
        row_segment_R=torch.arange(len(records)),
        text_SE=torch.cat([r.text_SE for r in records]),
        cu_text=as_tensor([0, *accumulate(r.text_SE.shape[0] for r in records)], np.int32),
        drop_text_G=as_tensor([not r.caption.strip() for r in records], np.bool_),
        native_size_G4=as_tensor([r.native_size for r in records], np.float32),
        sample_ids_G=as_tensor([r.sample_id for r in records], np.int64),
    )


def as_tensor(values: list, dtype: type) -> Tensor:
    """torch.tensor, in half the time."""
    return torch.from_numpy(np.array(values, dtype))


def copy_into_buffer(records: Sequence[Record], cu: list[int], tokens: int) -> PackBuffer:
    """A new buffer with the records' patches, in the smallest dtype that holds all of them exactly."""
    dtype = functools.reduce(torch.promote_types, (r.patches_LP.dtype for r in records))
    size = PackBuffer.num_bytes(tokens, records[0].patches_LP.shape[1], dtype)
    buffer = PackBuffer(np.empty(size, np.uint8), tokens, dtype)
    for record, start, end in zip(records, cu, cu[1:], strict=False):
        buffer.patches_LP[start:end] = record.patches_LP
    return buffer


def write_coords(out_L3: np.ndarray, grid: tuple[int, int, int], ramp: np.ndarray) -> None:
    """Writes the coords of a whole clip, in time-major order. `ramp`: 0, 1, 2 ... for the longest side of the grid."""
    t, h, w = grid
    coords_THW3 = out_L3.reshape(t, h, w, 3)
    coords_THW3[..., 0] = ramp[:t, None, None]
    coords_THW3[..., 1] = ramp[:h, None]
    coords_THW3[..., 2] = ramp[:w]

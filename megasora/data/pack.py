"""Records (clips ready for the model) to one pack.

Patches are most of a pack's bytes, so they are best read where they stay: a Blank is the memory of a pack before its
clips are known, and `make_batch` takes it as it is where the patches of its records lie in it one after the other.
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

PLACE, COORDS = 8, 12  # bytes a token


@dataclass(frozen=True)
class Record:
    """One clip as it is trained on, or some of its tokens."""

    sample_id: int
    patches_LP: Tensor  # [l, P]
    grid: tuple[int, int, int]  # latent frames, rows, columns of tokens of the clip; its tokens are their product
    text_SE: Tensor  # [S_i, E]
    native: tuple[float, float, float, float]  # height, width (pixels), frames, frames a second
    caption: str = ""
    places_L: Tensor | None = None  # int64: which tokens of the clip these are, increasing; None: all of them


class Blank:
    """What a pack has of each token, not yet filled."""

    def __init__(self, memory: np.ndarray, tokens: int, dtype: torch.dtype):
        """`memory`: uint8, as many as `bytes_of` says."""
        coords, patches = PLACE * tokens, (PLACE + COORDS) * tokens  # where they begin
        self.places_L = torch.from_numpy(memory[:coords]).view(torch.int64)
        self.coords_L3 = torch.from_numpy(memory[coords:patches]).view(torch.int32).view(tokens, 3)
        self.patches_LP = torch.from_numpy(memory[patches:]).view(dtype).view(tokens, -1)

    @staticmethod
    def bytes_of(tokens: int, dim: int, dtype: torch.dtype) -> int:
        return tokens * (PLACE + COORDS + dim * dtype.itemsize)


def make_batch(records: Sequence[Record], tokens_per_pack: int, blank: Blank | None = None) -> VideoBatch:
    """One pack, clean: a row a segment at t = 0. Patches stay in the precision in which they are stored.

    `blank`: where the records' patches lie already, one after the other; None: they are copied. Raises ValueError where
    there is no clip, or where they do not fit.
    """
    lengths = [record.patches_LP.shape[0] for record in records]
    cu = [0, *accumulate(lengths)]
    if not records or cu[-1] > tokens_per_pack:
        raise ValueError(f"{len(records)} clips of {cu[-1]} tokens do not fit a pack of {tokens_per_pack}")
    if blank is None:
        blank = copied(records, cu, tokens_per_pack)
    places, coords, ramp = blank.places_L.numpy(), blank.coords_L3.numpy(), np.arange(max(lengths))
    for record, first, end in zip(records, cu, cu[1:], strict=False):
        if record.places_L is None:
            places[first:end] = ramp[: end - first]
            write_coords(coords[first:end], record.grid, ramp)
        else:
            places[first:end] = record.places_L
            coords[first:end] = np.stack(np.unravel_index(places[first:end], record.grid), axis=1)
    places[cu[-1] :], coords[cu[-1] :] = 0, 0
    blank.patches_LP[cu[-1] :].zero_()
    cu_segments = as_tensor(cu, np.int32)
    return VideoBatch(
        patches_LP=blank.patches_LP,
        coords_L3=blank.coords_L3,
        places_L=blank.places_L,
        grids_G3=as_tensor([r.grid for r in records], np.int64),
        cu_segments=cu_segments,
        cu_rows=cu_segments,
        timesteps_R=torch.zeros(len(records)),
        row_segment_R=torch.arange(len(records)),
        text_SE=torch.cat([r.text_SE for r in records]),
        cu_text=as_tensor([0, *accumulate(r.text_SE.shape[0] for r in records)], np.int32),
        drop_text_G=as_tensor([not r.caption.strip() for r in records], np.bool_),
        native_G4=as_tensor([r.native for r in records], np.float32),
        sample_ids_G=as_tensor([r.sample_id for r in records], np.int64),
    )


def as_tensor(values: list, dtype: type) -> Tensor:
    """Half the time of torch.tensor."""
    return torch.from_numpy(np.array(values, dtype))


def copied(records: Sequence[Record], cu: list[int], tokens: int) -> Blank:
    """With the records' patches, in the least precision that holds them exactly."""
    dtype = functools.reduce(torch.promote_types, (r.patches_LP.dtype for r in records))
    size = Blank.bytes_of(tokens, records[0].patches_LP.shape[1], dtype)
    blank = Blank(np.empty(size, np.uint8), tokens, dtype)
    for record, first, end in zip(records, cu, cu[1:], strict=False):
        blank.patches_LP[first:end] = record.patches_LP
    return blank


def write_coords(out_L3: np.ndarray, grid: tuple[int, int, int], ramp: np.ndarray) -> None:
    """Coords of a whole clip, time first. `ramp`: 0, 1, 2 ... as far as any side of the grid."""
    t, h, w = grid
    coords_THW3 = out_L3.reshape(t, h, w, 3)
    coords_THW3[..., 0] = ramp[:t, None, None]
    coords_THW3[..., 1] = ramp[:h, None]
    coords_THW3[..., 2] = ramp[:w]

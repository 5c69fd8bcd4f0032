"""Records (clips ready for the model) to one pack."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.batch import VideoBatch, grid_coords


@dataclass(frozen=True)
class Record:
    """One clip as it is trained on, or a run of its tokens."""

    sample_id: int
    patches_LP: Tensor  # [l, P]
    grid: tuple[int, int, int]  # latent frames, rows, columns of tokens of the clip; its tokens are their product
    text_SE: Tensor  # [S_i, E]
    native: tuple[float, float, float, float]  # height, width (pixels), frames, frames a second
    caption: str = ""
    start: int = 0  # which token of the clip `patches_LP` begins with


def make_batch(records: list[Record], tokens_per_pack: int) -> VideoBatch:
    """One pack, clean: a row a segment at t = 0. Patches stay in the precision in which they are stored.

    Raises ValueError where there is no clip, or where they do not fit.
    """
    lengths = [len(r.patches_LP) for r in records]
    if not records or sum(lengths) > tokens_per_pack:
        raise ValueError(f"{len(records)} clips of {sum(lengths)} tokens do not fit a pack of {tokens_per_pack}")
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    dtype = functools.reduce(torch.promote_types, (r.patches_LP.dtype for r in records))
    patches = torch.zeros(tokens_per_pack, records[0].patches_LP.shape[1], dtype=dtype)
    coords = torch.zeros(tokens_per_pack, 3, dtype=torch.int32)
    for record, first, length in zip(records, cu.tolist(), lengths, strict=False):
        patches[first : first + length] = record.patches_LP
        coords[first : first + length] = grid_coords(record.grid)[record.start : record.start + length]
    return VideoBatch(
        patches_LP=patches,
        coords_L3=coords,
        grids_G3=torch.tensor([r.grid for r in records]),
        cu_segments=cu,
        cu_rows=cu,
        timesteps_R=torch.zeros(len(records)),
        row_segment_R=torch.arange(len(records)),
        text_SE=torch.cat([r.text_SE for r in records]),
        cu_text=torch.tensor([0, *(len(r.text_SE) for r in records)]).cumsum(0).to(torch.int32),
        drop_text_G=torch.tensor([not r.caption.strip() for r in records]),
        native_G4=torch.tensor([r.native for r in records], dtype=torch.float32),
        sample_ids_G=torch.tensor([r.sample_id for r in records]),
        starts_G=torch.tensor([r.start for r in records]),
    )

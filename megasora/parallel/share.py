"""Takes a rank's share of a pack: its pieces of the segments, with their captions and conditioning.

pack [L]  --ContextSplit-->  share [l], with the same l on every rank and for every pack
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from megasora.batch import ContextSplit, VideoBatch
from megasora.config import Config
from megasora.parallel.context_split import split_pack
from megasora.parallel.mesh import Mesh


def share_length(config: Config) -> int:
    """Tokens of a share (what one context rank has of a pack), padding included; a multiple of the tensor axis."""
    p = config.parallel
    return -(-config.data.tokens_per_pack // (p.context * p.tensor)) * p.tensor


def share_pack(batch: VideoBatch, config: Config, mesh: Mesh) -> VideoBatch:
    """This rank's share of a clean pack, with the pack's split. Tensor and pipeline peers get equal shares."""
    length = share_length(config)
    split = split_pack(batch.cu_segments.diff().tolist(), mesh.ring.size, mesh.ulysses.size * length)
    return take_share(batch, split, mesh.ring.rank, mesh.ulysses.rank, length)


def take_share(
    batch: VideoBatch, split: ContextSplit, ring_rank: int, ulysses_rank: int, local_tokens: int
) -> VideoBatch:
    """The tokens that `split` gives to `ring_rank`, slots `ulysses_rank * local_tokens` and the following ones.

    ValueError if the pack is already noised: shares are taken of clean packs, whose rows are the segments.
    """
    if not torch.equal(batch.cu_rows, batch.cu_segments):
        raise ValueError("a share is taken of a clean pack, whose rows are its segments")
    first_slot = ulysses_rank * local_tokens
    segments, starts, stops = pieces_in_slots(split, ring_rank, first_slot, first_slot + local_tokens)
    first = batch.cu_segments[segments] + starts  # token of the pack at which each piece starts
    tokens = torch.cat([torch.arange(a, b) for a, b in zip(first, first + stops - starts, strict=True)])
    text = torch.cat([torch.arange(batch.cu_text[g], batch.cu_text[g + 1]) for g in segments])
    padding = (0, 0, 0, local_tokens - len(tokens))
    cu_seqlens = to_cu_seqlens(stops - starts)
    return dataclasses.replace(
        batch,
        patches_LP=F.pad(batch.patches_LP[tokens], padding),
        coords_L3=F.pad(batch.coords_L3[tokens], padding),
        positions_L=F.pad(batch.positions_L[tokens], padding[2:]),
        grids_G3=batch.grids_G3[segments],
        cu_segments=cu_seqlens,
        cu_rows=cu_seqlens,
        timesteps_R=batch.timesteps_R[segments],
        row_segment_R=torch.arange(len(segments)),
        text_SE=batch.text_SE[text],
        cu_text=to_cu_seqlens(batch.cu_text.diff()[segments]),
        drop_text_G=batch.drop_text_G[segments],
        native_size_G4=batch.native_size_G4[segments],
        sample_ids_G=batch.sample_ids_G[segments],
        context_split=split,
    )


def pieces_in_slots(split: ContextSplit, rank: int, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """(segments, starts, stops), int64 [q]: the pieces, clipped to slots `low .. high - 1` of a ring rank.

    A rank without tokens gets an empty piece of segment 0, so that no tensor is empty and every parameter receives a
    (zero) gradient on every rank.
    """
    _, segments, starts, stops = split.pieces_Q4[split.pieces_Q4[:, 0] == rank].unbind(1)
    slot_stops = (stops - starts).cumsum(0)
    slot_starts = slot_stops - (stops - starts)
    starts, stops = starts + (low - slot_starts).clamp_min(0), stops - (slot_stops - high).clamp_min(0)
    nonempty = stops > starts
    if not nonempty.any():
        return (torch.zeros(1, dtype=torch.int64),) * 3
    return segments[nonempty], starts[nonempty], stops[nonempty]


def to_cu_seqlens(lengths: Tensor) -> Tensor:
    """int32 [n + 1]: 0, then the cumulative sums of the lengths [n]."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

"""A pack to the share of one context rank: its pieces of the segments, and of captions and conditioning what they need.

pack [L]  --PackPlan-->  share [l], l the same on every rank and for every pack
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from megasora.batch import PackPlan, VideoBatch
from megasora.config import Config
from megasora.parallel.mesh import Mesh
from megasora.parallel.plan import plan_pack


def tokens_per_rank(config: Config) -> int:
    """Tokens of a pack on each context rank; padded so that they divide by the tensor axis too."""
    p = config.parallel
    return -(-config.data.tokens_per_pack // (p.context * p.tensor)) * p.tensor


def share_pack(batch: VideoBatch, config: Config, mesh: Mesh) -> VideoBatch:
    """This rank's share of a clean pack, with the pack's plan; tensor and pipeline peers have the same one."""
    length = tokens_per_rank(config)
    plan = plan_pack(batch.cu_segments.diff().tolist(), mesh.ring.size, mesh.ulysses.size * length)
    return take_share(batch, plan, mesh.ring.rank, mesh.ulysses.rank, length)


def take_share(batch: VideoBatch, plan: PackPlan, ring_rank: int, slice_rank: int, length: int) -> VideoBatch:
    """Slots `slice_rank * length ..` of what `plan` gives to `ring_rank`.

    Raises ValueError where the pack is noised already: shares are made of clean packs, whose rows are the segments.
    """
    if not torch.equal(batch.cu_rows, batch.cu_segments):
        raise ValueError("a share is taken of a clean pack, whose rows are its segments")
    segments, starts, stops = pieces_in_slots(plan, ring_rank, slice_rank * length, (slice_rank + 1) * length)
    first = batch.cu_segments[segments] + starts  # of each piece, in the pack
    tokens = torch.cat([torch.arange(a, b) for a, b in zip(first, first + stops - starts, strict=True)])
    text = torch.cat([torch.arange(batch.cu_text[g], batch.cu_text[g + 1]) for g in segments])
    padding = (0, 0, 0, length - len(tokens))
    cu = running_total(stops - starts)
    return dataclasses.replace(
        batch,
        patches_LP=F.pad(batch.patches_LP[tokens], padding),
        coords_L3=F.pad(batch.coords_L3[tokens], padding),
        places_L=F.pad(batch.places_L[tokens], padding[2:]),
        grids_G3=batch.grids_G3[segments],
        cu_segments=cu,
        cu_rows=cu,
        timesteps_R=batch.timesteps_R[segments],
        row_segment_R=torch.arange(len(segments)),
        text_SE=batch.text_SE[text],
        cu_text=running_total(batch.cu_text.diff()[segments]),
        drop_text_G=batch.drop_text_G[segments],
        native_G4=batch.native_G4[segments],
        sample_ids_G=batch.sample_ids_G[segments],
        plan=plan,
    )


def pieces_in_slots(plan: PackPlan, rank: int, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """(segments, starts, stops), int64, of what lies in slots `low .. high - 1` of a rank.

    A rank without a token gets an empty piece of the first segment: every shape stays alive, and every parameter gets
    a gradient, of zeros, on every rank.
    """
    _, segments, starts, stops = plan.pieces_Q4[plan.pieces_Q4[:, 0] == rank].unbind(1)
    ends = (stops - starts).cumsum(0)
    begins = ends - (stops - starts)
    starts, stops = starts + (low - begins).clamp_min(0), stops - (ends - high).clamp_min(0)
    here = stops > starts
    if not here.any():
        return (torch.zeros(1, dtype=torch.int64),) * 3
    return segments[here], starts[here], stops[here]


def running_total(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

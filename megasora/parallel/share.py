"""Takes a rank's share of a pack: its pieces of the segments, with their captions and conditioning; and the way back.

pack [L]  --ContextSplit-->  share [l], with the same l on every rank and, in training, for every pack
predictions [l, P] of all shares  --gather_shares-->  [L, P] of the pack
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from megasora.batch import ContextSplit, VideoBatch, segment_ids
from megasora.config import Config, ParallelConfig
from megasora.parallel.collectives import all_gather_async, wait
from megasora.parallel.context_split import split_pack
from megasora.parallel.mesh import Axis, Mesh


def share_length(config: Config) -> int:
    """Tokens of a share (what one context rank has of a pack), padding included; a multiple of the tensor axis."""
    return share_length_of(config.data.tokens_per_pack, config.parallel)


def share_length_of(tokens: int, parallel: ParallelConfig) -> int:
    """The same for a pack of `tokens` tokens."""
    return -(-tokens // (parallel.context * parallel.tensor)) * parallel.tensor


def share_pack(batch: VideoBatch, config: Config, mesh: Mesh) -> VideoBatch:
    """This rank's share of a clean pack, with the pack's split. Tensor and pipeline peers get equal shares."""
    return share_in(batch, share_length(config), mesh)


def share_in(batch: VideoBatch, length: int, mesh: Mesh) -> VideoBatch:
    """This rank's share of a pack, `length` tokens, with the pack's split."""
    split = split_pack(batch.cu_segments.diff().tolist(), mesh.ring.size, mesh.ulysses.size * length)
    return take_share(batch, split, mesh.ring.rank, mesh.ulysses.rank, length)


def take_share(
    batch: VideoBatch, split: ContextSplit, ring_rank: int, ulysses_rank: int, local_tokens: int
) -> VideoBatch:
    """The tokens that `split` gives to `ring_rank`, slots `ulysses_rank * local_tokens` and the following ones.

    The rows of the share are those of the pack within its pieces; of a clean pack, the pieces.
    """
    first_slot = ulysses_rank * local_tokens
    segments, starts, stops = pieces_in_slots(split, ring_rank, first_slot, first_slot + local_tokens)
    first = batch.cu_segments[segments] + starts  # token of the pack at which each piece starts
    tokens = torch.cat([torch.arange(a, b) for a, b in zip(first, first + stops - starts, strict=True)])
    text = torch.cat([torch.arange(batch.cu_text[g], batch.cu_text[g + 1]) for g in segments])
    padding = (0, 0, 0, local_tokens - len(tokens))
    cu_seqlens = to_cu_seqlens(stops - starts)
    rows, row_lengths = rows_of_tokens(batch, tokens)
    cu_rows = to_cu_seqlens(row_lengths)
    return dataclasses.replace(
        batch,
        patches_LP=F.pad(batch.patches_LP[tokens], padding),
        coords_L3=F.pad(batch.coords_L3[tokens], padding),
        positions_L=F.pad(batch.positions_L[tokens], padding[2:]),
        grids_G3=batch.grids_G3[segments],
        cu_segments=cu_seqlens,
        cu_rows=cu_rows,
        timesteps_R=batch.timesteps_R[rows],
        row_segment_R=segment_ids(cu_seqlens, len(tokens) + 1)[cu_rows[:-1]],
        text_SE=batch.text_SE[text],
        cu_text=to_cu_seqlens(batch.cu_text.diff()[segments]),
        drop_text_G=batch.drop_text_G[segments],
        native_size_G4=batch.native_size_G4[segments],
        sample_ids_G=batch.sample_ids_G[segments],
        context_split=split,
        plan=None,
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


def rows_of_tokens(batch: VideoBatch, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of the pack, int64 [r]; how many of `tokens` each has). Of no tokens: its first row, which has none."""
    if not len(tokens):
        return torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return torch.unique_consecutive(segment_ids(batch.cu_rows, batch.num_tokens)[tokens], return_counts=True)


def gather_shares(x_lP: Tensor, split: ContextSplit, context: Axis, cu_segments: Tensor, length: int) -> Tensor:
    """[L, P] of a pack of `length` tokens from the [l, P] of the shares of all context ranks; 0 at padding.

    All ranks of the context axis must call it. `cu_segments`: of the pack.
    """
    shares = wait(all_gather_async(x_lP, context))
    slots, tokens = slots_of_tokens(split, cu_segments)
    x_LP = x_lP.new_zeros(length, x_lP.shape[1])
    x_LP[tokens.to(x_lP.device)] = shares[slots.to(x_lP.device)]
    return x_LP


def slots_of_tokens(split: ContextSplit, cu_segments: Tensor) -> tuple[Tensor, Tensor]:
    """(slots, tokens of the pack), int64: where each token is. Slots are counted through all ranks of the ring."""
    rank_Q, segment_Q, start_Q, stop_Q = split.pieces_Q4.t().contiguous()
    length_Q = stop_Q - start_Q
    before_Q = length_Q.cumsum(0) - length_Q  # tokens in earlier pieces
    first_piece = torch.searchsorted(rank_Q, rank_Q)  # of the same rank
    slot_Q = rank_Q * split.slots_per_rank + before_Q - before_Q[first_piece]
    order = torch.arange(int(length_Q.sum()))
    slots = order + (slot_Q - before_Q).repeat_interleave(length_Q)
    return slots, order + (cu_segments[segment_Q] + start_Q - before_Q).repeat_interleave(length_Q)


def to_cu_seqlens(lengths: Tensor) -> Tensor:
    """int32 [n + 1]: 0, then the cumulative sums of the lengths [n]."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

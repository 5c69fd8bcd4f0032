"""VideoBatch: one pack of clips, or one rank's share of it. The only object that goes from the data to the model.

A pack always has `L` tokens. Its segments (clips) are contiguous and start at token 0; the tokens after the last
segment are padding, which attends to nothing and has no loss. A segment consists of whole rows: a row is a range of
tokens with one timestep. Tokens of a clip are in time-major order, so that the tokens of a latent frame are
contiguous. A segment may hold less than its clip (a part of a split clip, or what token dropping leaves of it):
`positions_L` gives the index of each token in its clip.

Where several ranks share a pack (context parallel), a ContextSplit says which rank has which tokens. A rank's share is
a VideoBatch again: its segments are pieces, ranges of consecutive tokens of the pack's segments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megasora.device_transfer import ON_CPU, to_device


@dataclass(frozen=True)
class ContextSplit:
    """Which rank has which tokens of a pack: a list of pieces, ranges of consecutive tokens of one segment.

    A rank has at most one piece of a segment. Its pieces fill its `slots_per_rank` slots from slot 0, contiguously, in
    the order given here; the remaining slots are padding.
    """

    ranks: int
    slots_per_rank: int
    # int64 [Q, 4], on the CPU, sorted by rank: rank, segment, first token in it, one past the last
    pieces_Q4: Tensor = field(metadata=ON_CPU)


@dataclass(frozen=True)
class VideoBatch:
    """A pack of `G` segments in `R` rows on `L` tokens of `P` features, with `S` text tokens."""

    patches_LP: Tensor  # float; clean from the loader, noised for the model
    coords_L3: Tensor  # int32 (t, h, w) of each token in its own clip
    positions_L: Tensor = field(metadata=ON_CPU)  # int64: index of each token in its own clip, rising within a segment
    grids_G3: Tensor = field(metadata=ON_CPU)  # int64: latent frames, rows, columns of tokens of each clip
    cu_segments: Tensor = field(metadata=ON_CPU)  # int32 [G + 1]: first token of each segment, then one past the last
    cu_rows: Tensor = field(metadata=ON_CPU)  # int32 [R + 1]; contains every entry of cu_segments
    timesteps_R: Tensor  # float32, in [0, 1]: 0 is clean, 1 is noise
    row_segment_R: Tensor  # int64: the segment of each row
    text_SE: Tensor  # output of the text encoder for the captions, concatenated
    cu_text: Tensor = field(metadata=ON_CPU)  # int32 [G + 1]
    drop_text_G: Tensor  # bool: this clip's caption is hidden from the model
    native_size_G4: Tensor  # float32: height and width in pixels, frames, frames per second
    sample_ids_G: Tensor = field(metadata=ON_CPU)  # int64
    context_split: ContextSplit | None = None  # of the pack, if this is a share
    plan: Any = None  # what the model has computed of the fields on the CPU, see VideoDiT.plan; None: not yet

    @property
    def num_segments(self) -> int:
        return len(self.sample_ids_G)

    @property
    def num_tokens(self) -> int:
        """Tokens of the pack without its padding."""
        return int(self.cu_segments[-1])

    def to(self, device: torch.device | str) -> VideoBatch:
        """Moves what the model computes with to `device`; what plans are made from stays on the CPU."""
        return to_device(self, device)


def segment_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [num_tokens], on the device of `cu_seqlens`: the segment (or row) of each token; padding gets the last."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    ids = torch.searchsorted(cu_seqlens.to(torch.int64), tokens, right=True) - 1
    return ids.clamp_(0, len(cu_seqlens) - 2)


def grid_coords(grid: tuple[int, int, int]) -> Tensor:
    """int32 [t*h*w, 3]: the coords (t, h, w) of a clip's tokens, in time-major order."""
    axes = [torch.arange(n, dtype=torch.int32) for n in grid]
    return torch.cartesian_prod(*axes).view(-1, 3)

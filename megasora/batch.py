"""VideoBatch: one pack of clips, or one rank's share of it: the only thing that travels from the data to the model.

A pack is `L` tokens long whatever is in it. Its segments (clips) lie one after the other from token 0; what is left
behind the last one is padding, which attends to nothing and counts for nothing. A segment consists of whole rows: a row
is a run of tokens with one noise level. Tokens of a clip are ordered time first, so that those of a latent frame lie
together. A segment need not be the whole clip (a part of a long one, or what token dropping left of it): `places_L`
says which token of its clip each one is.

Where several ranks share a pack (context parallel), a PackPlan says which tokens are whose. A rank's share is a
VideoBatch again: its segments are runs of consecutive tokens of the pack's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackPlan:
    """Which tokens of a pack lie on which of `ranks` ranks: runs of consecutive tokens of a segment, called pieces.

    A rank has at most one piece of a segment. Its pieces lie one after the other from slot 0 of its `tokens_per_rank`
    slots, in the order given here; what is left is padding.
    """

    ranks: int
    tokens_per_rank: int
    pieces_Q4: Tensor  # int64 [Q, 4], on the CPU, sorted by rank: rank, segment, its first token, one past last


@dataclass(frozen=True)
class VideoBatch:
    """A pack of `G` segments in `R` rows on `L` tokens of `P` numbers, with `S` text tokens."""

    patches_LP: Tensor  # float; clean from the loader, noised for the model
    coords_L3: Tensor  # int32 (t, h, w) of each token in its own clip
    places_L: Tensor  # int64, on the CPU: the number of each token in its own clip, increasing within a segment
    grids_G3: Tensor  # int64, on the CPU: latent frames, rows, columns of tokens of each clip
    cu_segments: Tensor  # int32 [G + 1], on the CPU: first token of each segment, then one past the last
    cu_rows: Tensor  # int32 [R + 1], on the CPU; contains every entry of cu_segments
    timesteps_R: Tensor  # float32, 0 clean to 1 noise
    row_segment_R: Tensor  # int64: the segment of each row
    text_SE: Tensor  # what the text encoder made of the captions, one after the other
    cu_text: Tensor  # int32 [G + 1], on the CPU
    drop_text_G: Tensor  # bool: this clip's caption is hidden from the model
    native_G4: Tensor  # float32: height and width in pixels, frames, frames a second
    sample_ids_G: Tensor  # int64, on the CPU
    plan: PackPlan | None = None  # of the pack that this is a share of

    @property
    def num_segments(self) -> int:
        return len(self.sample_ids_G)

    @property
    def num_tokens(self) -> int:
        """Real tokens: the pack's length without its padding."""
        return int(self.cu_segments[-1])

    def to(self, device: torch.device | str) -> VideoBatch:
        """What the model computes with goes to `device`; what plans are made from stays on the CPU."""
        on_device = ("patches_LP", "coords_L3", "timesteps_R", "row_segment_R", "text_SE", "drop_text_G", "native_G4")
        return dataclasses.replace(
            self, **{name: getattr(self, name).to(device, non_blocking=True) for name in on_device}
        )


def owner_of_tokens(cu: Tensor, num_tokens: int) -> Tensor:
    """int64 [num_tokens]: which run of `cu` a token is in; padding counts to the last run."""
    owner = torch.searchsorted(cu.to(torch.int64), torch.arange(num_tokens), right=True) - 1
    return owner.clamp_(0, len(cu) - 2)


def grid_coords(grid: tuple[int, int, int]) -> Tensor:
    """int32 [t*h*w, 3]: the coords of a clip's tokens, time first."""
    axes = [torch.arange(n, dtype=torch.int32) for n in grid]
    return torch.cartesian_prod(*axes).view(-1, 3)

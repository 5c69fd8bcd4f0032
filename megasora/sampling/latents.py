"""Windows of a timeline to latents: what the model is given where a codec is causal in time, and frames back.

A codec encodes the first frame of a clip alone and then groups of `ft` frames, each with the frames before it as
context. So of given frames

- before all free ones, the latents are exact;
- after free ones, the latents depend on frames that do not exist yet. These are first taken to be still, as the nearest
  given frame. A second pass (`sample.refine`) encodes the given frames again, in the context of the frames of the first
  pass, and samples the others once more from the level `sample.refine`;
- that fill a group only in part (a last image, a key frame): the group is given, still, in the first pass, and in the
  second pass sampled from that level like the free ones. Beside whole given groups it is free in both. In the end its
  frames go through the codec once more with the given ones among them, so that these are what the codec makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megasora.data.patches import frames_to_float, frames_to_uint8, pad_frames, patchify, unpatchify
from megasora.sampling.windows import group_of_frames

if TYPE_CHECKING:
    from megasora.codec import Codec


@dataclass(frozen=True)
class WindowFrames:
    """The frames of a window and what is given of them."""

    frames_FHWC: np.ndarray  # uint8; any values at free frames
    level_F: np.ndarray  # float32: start level of each frame, 0: given, 1: free
    is_known_F: np.ndarray  # bool: whether the frame has content
    mask_FHW: np.ndarray | None = None  # bool: pixels that change


@dataclass(frozen=True)
class WindowLatents:
    """What `ClipPrompt` needs of a window."""

    patches_LP: Tensor  # fp32
    grid: tuple[int, int, int]
    start_T: Tensor  # fp32 [T]
    held_L: Tensor | None


class ClipCoder:
    """Frames of clips to patches of the model and back, by a codec. Sides that are no multiples are padded."""

    def __init__(self, codec: Codec, patch: tuple[int, int, int]):
        self.codec, self.patch = codec, patch
        ft, fh, fw = codec.factors
        self.ft = ft * patch[0]  # frames of a latent frame of the grid
        self.token = (fh * patch[1], fw * patch[2])  # rows and columns of pixels of a token

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of tokens of a clip."""
        latent_frames = self.codec.latent_frames(frames)
        return -(-latent_frames // self.patch[0]), -(-height // self.token[0]), -(-width // self.token[1])

    def encode(self, frames_FHWC: np.ndarray) -> Tensor:
        """uint8 [F, H, W, 3] -> patches fp32 [l, P]."""
        frames = pad_frames(frames_to_float(torch.from_numpy(np.ascontiguousarray(frames_FHWC))), self.token)
        return patchify(self.codec.encode(frames), self.patch)[0].float().cpu()

    def decode(self, patches_LP: Tensor, grid: tuple[int, int, int], size: tuple[int, int]) -> np.ndarray:
        """patches [l, P] -> uint8 [F, H, W, 3] of `size`, with all frames of the latents."""
        frames = frames_to_uint8(self.codec.decode(unpatchify(patches_LP.float(), grid, self.patch)).float().cpu())
        return frames[:, : size[0], : size[1]].numpy()


def first_pass(window: WindowFrames, coder: ClipCoder, patch_dim: int) -> WindowLatents:
    """The latents of a window of which only the given frames are known."""
    grid = coder.grid(*window.frames_FHWC.shape[:3])
    known_F = window.is_known_F
    if not known_F.any():
        return WindowLatents(torch.zeros(grid[0] * grid[1] * grid[2], patch_dim), grid, torch.ones(grid[0]), None)
    frames = window.frames_FHWC[nearest_known(known_F)]
    start_T = torch.from_numpy(start_levels(window.level_F, coder.ft, grid[0]))
    return WindowLatents(coder.encode(frames), grid, start_T, held_tokens(window, grid, coder))


def needs_second_pass(window: WindowFrames) -> bool:
    """Whether the latents of given frames depend on free frames."""
    return bool(((window.level_F == 0) & (np.cumsum(~window.is_known_F) > 0)).any())


def second_pass(window: WindowFrames, sampled_FHWC: np.ndarray, coder: ClipCoder, level: float) -> WindowLatents:
    """The latents of a window whose other frames were sampled, with the start level for groups that are not given."""
    frames = np.where((window.level_F == 0)[:, None, None, None], window.frames_FHWC, sampled_FHWC)
    grid = coder.grid(*frames.shape[:3])
    start_T = torch.from_numpy(whole_groups(window.level_F, coder.ft, grid[0]))
    start_T = torch.where(start_T > 0, torch.full_like(start_T, level), start_T)
    return WindowLatents(coder.encode(frames), grid, start_T, held_tokens(window, grid, coder))


def restore_given(window: WindowFrames, sampled_FHWC: np.ndarray, coder: ClipCoder) -> np.ndarray:
    """The sampled frames, where groups that are given in part have been through the codec with their given frames."""
    given_F = window.level_F == 0
    frames, height, width = sampled_FHWC.shape[:3]
    grid, group_F = coder.grid(frames, height, width), group_of_frames(frames, coder.ft)
    has_given = np.zeros(grid[0], bool)
    has_given[group_F[given_F]] = True
    is_partial_F = (has_given & (whole_groups(window.level_F, coder.ft, grid[0]) > 0))[group_F]
    if not is_partial_F.any():
        return sampled_FHWC
    with_given = np.where(given_F[:, None, None, None], window.frames_FHWC, sampled_FHWC)
    decoded = coder.decode(coder.encode(with_given), grid, (height, width))[:frames]
    return np.where(is_partial_F[:, None, None, None], decoded, sampled_FHWC)


def whole_groups(level_F: np.ndarray, ft: int, latent_frames: int) -> np.ndarray:
    """float32 [T]: the highest start level of the frames of each latent frame."""
    levels = np.zeros(latent_frames, np.float32)
    np.maximum.at(levels, group_of_frames(len(level_F), ft), level_F)
    return levels


def start_levels(level_F: np.ndarray, ft: int, latent_frames: int) -> np.ndarray:
    """As `whole_groups`, but groups that are given in part are given if no neighbouring group is given as a whole."""
    levels = whole_groups(level_F, ft, latent_frames)
    group_F = group_of_frames(len(level_F), ft)
    has_given = np.zeros(latent_frames, bool)
    has_given[group_F[level_F == 0]] = True
    is_whole = np.pad(levels == 0, 1)
    beside_whole = is_whole[:-2] | is_whole[2:]
    levels[has_given & ~beside_whole] = 0
    return levels


def nearest_known(known_F: np.ndarray) -> np.ndarray:
    """int64 [F]: the known frame that is nearest to each frame, of two the earlier one."""
    index = np.flatnonzero(known_F)
    return index[np.abs(index[None, :] - np.arange(len(known_F))[:, None]).argmin(axis=1)]


def held_tokens(window: WindowFrames, grid: tuple[int, int, int], coder: ClipCoder) -> Tensor | None:
    """bool [l]: tokens none of whose pixels may change; None without a mask."""
    if window.mask_FHW is None:
        return None
    t, h, w = grid
    ph, pw = coder.token
    frames, height, width = window.mask_FHW.shape
    padded = np.zeros((frames, h * ph, w * pw), bool)
    padded[:, :height, :width] = window.mask_FHW
    by_token = padded.reshape(frames, h, ph, w, pw).any(axis=(2, 4))
    changes = np.zeros((t, h, w), bool)
    np.logical_or.at(changes, group_of_frames(frames, coder.ft), by_token)
    return torch.from_numpy(~changes.reshape(-1))

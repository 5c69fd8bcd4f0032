"""Rectified flow (arXiv 2209.03003; SD3, 2403.03206): the model predicts the velocity noise - x of
x_t = (1 - t) x + t noise, with the timestep t in [0, 1].

Some latent frames of a clip may stay clean: they are rows at t = 0, which the other frames attend to and which have no
loss. They are drawn at random from the start of training, so that one model accepts text, image and video prompts.

All random numbers are keyed by (seed, step, sample id), so they do not depend on which rank has a clip.

What is drawn is drawn on the CPU, before the step: `draw` gives rows, timesteps and keys. Values of tokens are computed
from those of rows where the pack is: `Noise.add`.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megasora.batch import VideoBatch, segment_ids
from megasora.config import FrameConditioningConfig, ObjectiveConfig
from megasora.diffusion import timesteps
from megasora.diffusion.noise import clip_keys
from megasora.random_numbers import normal, uniform

NOISE, TIMESTEP, CAPTION, CONDITIONING, CONDITIONING_LENGTH = range(5)  # random streams
VALIDATION_STEP, SAMPLING_STEP = -1, -2  # used in keys instead of the training step


@dataclass(frozen=True)
class LossSum:
    """Sums over the noised tokens of one pack; divide by the noised tokens of all packs of a step, on all ranks."""

    squared_error_sum: Tensor  # scalar with gradient: mean over a token's features, summed over tokens
    squared_error_L: Tensor  # [L], detached: mean over each token's features; 0 at clean tokens and padding
    weight_L: Tensor  # 1 at noised tokens, else 0

    @property
    def tokens(self) -> Tensor:
        """int64, scalar: noised tokens."""
        return self.weight_L.sum(dtype=torch.int64)


@dataclass(frozen=True)
class Noise:
    """The noise of a pack with its rows: drawn, but for the values of its tokens. Computed on the CPU, may be moved."""

    keys_R: Tensor  # int64: of the clip of each row
    weight_R: Tensor  # fp32: loss weight of the tokens of each row, 1 if they are noised, else 0
    row_starts: Tensor  # int32 [R + 1]: cu_rows of the pack
    positions_L: Tensor  # int64: positions_L of the pack
    num_real: int  # tokens of the pack without its padding
    num_noised: int  # tokens with weight 1

    def add(self, batch: VideoBatch) -> tuple[VideoBatch, Tensor, Tensor]:
        """(noised batch, target velocity noise - x [L, P], loss weight [L]) of the clean batch with its rows that this
        was drawn for, on the device of both. The host waits for nothing."""
        length, dim = batch.patches_LP.shape
        row_L = segment_ids(self.row_starts, length)
        noise_LP = normal(self.keys_R[row_L], self.positions_L * round_up_to_even(dim), dim)
        is_real_L = torch.arange(length, device=row_L.device) < self.num_real
        t_L1, x_LP = batch.timesteps_R[row_L][:, None], batch.patches_LP.float()
        noised = dataclasses.replace(batch, patches_LP=(1 - t_L1) * x_LP + t_L1 * noise_LP)
        return noised, noise_LP - x_LP, self.weight_R[row_L] * is_real_L


class FlowMatching:
    """The training objective: `batch, noise = draw(batch, step)`, `noised, target, weight = noise.add(batch)`, then
    `velocity_error(model(noised), target, weight)`.

    `batch` is a clean pack or a rank's share of one: noise, timestep and weight of a token depend only on its clip and
    its position in the clip.
    """

    def __init__(self, config: ObjectiveConfig, seed: int):
        self.config, self.seed = config, seed

    def draw(self, batch: VideoBatch, step: int) -> tuple[VideoBatch, Noise]:
        """A clean batch on the CPU, with the rows of step `step` and hidden captions; and its noise."""
        t_G, clean, drop_text_G = self.draw_clips(batch, step)
        keys_G = clip_keys(self.seed, step, batch.sample_ids_G, NOISE)
        return draw_rows(batch, t_G, clean, keys_G, drop_text_G)

    def add_noise(self, batch: VideoBatch, step: int) -> tuple[VideoBatch, Tensor, Tensor]:
        """(noised batch with its rows, target velocity [L, P], loss weight [L]) of a clean batch on the CPU."""
        batch, noise = self.draw(batch, step)
        return noise.add(batch)

    def draw_clips(self, batch: VideoBatch, step: int) -> tuple[Tensor, list[tuple[int, int]], Tensor]:
        """Per clip: timestep [G], number of clean latent frames (head, tail), whether the caption is hidden [G]."""
        c, ids = self.config, batch.sample_ids_G
        u = {stream: uniform(clip_keys(self.seed, step, ids, stream)) for stream in range(1, 5)}
        t_G = timesteps.logit_normal(u[TIMESTEP], c.logit_mean, c.logit_std)
        t_G = timesteps.shift(t_G, timesteps.shift_factor(batch.grids_G3.prod(1), c))
        clean = [
            draw_clean_frames(int(grid[0]), float(kind), float(length), c.frame_conditioning)
            for grid, kind, length in zip(batch.grids_G3, u[CONDITIONING], u[CONDITIONING_LENGTH], strict=True)
        ]
        return t_G, clean, u[CAPTION] < c.caption_dropout

    def draw_at(self, batch: VideoBatch, t: float, stream: int) -> tuple[VideoBatch, Noise]:
        """As `draw`, for validation: all frames of all clips at timestep `t` in [0, 1], no caption hidden.

        The noise is the same at each call; `stream` is its random stream. The rows are the segments.
        """
        keys_G = clip_keys(self.seed, VALIDATION_STEP, batch.sample_ids_G, stream)
        t_G, drop_text_G = torch.full((batch.num_segments,), t), torch.zeros(batch.num_segments, dtype=torch.bool)
        return draw_rows(batch, t_G, [(0, 0)] * batch.num_segments, keys_G, drop_text_G)


def draw_rows(
    batch: VideoBatch, t_G: Tensor, clean: list[tuple[int, int]], keys_G: Tensor, drop_text_G: Tensor
) -> tuple[VideoBatch, Noise]:
    """The rows and the noise of clips at timesteps `t_G`, except `clean[i] = (head, tail)` latent frames at their
    ends. `keys_G`: of their noise. All on the CPU."""
    cu_rows, timesteps_R, segment_R = build_rows(batch, t_G, clean)
    is_clip_R = batch.sample_ids_G[segment_R] >= 0  # negative: in place of a clip that could not be read
    is_noised_R = (timesteps_R > 0) & is_clip_R
    with_rows = dataclasses.replace(
        batch,
        cu_rows=cu_rows,
        timesteps_R=timesteps_R.float(),
        row_segment_R=segment_R,
        drop_text_G=batch.drop_text_G | drop_text_G,
        plan=None,
    )
    num_noised = int(cu_rows.diff()[is_noised_R].sum())
    weight_R = is_noised_R.float()
    return with_rows, Noise(keys_G[segment_R], weight_R, cu_rows, batch.positions_L, batch.num_tokens, num_noised)


def round_up_to_even(dim: int) -> int:
    """Elements of the noise stream per token: `normal` needs an even number."""
    return dim + dim % 2


def build_rows(batch: VideoBatch, t_G: Tensor, clean: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of clips of which `clean[i] = (head, tail)` latent frames are at timestep 0, those between at `t_G[i]`.

    Returns what `split_into_rows` returns.
    """
    runs = [
        [(head, 0.0), (t - tail, timestep), (t, 0.0)]
        for (head, tail), t, timestep in zip(clean, batch.grids_G3[:, 0].tolist(), t_G.tolist(), strict=True)
    ]
    return split_into_rows(batch, runs)


def split_into_rows(batch: VideoBatch, runs: list[list[tuple[int, float]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Splits clips into rows. `runs` of a clip: (latent frame after the run, timestep of its frames), in order.

    Returns cu_rows int32 [R + 1], timesteps float64 [R] and the segment of each row [R]. A share has only some tokens
    of a clip: its rows cover these, and a row without tokens is left out.
    """
    cu, timesteps_R, segment_R = [0], [], []
    positions = batch.positions_L[: batch.num_tokens].split(batch.cu_segments.diff().tolist())
    for i, ((_, h, w), runs_of_clip) in enumerate(zip(batch.grids_G3.tolist(), runs, strict=True)):
        bounds = torch.tensor([0, *(stop * h * w for stop, _ in runs_of_clip)])
        offsets = torch.searchsorted(positions[i], bounds).tolist()
        for start, stop, (_, timestep) in zip(offsets, offsets[1:], runs_of_clip, strict=False):
            if stop > start:
                cu.append(cu[-1] + stop - start)
                timesteps_R.append(timestep)
                segment_R.append(i)
    if not segment_R:  # a share with padding only still has a row, so that no tensor is empty
        cu, timesteps_R, segment_R = [0, 0], [0.0], [0]
    return (
        torch.tensor(cu, dtype=torch.int32),
        torch.tensor(timesteps_R, dtype=torch.float64),
        torch.tensor(segment_R),
    )


def draw_clean_frames(frames: int, kind_u: float, length_u: float, config: FrameConditioningConfig) -> tuple[int, int]:
    """Number of clean latent frames at the head and at the tail of a clip of `frames`; at least one frame stays noised.

    `kind_u`, `length_u`: uniform random numbers in (0, 1).
    """
    weights = {kind: weight for kind, weight in dataclasses.asdict(config).items() if weight > 0}
    if frames == 2:  # both ends clean: no frame would stay noised
        weights.pop("both", None)
    if frames == 1:
        return 0, 0
    bounds = list(accumulate(weights.values()))
    if not bounds:
        return 0, 0
    kind = list(weights)[min(bisect_right(bounds, kind_u * bounds[-1]), len(bounds) - 1)]
    k = 1 + int(length_u * (frames - 1))  # 1 .. frames - 1
    if kind == "both":
        k = 2 + int(length_u * (frames - 2))  # 2 .. frames - 1
        return k - k // 2, k // 2
    return {"none": (0, 0), "first": (1, 0), "last": (0, 1), "head": (k, 0), "tail": (0, k)}[kind]


def velocity_error(prediction_LP: Tensor, target_LP: Tensor, weight_L: Tensor) -> LossSum:
    """The squared error of the predicted velocity; `target_LP` and `weight_L` from `Noise.add`."""
    squared_error_L = (prediction_LP - target_LP).square().mean(-1) * weight_L
    return LossSum(squared_error_L.sum(), squared_error_L.detach(), weight_L)


def non_finite_clips(batch: VideoBatch, squared_error_L: Tensor) -> list[int]:
    """The sample ids of the clips of a pack or share that have a token whose error is not finite."""
    tokens = torch.nonzero(~torch.isfinite(squared_error_L.cpu())).view(-1)
    segments = torch.unique(segment_ids(batch.cu_segments, len(squared_error_L))[tokens])
    return [i for i in batch.sample_ids_G[segments].tolist() if i >= 0]  # negative: a placeholder, see draw_rows

"""Rectified flow (arXiv 2209.03003; SD3, 2403.03206): learn the velocity of the line x_t = (1 - t) x + t noise.

Some latent frames of a clip may be given clean: they are rows at t = 0, seen by the others and without loss. Drawn at
random from the start of training, they make one model answer text, image and video prompts.

Everything random is keyed by (seed, step, sample id): the rank that holds a clip does not matter.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megasora.batch import VideoBatch, owner_of_tokens
from megasora.config import ConditionConfig, ObjectiveConfig
from megasora.diffusion import noise, timesteps

NOISE, TIMESTEP, CAPTION, CONDITION, CONDITION_LENGTH = range(5)  # streams of random numbers
VALIDATION_STEP, SAMPLING_STEP = -1, -2  # stand where the training step stands in a key


@dataclass(frozen=True)
class LossSum:
    """Sums over the real, noised tokens of one pack; divide once, by the tokens of all packs and ranks."""

    error: Tensor  # scalar with gradient: mean square over a token's numbers, summed over tokens
    tokens: int
    error_L: Tensor  # [L], detached; 0 at clean tokens and padding


class FlowMatching:
    """`noised, target, weight = corrupt(batch, step)`, then `velocity_error(model(noised), target, weight)`.

    `batch` is a clean pack or a rank's share of one: what a token gets follows from its clip and its place in it.
    """

    def __init__(self, config: ObjectiveConfig, seed: int):
        self.config, self.seed = config, seed

    def corrupt(self, batch: VideoBatch, step: int) -> tuple[VideoBatch, Tensor, Tensor]:
        """A clean pack to (noised pack with its rows, target [L, P], weight [L])."""
        t_G, clean, drop_text_G = self.draw(batch, step)
        keys_G = noise.clip_keys(self.seed, step, batch.sample_ids_G, NOISE)
        return noise_batch(batch, t_G, clean, keys_G, drop_text_G)

    def draw(self, batch: VideoBatch, step: int) -> tuple[Tensor, list[tuple[int, int]], Tensor]:
        """Per clip: noise level [G], clean latent frames (head, tail), whether the caption is hidden [G]."""
        c, ids = self.config, batch.sample_ids_G
        u = {stream: noise.uniform(noise.clip_keys(self.seed, step, ids, stream)) for stream in range(1, 5)}
        t_G = timesteps.logit_normal(u[TIMESTEP], c.timestep_mean, c.timestep_std)
        t_G = timesteps.shift(t_G, timesteps.shift_factor(batch.grids_G3.prod(1), c))
        clean = [
            draw_condition(int(grid[0]), float(kind), float(length), c.condition)
            for grid, kind, length in zip(batch.grids_G3, u[CONDITION], u[CONDITION_LENGTH], strict=True)
        ]
        return t_G, clean, u[CAPTION] < c.caption_dropout

    def at_level(self, batch: VideoBatch, t: float, stream: int) -> tuple[VideoBatch, Tensor, Tensor]:
        """Every clip wholly noised to `t`, caption shown, with noise that is the same at every call: for validation."""
        keys_G = noise.clip_keys(self.seed, VALIDATION_STEP, batch.sample_ids_G, stream)
        shown = torch.zeros(batch.num_segments, dtype=torch.bool)
        return noise_batch(batch, torch.full((batch.num_segments,), t), [(0, 0)] * batch.num_segments, keys_G, shown)


def noise_batch(
    batch: VideoBatch, t_G: Tensor, clean: list[tuple[int, int]], keys_G: Tensor, drop_text_G: Tensor
) -> tuple[VideoBatch, Tensor, Tensor]:
    """Puts each clip at its noise level, but for `clean[i] = (head, tail)` latent frames at its ends.

    Returns the noised pack, the target velocity noise - x [L, P], and the weight [L]: 1 where there is a loss.
    """
    device, length = batch.patches_LP.device, len(batch.patches_LP)
    cu_rows, t_rows, owner = rows_of(batch, t_G, clean)
    segment_L = owner_of_tokens(batch.cu_segments, length)
    first_L = batch.places_L * even(batch.patches_LP.shape[1])
    noise_LP = noise.normal(keys_G[segment_L].to(device), first_L.to(device), batch.patches_LP.shape[1])
    t_L = t_rows[owner_of_tokens(cu_rows, length)]
    is_clip_L = batch.sample_ids_G[segment_L] >= 0  # what stands for clips that could not be read is none
    weight_L = (t_L > 0) & (torch.arange(length) < batch.num_tokens) & is_clip_L
    t_L1 = t_L[:, None].float().to(device)
    x_LP = batch.patches_LP.float()
    noised = dataclasses.replace(
        batch,
        patches_LP=(1 - t_L1) * x_LP + t_L1 * noise_LP,
        cu_rows=cu_rows,
        timesteps_R=t_rows.float().to(device),
        row_segment_R=owner.to(device),
        drop_text_G=batch.drop_text_G | drop_text_G.to(device),
    )
    return noised, noise_LP - x_LP, weight_L.float().to(device)


def even(dim: int) -> int:
    return dim + dim % 2


def rows_of(batch: VideoBatch, t_G: Tensor, clean: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a pack whose clips have `clean[i] = (head, tail)` clean latent frames: (cu_rows, timesteps, segment).

    Of a clip of which only some tokens are here, rows have what is here of them; a row without any is left out.
    """
    cu, levels, owner = [0], [], []
    segments = batch.places_L[: batch.num_tokens].split(batch.cu_segments.diff().tolist())
    for i, ((t, h, w), (head, tail)) in enumerate(zip(batch.grids_G3.tolist(), clean, strict=True)):
        bounds = torch.tensor([0, head * h * w, (t - tail) * h * w, t * h * w])
        here = torch.searchsorted(segments[i], bounds).tolist()
        for first, end, level in zip(here, here[1:], (0.0, float(t_G[i]), 0.0), strict=False):
            if end > first:
                cu.append(cu[-1] + end - first)
                levels.append(level)
                owner.append(i)
    if not owner:  # a share without a real token still has a row, which keeps every shape alive
        cu, levels, owner = [0, 0], [0.0], [0]
    return torch.tensor(cu, dtype=torch.int32), torch.tensor(levels, dtype=torch.float64), torch.tensor(owner)


def draw_condition(frames: int, kind_u: float, length_u: float, config: ConditionConfig) -> tuple[int, int]:
    """Clean latent frames (at the head, at the tail) of a clip of `frames`; at least one stays noised."""
    weights = {kind: weight for kind, weight in dataclasses.asdict(config).items() if weight > 0}
    if frames == 2:  # one clean end is all that fits
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
    error_L = (prediction_LP - target_LP).square().mean(-1) * weight_L
    return LossSum(error_L.sum(), int(weight_L.sum()), error_L.detach())

"""Classifier-free guidance: one velocity from predictions with and without the conditions of a clip.

A clip has two conditions, its caption and its clean frames. Each `Branch` is a prediction with some of them:

    FULL: v_ct, caption and clean frames      CONTEXT: v_c, clean frames only      FREE: v_0, neither

    v = v_0 + c (v_c - v_0) + g (v_ct - v_c)        c: context_guidance_scale, g: guidance_scale

(arXiv 2207.12598; with two conditions InstructPix2Pix, 2211.09800, eq. 3.) Without a caption means with the negative
caption, if there is one. A branch is computed only if its factor, 1 - c, c - g or g, is not 0: with c = 1 the two of
text guidance, with c = g = 1 only FULL. Tokens at a timestep outside guidance_interval have c = g = 1
(arXiv 2404.07724). guidance_rescale = r then gives each clip a standard deviation closer to that of v_ct
(arXiv 2305.08891, eq. 15, 16), where std is over the features of its noised tokens:

    v' = v (1 - r + r std(v_ct) / std(v))

A solver calls this at each evaluation of the velocity, with timesteps t [L, 1] of the tokens of a pack:

    guidance = Guidance(sample)
    branches = guidance.branches(t_L1)              # one to three, FULL first
    velocities = denoise([batch_of(branch, x_LP, t_L1) for branch in branches])
    v_LP = guidance.combine(dict(zip(branches, velocities)), t_L1, segment_L, is_noised_L)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megasora.config import SampleConfig


class Branch(NamedTuple):
    """Which conditions of the clips the model sees."""

    caption: bool
    clean_frames: bool


FULL, CONTEXT, FREE = Branch(True, True), Branch(False, True), Branch(False, False)


class Guidance:
    """Guidance with the settings of `sample`. `has_context`: whether any clip of the pack has clean frames; without,
    v_c = v_0 and FREE is not computed."""

    def __init__(self, sample: SampleConfig, has_context: bool = True):
        scale, context_scale = sample.guidance_scale, sample.context_guidance_scale if has_context else 1.0
        factors = {FULL: scale, CONTEXT: context_scale - scale, FREE: 1 - context_scale}
        self.factors = {branch: factor for branch, factor in factors.items() if factor != 0}
        self.interval = tuple(sample.guidance_interval)
        self.rescale = sample.guidance_rescale if self.is_guided else 0.0

    @property
    def is_guided(self) -> bool:
        """Whether the velocity is another than v_ct at any timestep."""
        return self.factors.keys() != {FULL}

    def branches(self, t_L1: Tensor) -> tuple[Branch, ...]:
        """The branches that `combine` needs at timesteps `t_L1`; tokens at 0 do not count."""
        needed = set()
        is_guided_L1 = self.is_inside(t_L1)
        if bool(is_guided_L1.any()):
            needed |= self.factors.keys()
        if self.rescale or bool((~is_guided_L1 & (t_L1 > 0)).any()) or not needed:
            needed.add(FULL)
        return tuple(branch for branch in (FULL, CONTEXT, FREE) if branch in needed)

    def is_inside(self, t_L1: Tensor) -> Tensor:
        """bool: whether each token is noised and its timestep in the interval, whose ends belong to it."""
        low, high = self.interval
        return (t_L1 > 0) & (t_L1 >= low) & (t_L1 <= high)

    def combine(
        self, velocities: Mapping[Branch, Tensor], t_L1: Tensor, segment_L: Tensor, is_noised_L: Tensor
    ) -> Tensor:
        """The guided velocity [L, P] from those of `branches(t_L1)`; undefined at clean tokens and padding.

        `segment_L`: the clip of each token, not decreasing. `is_noised_L`: the tokens that count in the std of a clip.
        """
        if velocities.keys() == {FULL}:
            return velocities[FULL]
        v_LP = weighted_sum(velocities, self.factors)
        if self.rescale:
            std_full_L1, std_L1 = (
                segment_std(v, segment_L.to(v.device), is_noised_L.to(v.device)) for v in (velocities[FULL], v_LP)
            )
            ratio_L1 = torch.where(std_L1 > 0, std_full_L1 / std_L1, 1.0).to(v_LP.dtype)
            v_LP = v_LP * (1 - self.rescale + self.rescale * ratio_L1)
        return torch.where(self.is_inside(t_L1), v_LP, velocities[FULL]) if FULL in velocities else v_LP


def weighted_sum(velocities: Mapping[Branch, Tensor], factors: Mapping[Branch, float]) -> Tensor:
    """The sum of factor x velocity, for factors that add up to 1: one velocity, and differences to it."""
    used = [branch for branch in (FREE, CONTEXT, FULL) if branch in factors]
    first = velocities[used[0]]
    v_LP = first
    for branch in used[1:]:
        v_LP = v_LP + factors[branch] * (velocities[branch] - first)
    return v_LP


def segment_std(v_LP: Tensor, segment_L: Tensor, is_counted_L: Tensor) -> Tensor:
    """float64 [L, 1]: of each token, the standard deviation over the features of all counted tokens of its segment.

    The sums are in a fixed order, so that a sample repeats bit for bit on a GPU.
    """
    lengths_G = torch.bincount(segment_L)
    counted_LP = torch.where(is_counted_L[:, None], v_LP.double(), 0.0)  # v is undefined at padding

    def sum_segments(x_L: Tensor) -> Tensor:
        return torch.segment_reduce(x_L, "sum", lengths=lengths_G, initial=0.0, unsafe=True)[segment_L]

    count_L = sum_segments(is_counted_L.double()) * v_LP.shape[1]
    mean_L = sum_segments(counted_LP.sum(1)) / count_L
    deviation_LP = torch.where(is_counted_L[:, None], counted_LP - mean_L[:, None], 0.0)
    return (sum_segments(deviation_LP.square().sum(1)) / count_L).sqrt()[:, None]

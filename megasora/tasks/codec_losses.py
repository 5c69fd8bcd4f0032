"""The loss of a step of a codec training, as sums that add up over frames, packs and ranks.

loss = sum over frames of (pixels of the frame / pixels of the step) x its terms (megasora/codec/vae/losses.py)
     + penalty of the latents / latents of the step
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megasora.codec.vae.losses import frame_terms, reconstruction_loss
from megasora.codec.vae.lpips import LPIPS
from megasora.config import Config, ReconstructionConfig
from megasora.tasks.codec_adversarial import Adversary
from megasora.tasks.codec_work import StackOutput, StackWork

Number = TypeVar("Number", float, Tensor)
TERMS = ("l1", "mse", "gradient", "ssim", "psnr", "lpips", "kl", "commitment", "adversarial", "discriminator")
NOT_IN_LOSS = ("psnr", "adversarial", "discriminator")
PENALTIES = {"kl": "kl", "vq": "commitment"}  # kind of the latents: term of its penalty; fsq has none


@dataclass(frozen=True)
class StepCounts:
    """Over all ranks."""

    pixels: int  # without padding
    latents: int


class StepLosses:
    """The loss function of a step: called with the outputs of each pack, it adds up the terms.

    `sums`: this rank's part of each mean term of the step, fp64. `code_counts`: see `Latents`.
    """

    def __init__(
        self,
        packs: list[list[StackWork]],
        counts: StepCounts,
        config: Config,
        lpips: LPIPS | None = None,
        adversary: Adversary | None = None,
    ):
        """`adversary`: None in steps without an adversarial term."""
        self.packs, self.counts, self.weights, self.lpips = packs, counts, config.reconstruction, lpips
        self.adversary = adversary
        self.penalty = PENALTIES.get(config.vae.kind)
        names = (
            ["l1", "mse", "gradient", "ssim", "psnr"] + ["lpips"] * bool(lpips) + [self.penalty] * bool(self.penalty)
        )
        device = packs[0][0].frames.device
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
        self.code_counts: Tensor | None = None
        self.losses: list[tuple[list[int], Tensor]] = []  # sample ids, and the loss of each clip of the stack

    def __call__(self, outputs: list[StackOutput], index: int) -> Tensor:
        """This rank's summand of the loss of the step, with gradient. `index`: of the pack in the step."""
        if self.adversary:  # gradients at the frames are taken without the hooks that DeepSpeed has on them
            outputs = [output._replace(frames=output.frames.view_as(output.frames)) for output in outputs]
        total = torch.zeros((), device=outputs[0].frames.device)
        for output, work in zip(outputs, self.packs[index], strict=True):
            total = total + self.stack_loss(output, work)
        return self.adversary.add_loss(total, outputs, self.packs[index], index) if self.adversary else total

    def stack_loss(self, output: StackOutput, work: StackWork) -> Tensor:
        if work.is_filler:
            return 0.0 * (output.frames.float().sum() + output.penalty_sum)  # the same graph as that of a loss
        frames = work.output(output.frames)
        loss = 0.0 * frames.float().sum() if frames.shape[2] == 0 else self.frames_loss(frames, work)
        if self.penalty:
            penalty = output.penalty_sum / self.counts.latents
            loss = loss + getattr(self.weights, self.penalty) * penalty
            self.sums[self.penalty] += penalty.detach()
        if output.counts is not None:
            self.code_counts = output.counts if self.code_counts is None else self.code_counts + output.counts
        return loss

    def frames_loss(self, frames: Tensor, work: StackWork) -> Tensor:
        terms = frame_terms(frames, work.target, self.lpips)  # [B, T] each
        share = frames.shape[3] * frames.shape[4] / self.counts.pixels
        loss_BT = reconstruction_loss(terms, self.weights)
        for name, values in terms.items():
            self.sums[name] += values.detach().sum(dtype=torch.float64) * share
        self.losses.append((work.sample_ids, loss_BT.detach().sum(1)))
        return loss_BT.sum() * share

    def non_finite_clips(self) -> list[int]:
        """The sample ids of this rank's clips whose loss is not finite."""
        pairs = [pair for sample_ids, loss_B in self.losses for pair in zip(sample_ids, loss_B.tolist(), strict=True)]
        return sorted({sample_id for sample_id, loss in pairs if not math.isfinite(loss)})


def total_loss(terms: Mapping[str, Number], weights: ReconstructionConfig) -> Number:
    """The loss of a step or of a validation from its mean terms, without those of the discriminator."""
    return sum(
        getattr(weights, name) * (1 - terms[name] if name == "ssim" else terms[name])
        for name in TERMS
        if name in terms and name not in NOT_IN_LOSS
    )

"""The adversarial part of a codec training: a discriminator in a ZeroEngine of its own.

    network   adds weight x adaptive weight x generator_loss(discriminator(its output)) to its loss
    then      the discriminator learns to tell these outputs from the clips

It begins at step reconstruction.adversarial.start_step. All logits of a step have the same weight, whatever the layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megasora.codec.vae.boundary import Boundary
from megasora.codec.vae.discriminator import Discriminator, adaptive_weight, discriminator_loss, generator_loss
from megasora.codec.vae.network import init_weights
from megasora.config import Config
from megasora.fragment import Fragment
from megasora.optim.update import Update
from megasora.parallel.collectives import all_reduce_sum
from megasora.parallel.mesh import Mesh
from megasora.parallel.world import World
from megasora.parallel.zero import ZeroEngine
from megasora.placement import Placement
from megasora.tasks.codec_model import standard_normal
from megasora.tasks.codec_work import StackOutput, StackWork

PREFIX = "discriminator."  # of its weights in a checkpoint


class Pair(NamedTuple):
    """A stack of clips as it is, and as the network has reconstructed it; `share`: of a logit, 0 for a filler."""

    real: Tensor  # [b, 3, t, h, W]
    fake: Tensor
    boundary: Boundary
    share: float


class PackDiscriminator(nn.Module):
    """The logits of clips and of their reconstructions, for each stack of a pack."""

    def __init__(self, discriminator: Discriminator):
        super().__init__()
        self.blocks, self.conv_out = discriminator.blocks, discriminator.conv_out
        self.logits = partial(type(discriminator).forward, self)

    def forward(self, pack: list[Pair]) -> list[tuple[Tensor, Tensor]]:
        return [self.logits(torch.cat([p.real, p.fake]), p.boundary).chunk(2) for p in pack]


class Adversary:
    """The discriminator of a run, as one rank sees it. Call `begin_step` on all ranks at the start of each step."""

    def __init__(self, config: Config, world: World, mesh: Mesh, dtype: torch.dtype):
        self.settings, self.mesh, self.device = config.reconstruction.adversarial, mesh, world.device
        discriminator = Discriminator(self.settings, config.codec.factors, config.vae.time)
        init_weights(discriminator, lambda name, shape: standard_normal(config.run.seed, PREFIX + name, shape))
        self.frame_stride = 1
        for block in discriminator.blocks:
            self.frame_stride *= block.stride[0]
        self.model = PackDiscriminator(discriminator)
        placements = {name: Placement() for name, _ in self.model.named_parameters()}
        decays = lambda name, parameter: parameter.ndim > 1  # noqa: E731
        self.engine = ZeroEngine({0: self.model}, placements, decays, config, world, mesh, dtype)
        self.updates = torch.zeros(1, device=world.device)  # optimizer steps so far; saved with the weights

    def is_active(self, step: int) -> bool:
        """`step` counts from 0."""
        return step + 1 >= self.settings.start_step

    def begin_step(self, packs: list[list[StackWork]]) -> None:
        """Counts the logits of the step, over all ranks."""
        local = sum(self.num_logits(work) for pack in packs for work in pack if not work.is_filler)
        counted = torch.tensor(local, device=self.device)
        self.total_logits = int(all_reduce_sum(counted, self.mesh.data_context))
        self.pairs: list[list[Pair]] = [[] for _ in packs]
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        self.sums = {"adversarial": zero, "discriminator": zero.clone()}

    def num_logits(self, work: StackWork) -> int:
        b, _, t, h, w = work.frames.shape
        first = int(work.boundary.starts_clip)
        return (
            b * (first + (t - first) // self.frame_stride) * (h >> self.settings.layers) * (w >> self.settings.layers)
        )

    def add_loss(self, loss: Tensor, outputs: list[StackOutput], works: list[StackWork], index: int) -> Tensor:
        """The loss of a pack, computed from `outputs`, with the adversarial term. `index`: of the pack in the step."""
        total = torch.zeros((), device=loss.device)
        self.model.requires_grad_(False)
        for output, work in zip(outputs, works, strict=True):
            share = 0.0 if work.is_filler else 1.0 / self.total_logits
            self.pairs[index].append(Pair(work.frames, output.frames.detach(), work.boundary, share))
            logits = self.model.logits(output.frames, work.boundary).float()
            total = total + share * (generator_loss(logits) * logits[0, 0, 0].numel()).sum()
        self.model.requires_grad_(True)
        frames = [output.frames for output in outputs]
        weight = adaptive_weight(loss, total, frames, partial(all_reduce_sum, axis=self.mesh.context))
        self.sums["adversarial"] += total.detach()
        return loss + self.settings.weight * weight * total

    def forward_backward(self, lap: Callable[[str], None]) -> Tensor:
        """Gradients of the discriminator, from the clips of `add_loss`; returns their global norm."""
        return self.engine.forward_backward(self.pairs, self.loss, lap)

    def loss(self, logits: list[tuple[Tensor, Tensor]], index: int) -> Tensor:
        total = torch.zeros((), device=self.device)
        for (real, fake), pair in zip(logits, self.pairs[index], strict=True):
            values_BT = discriminator_loss(real.float(), fake.float()) * real[0, 0, 0].numel()
            total = total + pair.share * values_BT.sum()
        self.sums["discriminator"] += total.detach()
        return total

    def optimizer_step(self, update: Update) -> None:
        self.engine.optimizer_step(update._replace(number=int(self.updates)))
        self.updates += 1

    def fragments(self) -> list[Fragment]:
        return [dataclasses.replace(f, name=PREFIX + f.name) for f in self.engine.fragments()]

    def sync_after_load(self) -> None:
        self.engine.sync_after_load(int(self.updates))

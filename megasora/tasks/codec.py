"""Training of a codec: a video autoencoder that reconstructs clips.

    ClipBatch  --build_pack-->  frames in [-1, 1], noise, targets  --forward_backward-->  losses, gradients
               --optimizer_step-->  step of AdamW or Muon, codebook

Crops and noise are keyed by (seed, step or epoch, sample id), and the loss is one sum over the pixels of all ranks,
divided once by their number. So neither the layout nor a resume changes a run, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.codec.vae.codebook import CodeStatistics
from megasora.codec.vae.folder import find_codec_folder, read_manifest
from megasora.codec.vae.lpips import load_lpips
from megasora.codec.vae.quantizers import perplexity
from megasora.config import Config
from megasora.data.clip_loader import ClipBatch, ClipLoader
from megasora.data.decoded_clips import DecodedClips
from megasora.diffusion.noise import clip_keys
from megasora.fragment import Fragment
from megasora.ingest.listing import listing_hash
from megasora.ingest.sources import find_clips
from megasora.optim.update import Update
from megasora.parallel.collectives import all_reduce_min, all_reduce_sum
from megasora.parallel.mesh import Mesh
from megasora.parallel.replica_check import check_replicas
from megasora.parallel.world import World
from megasora.parallel.zero import ADAM_MOMENTS, ZeroEngine
from megasora.parallelize import compute_dtype, muon_rule
from megasora.parallelize_codec import ContextParallelCodec
from megasora.placement import Placement
from megasora.random_numbers import normal
from megasora.tasks.codec_adversarial import PREFIX, Adversary
from megasora.tasks.codec_export import export_codec, is_exported
from megasora.tasks.codec_losses import TERMS, StepCounts, StepLosses, total_loss
from megasora.tasks.codec_model import build_network
from megasora.tasks.codec_validation import CodecValidation
from megasora.tasks.codec_work import PackReconstruction, StackWork, WorkBuilder
from megasora.tasks.task import StepMetrics, StepOutput

LAYOUT_AXES = ("data", "context")
NOISE = 16  # stream of random numbers, see clip_keys


class CodecTask:
    """Implements `megasora.tasks.task.Task` for codec.name=vae."""

    defers = False  # codebook and discriminator take part in an update

    def __init__(self, config: Config, world: World, mesh: Mesh):
        self.config, self.world, self.mesh = config, world, mesh
        clips = list(enumerate(find_clips(Path(config.data.clips)).clips))
        self.train_clips, self.val_clips = ([p for p in clips if p[1].split == split] for split in ("train", "val"))
        network, dtype = build_network(config), compute_dtype(config, world.device)
        context = ContextParallelCodec(mesh, network.factors)
        self.work = WorkBuilder(context, network.channels, dtype, world.device)
        self.model = PackReconstruction(network, config.reconstruction.train == "all")
        placements = {name: Placement() for name, _ in self.model.named_parameters()}
        muon = muon_rule(config, num_matrices)
        self.engine = ZeroEngine({0: self.model}, placements, uses_weight_decay, config, world, mesh, dtype, muon=muon)
        self.codebook = getattr(self.model.quantizer, "codebook", None) if self.model.trains_encoder else None
        self.buffers = dict(self.model.named_buffers()) if self.codebook is not None else {}
        self.adversary = None
        if config.reconstruction.adversarial.weight:
            self.adversary = Adversary(config, world, mesh, dtype)
            self.buffers[f"{PREFIX}updates"] = self.adversary.updates
        self.statistics: CodeStatistics | None = None  # of the codebook, of the present step
        self.lpips = None
        if config.reconstruction.lpips:
            self.lpips = load_lpips(config.reconstruction.lpips_path).to(world.device)
        self.validation = CodecValidation(self.val_clips, config, self.work, self.engine, self.lpips, mesh, world)
        self.num_parameters = self.engine.count_parameters()
        self.reports_packs = mesh.context.rank == 0  # one of the ranks that share its packs
        self.cursor, self.step = 0, 0  # clips and steps so far

    def run_info(self) -> dict[str, Any]:
        return {
            "task": "codec",
            "layout": {name: self.mesh.axis(name).size for name in LAYOUT_AXES},
            "clips": len(self.train_clips),
            "validation_clips": len(self.val_clips),
            "clips_per_step": self.clips_per_step,
        }

    @property
    def clips_per_step(self) -> int:
        return self.config.data.clips_per_pack * self.config.data.packs_per_step

    # ------------------------------------------------------------------ checkpoints

    def fragments(self) -> list[Fragment]:
        """Of the trained parameters, and the buffers of a codebook, which have no moments."""
        fragments = self.engine.fragments() + (self.adversary.fragments() if self.adversary else [])
        for name, buffer in self.buffers.items():
            flat = buffer.view(-1)
            values = {"weights": flat, **{kind: torch.zeros_like(flat) for kind in ADAM_MOMENTS}}
            fragments.append(Fragment(name, buffer.shape, Placement(), 0, 1, 0, values))
        return fragments

    def replicas(self, fragment: Fragment) -> tuple[int, int]:
        return (self.world.rank, self.world.size) if fragment.name in self.buffers else (0, 1)

    def state_dict(self) -> dict[str, Any]:
        clips = [clip for _, clip in self.train_clips]
        data = {"clips": len(clips), "listing": listing_hash(clips)}
        if self.config.reconstruction.train == "decoder":
            data["encoder"] = read_manifest(find_codec_folder(Path(self.config.codec.path))).encoder_sha256
        return {"cursor": self.cursor, "data": data}

    def sync_after_load(self, updates: int) -> None:
        self.engine.sync_after_load(updates)
        if self.adversary:
            self.adversary.sync_after_load()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]
        self.step = self.cursor // self.clips_per_step

    # ------------------------------------------------------------------ data

    def batches(self, step: int) -> Iterator[ClipBatch]:
        config, axis = self.config, self.mesh.data
        ids, media = [i for i, _ in self.train_clips], [clip.media for _, clip in self.train_clips]
        source = DecodedClips(media, config.ingest, config.data.clip_cache_mib)
        factors = self.work.context.factors
        return iter(ClipLoader(source, ids, config.data, config.run.seed, factors, axis.rank, axis.size, self.cursor))

    def sample_ids(self, batch: ClipBatch) -> list[int] | None:
        if not self.reports_packs:
            return None
        return [sample_id for pack in batch.packs for stack in pack for sample_id in stack.sample_ids]

    def flops(self, batch: ClipBatch) -> float:
        return 0.0

    def noise(self, step: int, sample_ids: list[int], grid: tuple[int, int, int]) -> Tensor:
        """Standard normal values [B, channels, T', h, w], keyed by the seed, the step, each clip and its positions."""
        channels, positions = self.work.channels, grid[0] * grid[1] * grid[2]
        keys_B = clip_keys(self.config.run.seed, step, torch.tensor(sample_ids), NOISE).to(self.world.device)
        first_L = torch.arange(positions, device=keys_B.device) * (channels + channels % 2)
        values = normal(keys_B.repeat_interleave(positions), first_L.repeat(len(sample_ids)), channels)
        return values.view(len(sample_ids), *grid, channels).permute(0, 4, 1, 2, 3)

    # ------------------------------------------------------------------ a step

    def forward_backward(self, batch: ClipBatch, step: int, lap: Callable[[str], None]) -> StepOutput:
        packs = [self.work.build_pack(stacks, partial(self.noise, step)) for stacks in batch.packs]
        lap("data")
        if self.config.run.debug_parallel and step % self.config.run.debug_every == 0:
            self.check_consistency(step)
        if self.config.parallel.zero_stage == 3:
            self.add_fillers(packs)
        counts = self.count(packs)
        lap("wait")  # for the other ranks to have their data
        adversary = self.adversary if self.adversary and self.adversary.is_active(step) else None
        if adversary:
            adversary.begin_step(packs)
        losses = StepLosses(packs, counts, self.config, self.lpips, adversary)
        grad_norm = self.engine.forward_backward(packs, losses, lap)
        if adversary:
            grad_norm = torch.hypot(grad_norm, adversary.forward_backward(lap))
            losses.sums |= adversary.sums
        if self.codebook is not None:
            axis = self.mesh.data_context
            reduce_min, reduce_sum = partial(all_reduce_min, axis=axis), partial(all_reduce_sum, axis=axis)
            self.statistics = self.codebook.take_statistics().all_reduce(reduce_min, reduce_sum)
        self.code_counts = self.sum_code_counts(losses)
        pixels = torch.tensor(counts.pixels, device=self.world.device)
        return StepOutput(grad_norm, pixels, losses.sums, losses.non_finite_clips)

    def loss(self, sums: Mapping[str, Tensor], loss_count: Tensor) -> Tensor:
        return total_loss(sums, self.config.reconstruction)

    def count(self, packs: list[list[StackWork]]) -> StepCounts:
        """Pixels and latents of the step, over all ranks."""
        works = [work for pack in packs for work in pack if not work.is_filler]
        pixels, latents = sum(w.target[:, 0].numel() for w in works), sum(w.noise.numel() for w in works)
        local = torch.tensor([pixels, latents], device=self.world.device)
        return StepCounts(*all_reduce_sum(local, self.mesh.data_context).tolist())

    def add_fillers(self, packs: list[list[StackWork]]) -> None:
        """All ranks then call the network equally often."""
        negative = torch.tensor([-len(pack) for pack in packs], device=self.world.device)
        most = (-all_reduce_min(negative, self.mesh.data_context)).tolist()
        for pack, count in zip(packs, most, strict=True):
            pack += [self.work.filler() for _ in range(count - len(pack))]

    def sum_code_counts(self, losses: StepLosses) -> Tensor | None:
        """How often each code, or each level of each channel, was used in the step; None for kl."""
        quantizer = self.model.quantizer
        if not quantizer.num_codes:
            return None
        local = losses.code_counts
        if local is None:  # this rank had fillers only
            shape = (1, quantizer.num_codes) if self.config.vae.kind == "vq" else (
                self.work.channels, max(self.config.vae.fsq_levels)
            )  # fmt: skip
            local = torch.zeros(shape, dtype=torch.int64, device=self.world.device)
        return all_reduce_sum(local, self.mesh.data_context)

    def optimizer_step(self, update: Update) -> None:
        self.engine.optimizer_step(update)
        if self.codebook is not None:
            self.codebook.update(self.statistics)
        if self.adversary and self.adversary.is_active(self.step - 1):
            self.adversary.optimizer_step(update)

    def discard_grads(self) -> None:
        self.engine.discard_grads()
        if self.adversary and self.adversary.is_active(self.step - 1):
            self.adversary.engine.discard_grads()

    def step_metrics(self, batch: ClipBatch, totals: dict[str, float], loss: float | None, step: int) -> StepMetrics:
        self.cursor, self.step = batch.next_cursor, step + 1
        columns = {name: totals[name] for name in TERMS if name in totals}
        if self.code_counts is not None:
            columns["perplexity"] = float(perplexity(self.code_counts))
        return StepMetrics(self.clips_per_step, columns, "clips")

    def check_consistency(self, step: int) -> None:
        """Raises MegaSoraError on all ranks if parameters that must be equal on several ranks differ."""
        engine, is_partitioned = self.engine, self.config.parallel.zero_stage == 3
        weights, owned = engine.compute_weights(), engine.fragments()
        check_replicas(weights, engine.placements, self.mesh, self.world, step, is_partitioned, owned)
        check_replicas(self.buffers, {name: Placement() for name in self.buffers}, self.mesh, self.world, step)

    # ------------------------------------------------------------------ validation and export

    def validate(self) -> dict[str, Any] | None:
        return self.validation.run(self.step)

    def sample(self, step: int, heartbeat: Callable[[str], None], stop_requested: Callable[[], bool]) -> None:
        """Nothing: sample.every is not for a codec."""

    def finish(self, heartbeat: Callable[[str], None]) -> None:
        """Writes RUN/codec on the main process, unless it is there; no other process waits for it."""
        run = Path(self.config.run.dir)
        if self.world.is_main and not is_exported(run, self.config.run.steps):
            heartbeat("the export of the codec")
            export_codec(run, self.config, self.world.device, heartbeat)


def uses_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether the optimizer decays the parameter: the kernels of convolutions."""
    return parameter.ndim > 1


def num_matrices(name: str, parameter: Tensor) -> int:
    """How many matrices a parameter is for Muon: the kernels of convolutions are one, except the first and the last of
    encoder and decoder, which keep AdamW's steps; 0: AdamW."""
    return int(parameter.ndim > 1 and name.split(".")[-2] not in ("conv_in", "conv_out"))

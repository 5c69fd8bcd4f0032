"""Pretraining of a VideoDiT: flow matching on packs of clips.

    StepBatch  --add_noise-->  noised shares, target velocities, weights  --forward_backward-->  losses, gradients
               --optimizer_step-->  step of AdamW or Muon

The objective's random numbers are keyed by (seed, step, sample id), and the loss is one sum over the tokens of all
ranks, divided once by their number. So neither the layout nor a resume changes a run, up to the order of sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.batch import VideoBatch
from megasora.config import Config
from megasora.data.caption_sample import save_caption_sample
from megasora.data.loader import PLACEHOLDER_ID, PackLoader, StepBatch
from megasora.data.mixture import open_mixture
from megasora.data.packing_plan import Cursor
from megasora.diffusion.flow import FlowMatching, non_finite_clips, velocity_error
from megasora.fragment import Fragment
from megasora.model.flops import attention_break_even_tokens, pack_flops
from megasora.parallel.collectives import all_reduce_sum
from megasora.parallel.mesh import Mesh
from megasora.parallel.replica_check import check_packs, check_replicas
from megasora.parallel.share import share_pack
from megasora.parallel.world import World
from megasora.parallelize import parallelize
from megasora.run_log.damage import DamagedClips
from megasora.tasks.dit_samples import TrainingSamples, encode_prompts
from megasora.tasks.dit_validation import validation_loss
from megasora.tasks.task import StepMetrics, StepOutput
from megasora.text import build_text_encoder

LAYOUT_AXES = ("pipeline", "data", "context", "tensor")


class PackLosses:
    """The loss function of a step: called with the prediction of each pack, it sums the squared errors."""

    def __init__(self, targets: list[Tensor], weights: list[Tensor], num_tokens: int):
        self.targets, self.weights, self.num_tokens = targets, weights, num_tokens
        self.error_sum = torch.zeros((), dtype=torch.float64, device=weights[0].device)
        self.errors_L: dict[int, Tensor] = {}  # by pack, of the ranks that have predictions: error of each token

    def __call__(self, prediction: Tensor, index: int) -> Tensor:
        """This rank's summand of the global mean, scalar with gradient. `index`: of the pack in the step."""
        loss = velocity_error(prediction, self.targets[index], self.weights[index])
        self.error_sum += loss.squared_error_sum.detach().double()
        self.errors_L[index] = loss.squared_error_L
        return loss.squared_error_sum / self.num_tokens


class DiTTask:
    """Implements `megasora.tasks.task.Task` for text-conditioned VideoDiTs."""

    def __init__(self, config: Config, world: World, mesh: Mesh):
        self.config, self.world, self.mesh = config, world, mesh
        encoder = build_text_encoder(config.text)
        self.encode_caption = None if encoder.precomputed else (lambda caption: encoder.encode([caption])[0])
        self.train_clips, self.val_clips = (open_mixture(config.data, split) for split in ("train", "val"))
        self.objective = FlowMatching(config.objective, config.run.seed)
        prompts = encode_prompts(config.sample, encoder, world) if config.sample.every else None
        self.engine = parallelize(config, world, mesh)
        self.samples: TrainingSamples | None = None
        if prompts is not None:
            _, grid = self.train_clips.largest()
            self.samples = TrainingSamples(config, prompts, self.engine, grid, world, mesh)
        self.num_parameters = self.engine.count_parameters()
        self.damage = DamagedClips(Path(config.run.dir), config.data.max_damaged_fraction, len(self.train_clips))
        self.reports_packs = mesh.model.rank == 0 and mesh.context.rank == 0  # one of the ranks that share its packs
        self.cursor = Cursor()

    def run_info(self) -> dict[str, Any]:
        max_frames, max_grid = self.train_clips.largest()
        return {
            "layout": {name: self.mesh.axis(name).size for name in LAYOUT_AXES},
            "clips": len(self.train_clips),
            "validation_clips": len(self.val_clips),
            "tokens_per_step": self.config.data.tokens_per_pack * self.config.data.packs_per_step,
            "codec": self.train_clips.manifest.codec_fingerprint,
            "max_frames": max_frames,  # of a clip
            "max_grid": max_grid,  # latent frames, rows, columns of tokens
        }

    # ------------------------------------------------------------------ checkpoints

    def fragments(self) -> list[Fragment]:
        return self.engine.fragments()

    def replicas(self, fragment: Fragment) -> tuple[int, int]:
        pipeline, tensor = self.mesh.pipeline, self.mesh.tensor
        return fragment.placement.replica(pipeline.rank, pipeline.size, tensor.rank, tensor.size)

    def state_dict(self) -> dict[str, Any]:
        return {
            "cursor": dataclasses.asdict(self.cursor),
            "data": self.train_clips.identity(),
            "damaged": sorted(self.damage.sample_ids),
        }

    def sync_after_load(self, updates: int) -> None:
        self.engine.sync_after_load(updates)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = Cursor(**state["cursor"])
        self.damage.sample_ids |= set(state["damaged"])

    # ------------------------------------------------------------------ data

    def batches(self) -> Iterator[StepBatch]:
        return iter(
            PackLoader(
                self.train_clips,
                self.config.data,
                self.config.run.seed,
                self.encode_caption,
                attention_break_even_tokens(self.config.model, self.train_clips.manifest.patch_dim),
                self.mesh.data.rank,
                self.mesh.data.size,
                self.cursor,
                self.share,
            )
        )

    def share(self, pack: VideoBatch) -> VideoBatch:
        return share_pack(pack, self.config, self.mesh)

    def sample_ids(self, batch: StepBatch) -> list[int] | None:
        if not self.reports_packs:
            return None
        return [i for pack in batch.packs for i in pack.sample_ids_G.tolist() if i != PLACEHOLDER_ID]

    def flops(self, batch: StepBatch) -> float:
        if not self.reports_packs:
            return 0.0
        text_dim = self.train_clips.manifest.text_dim or None
        return sum(
            pack_flops(self.config.model, p.patches_LP.shape[1], p.cu_segments, p.cu_text, text_dim=text_dim)
            for p in batch.packs
        )

    # ------------------------------------------------------------------ a step

    def forward_backward(self, batch: StepBatch, step: int, lap: Callable[[str], None]) -> StepOutput:
        shares = [share.to(self.world.device) for share in batch.shares]
        noised, targets, weights = map(list, zip(*(self.objective.add_noise(s, step) for s in shares), strict=True))
        lap("data")
        if self.config.run.debug_parallel and step % self.config.run.debug_every == 0:
            self.check_consistency(batch.packs, noised, step)
        local_tokens = torch.tensor(sum(int(weight.sum()) for weight in weights), device=self.world.device)
        num_tokens = int(all_reduce_sum(local_tokens, self.mesh.data_context))
        lap("wait")  # for the other ranks to have their data
        losses = PackLosses(targets, weights, num_tokens)
        # no clip of any rank could be read: num_tokens is 0 on all ranks, of all axes
        grad_norm = self.engine.forward_backward(noised, losses, lap) if num_tokens else None
        sums = {
            "squared_error": losses.error_sum,
            "context_bytes_sent": self.engine.attention.pop_bytes_sent() if self.engine.attention is not None else 0,
            "damaged_clips": len(batch.damaged) if self.reports_packs else 0,
        }
        return StepOutput(grad_norm, num_tokens, sums, partial(non_finite_clips_of, batch.shares, losses.errors_L))

    def optimizer_step(self, lr: float) -> None:
        self.engine.optimizer_step(lr)

    def discard_grads(self) -> None:
        self.engine.discard_grads()

    def step_metrics(self, batch: StepBatch, output: StepOutput, totals: dict[str, float], step: int) -> StepMetrics:
        if totals["damaged_clips"] > 0:
            self.record_damaged_clips(batch, step)
        self.cursor = batch.next_cursor
        has_clips = output.loss_count > 0
        # every tensor rank has computed the error of all tokens of its packs
        loss = totals["squared_error"] / self.mesh.tensor.size / output.loss_count if has_clips else None
        slots = self.config.data.tokens_per_pack * self.config.data.packs_per_step
        columns: dict[str, Any] = {"padding_fraction": 1 - batch.real_tokens / slots}
        if batch.dropped_fraction:
            columns["dropped_fraction"] = batch.dropped_fraction
        if self.config.data.max_damaged_fraction > 0:
            columns["damaged_clips"] = int(totals["damaged_clips"])
        if self.mesh.context.is_split:  # mean over ranks, forward and backward
            columns["context_mib_sent"] = round(totals["context_bytes_sent"] / self.world.size / 2**20, 4)
        return StepMetrics(loss, batch.real_tokens if has_clips else 0, columns)

    def record_damaged_clips(self, batch: StepBatch, step: int) -> None:
        """Call on all ranks if any rank skipped clips in the step. Raises DataError on all if they are too many."""
        damaged = batch.damaged if self.reports_packs else []
        self.damage.log(step + 1, damaged)
        by_rank = self.world.gather_objects([(error.sample_id, str(error)) for error in damaged])
        by_rank = self.world.broadcast_object(by_rank)
        self.damage.register([clip for rank in by_rank for clip in rank])

    def check_consistency(self, packs: list[VideoBatch], noised: list[VideoBatch], step: int) -> None:
        """Raises MegaSoraError on all ranks if packs or parameters that must be equal on several ranks differ."""
        mesh, engine = self.mesh, self.engine
        check_packs(packs, (mesh.tensor, mesh.context, mesh.pipeline), self.world, step)
        check_packs(noised, (mesh.tensor, mesh.pipeline), self.world, step)
        is_partitioned = self.config.parallel.zero_stage == 3
        weights, owned = engine.compute_weights(), engine.fragments()
        check_replicas(weights, engine.placements, mesh, self.world, step, is_partitioned, owned)

    # ------------------------------------------------------------------ validation

    def validate(self) -> dict[str, Any] | None:
        count = min(len(self.val_clips), self.config.validation.clips or len(self.val_clips))
        if count == 0:
            return None
        return validation_loss(
            self.val_clips, count, self.config, self.objective, self.engine, self.encode_caption, self.share,
            self.mesh.data, self.world,
        )  # fmt: skip

    def sample(self, step: int, heartbeat: Callable[[str], None], stop_requested: Callable[[], bool]) -> None:
        self.samples.write(step, heartbeat, stop_requested)

    def finish(self, heartbeat: Callable[[str], None]) -> None:
        """Writes captions.json, a sample of the captions, for prompt expansion when the shards are gone."""
        heartbeat("sampling the captions")
        if self.world.is_main:
            save_caption_sample(Path(self.config.run.dir), self.train_clips.datasets, self.train_clips.weights)


def non_finite_clips_of(shares: list[VideoBatch], errors_L: dict[int, Tensor]) -> list[int]:
    """The sample ids of the clips of a step whose error is not finite. `errors_L`: of each token, by index of share."""
    return sorted({i for index, error_L in errors_L.items() for i in non_finite_clips(shares[index], error_L)})

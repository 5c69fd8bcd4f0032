"""Pretraining of a VideoDiT: flow matching on packs of clips.

    pack  --share, in the loader's thread-->  Share in one buffer: clean, with rows, plan and keys of the noise
    Shares of a step  --forward_backward-->  noised, losses, gradients  --optimizer_step-->  step of AdamW or Muon

A step on a GPU needs no number on the host, and one copy a pack from there, during the backward pass of the one before.

The objective's random numbers are keyed by (seed, step, sample id), and the loss is one sum over the tokens of all
ranks, divided once by their number. So neither the layout nor a resume changes a run, up to the order of sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megasora.batch import VideoBatch
from megasora.config import Config
from megasora.data.caption_sample import save_caption_sample
from megasora.data.loader import PLACEHOLDER_ID, PackLoader, StepBatch
from megasora.data.mixture import open_mixture
from megasora.data.packing_plan import Cursor
from megasora.device_transfer import DeviceTransfer, Packed, Transferred
from megasora.diffusion.flow import FlowMatching, Noise, non_finite_clips, velocity_error
from megasora.fragment import Fragment
from megasora.kernels.attention_choice import selection
from megasora.model.flops import attention_break_even_tokens, pack_flops
from megasora.optim.update import Update
from megasora.parallel.collectives import all_reduce_sum
from megasora.parallel.mesh import Mesh
from megasora.parallel.replica_check import check_packs, check_replicas
from megasora.parallel.share import share_pack
from megasora.parallel.world import World
from megasora.parallelize import compute_dtype, parallelize
from megasora.run_log.damage import DamagedClips
from megasora.tasks.dit_samples import TrainingSamples, encode_prompts
from megasora.tasks.dit_validation import validation_loss
from megasora.tasks.task import StepMetrics, StepOutput
from megasora.text import build_text_encoder

LAYOUT_AXES = ("pipeline", "data", "context", "tensor")


class Share(NamedTuple):
    """What this rank has of a pack of a step, before the step: all that is computed on the CPU."""

    clean: VideoBatch  # with the rows of the step and the plan of the model
    noise: Noise


class NoisedShares(Sequence):
    """The packs of a step, as the engine takes them: each is noised when it is taken, and its loss computed by `loss`,
    which sums the squared errors. The next one is copied to the device during the backward pass of this one, so that
    there are two at most, if the engine takes them one after the other."""

    def __init__(
        self, shares: list[Packed[Share]], transfer: DeviceTransfer, num_tokens: Tensor, has_loss: bool = True
    ):
        """`num_tokens`: noised tokens of all ranks, a scalar on the device. `has_loss`: whether `loss` is called."""
        self.shares, self.transfer, self.num_tokens = shares, transfer, num_tokens.clamp_min(1)
        self.has_loss = has_loss
        self.started: set[int] = set()  # packs whose copy has begun
        self.arriving: dict[int, Transferred[Share]] = {}  # by pack, until it is taken
        self.targets: dict[int, tuple[Tensor, Tensor]] = {}  # by pack, until its loss: target [L, P], weight [L]
        self.error_sum = torch.zeros((), dtype=torch.float64, device=num_tokens.device)
        self.errors_L: dict[int, Tensor] = {}  # by pack, of the ranks that have predictions: error of each token
        self.start(0)

    def start(self, index: int) -> None:
        """Starts the copy of a pack, if there is one and it has not been started."""
        if index < len(self) and index not in self.started:
            self.started.add(index)
            self.arriving[index] = self.transfer(self.shares[index])

    def __len__(self) -> int:
        return len(self.shares)

    def __getitem__(self, index: int) -> VideoBatch:
        if index >= len(self):  # the end of an iteration
            raise IndexError(index)
        self.start(index)
        clean, noise = self.arriving.pop(index).wait()
        noised, *target = noise.add(clean)
        if self.has_loss:
            self.targets[index] = target
        return noised

    def loss(self, prediction: Tensor, index: int) -> Tensor:
        """This rank's summand of the global mean, scalar with gradient. `index`: of the pack in the step."""
        self.start(index + 1)
        loss = velocity_error(prediction, *self.targets.pop(index))
        self.error_sum += loss.squared_error_sum.detach().double()
        self.errors_L[index] = loss.squared_error_L
        return loss.squared_error_sum / self.num_tokens


class DiTTask:
    """Implements `megasora.tasks.task.Task` for text-conditioned VideoDiTs."""

    defers = True

    def __init__(self, config: Config, world: World, mesh: Mesh):
        self.config, self.world, self.mesh = config, world, mesh
        encoder = build_text_encoder(config.text)
        self.encode_caption = None if encoder.precomputed else (lambda caption: encoder.encode([caption])[0])
        self.train_clips, self.val_clips = (open_mixture(config.data, split) for split in ("train", "val"))
        self.objective = FlowMatching(config.objective, config.run.seed)
        prompts = encode_prompts(config.sample, encoder, world) if config.sample.every else None
        self.engine = parallelize(config, world, mesh)
        self.transfer = DeviceTransfer(world.device)
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
        m, device = self.config.model, self.world.device
        dtype = compute_dtype(self.config, device)
        backend, notice = selection(m.attention_backend, device, dtype, m.head_dim, m.deterministic)
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "attention_backend": backend,
            "notices": [*filter(None, [notice]), *self.engine.notices],
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

    def batches(self, step: int) -> Iterator[StepBatch]:
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
                step,
                self.share,
            )
        )

    def share(self, pack: VideoBatch, step: int) -> Packed[Share]:
        """What this rank computes with of a pack in step `step`, ready to be copied to the device. Called by a thread
        of the loader."""
        clean, noise = self.objective.draw(share_pack(pack, self.config, self.mesh), step)
        planned = dataclasses.replace(clean, plan=self.engine.plan_pack(clean))
        return self.transfer.pack(Share(planned, noise))

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
        if batch.step != step:  # its noise would be that of another step
            raise RuntimeError(f"a batch of step {batch.step + 1} in step {step + 1}")
        shares = [share.value for share in batch.shares]  # on the CPU
        lap("data")
        if self.config.run.debug_parallel and step % self.config.run.debug_every == 0:
            self.check_consistency(batch.packs, shares, step)
        local_tokens = sum(noise.num_noised for _, noise in shares)
        num_tokens = torch.full((), local_tokens, dtype=torch.int64, device=self.world.device)
        num_tokens = all_reduce_sum(num_tokens, self.mesh.data_context)
        lap("wait")  # for the other ranks to have their data
        noised = NoisedShares(batch.shares, self.transfer, num_tokens, self.engine.has_loss)
        grad_norm = self.engine.forward_backward(noised, noised.loss, lap)
        sums = {
            "squared_error": noised.error_sum,
            "context_bytes_sent": self.engine.attention.pop_bytes_sent() if self.engine.attention is not None else 0,
            "damaged_clips": len(batch.damaged) if self.reports_packs else 0,
        }
        return StepOutput(grad_norm, num_tokens, sums, partial(non_finite_clips_of, shares, noised.errors_L))

    def loss(self, sums: Mapping[str, Tensor], loss_count: Tensor) -> Tensor:
        # every tensor rank has computed the error of all tokens of its packs
        return sums["squared_error"] / self.mesh.tensor.size / loss_count

    def optimizer_step(self, update: Update) -> None:
        self.engine.optimizer_step(update)

    def discard_grads(self) -> None:
        self.engine.discard_grads()

    def step_metrics(self, batch: StepBatch, totals: dict[str, float], loss: float | None, step: int) -> StepMetrics:
        if totals["damaged_clips"] > 0:
            self.record_damaged_clips(batch, step)
        self.cursor = batch.next_cursor
        slots = self.config.data.tokens_per_pack * self.config.data.packs_per_step
        columns: dict[str, Any] = {"padding_fraction": 1 - batch.real_tokens / slots}
        if batch.dropped_fraction:
            columns["dropped_fraction"] = batch.dropped_fraction
        if self.config.data.max_damaged_fraction > 0:
            columns["damaged_clips"] = int(totals["damaged_clips"])
        if self.mesh.context.is_split:  # mean over ranks, forward and backward
            columns["context_mib_sent"] = round(totals["context_bytes_sent"] / self.world.size / 2**20, 4)
        return StepMetrics(batch.real_tokens if loss is not None else 0, columns)

    def record_damaged_clips(self, batch: StepBatch, step: int) -> None:
        """Call on all ranks if any rank skipped clips in the step. Raises DataError on all if they are too many."""
        damaged = batch.damaged if self.reports_packs else []
        self.damage.log(step + 1, damaged)
        by_rank = self.world.gather_objects([(error.sample_id, str(error)) for error in damaged])
        by_rank = self.world.broadcast_object(by_rank)
        self.damage.register([clip for rank in by_rank for clip in rank])

    def check_consistency(self, packs: list[VideoBatch], shares: list[Share], step: int) -> None:
        """Raises MegaSoraError on all ranks if packs or parameters that must be equal on several ranks differ."""
        mesh, engine = self.mesh, self.engine
        check_packs(packs, (mesh.tensor, mesh.context, mesh.pipeline), self.world, step)
        check_packs([noise.add(clean)[0] for clean, noise in shares], (mesh.tensor, mesh.pipeline), self.world, step)
        is_partitioned = self.config.parallel.zero_stage == 3
        weights, owned = engine.compute_weights(), engine.fragments()
        check_replicas(weights, engine.placements, mesh, self.world, step, is_partitioned, owned)

    # ------------------------------------------------------------------ validation

    def validate(self) -> dict[str, Any] | None:
        count = min(len(self.val_clips), self.config.validation.clips or len(self.val_clips))
        if count == 0:
            return None
        return validation_loss(
            self.val_clips, count, self.config, self.objective, self.engine, self.encode_caption,
            lambda pack: share_pack(pack, self.config, self.mesh), self.transfer, self.mesh.data, self.world,
        )  # fmt: skip

    def sample(self, step: int, heartbeat: Callable[[str], None], stop_requested: Callable[[], bool]) -> None:
        self.samples.write(step, heartbeat, stop_requested)

    def finish(self, heartbeat: Callable[[str], None]) -> None:
        """Writes captions.json, a sample of the captions, for prompt expansion when the shards are gone."""
        heartbeat("sampling the captions")
        if self.world.is_main:
            save_caption_sample(Path(self.config.run.dir), self.train_clips.datasets, self.train_clips.weights)


def non_finite_clips_of(shares: list[Share], errors_L: dict[int, Tensor]) -> list[int]:
    """The sample ids of the clips of a step whose error is not finite. `errors_L`: of each token, by index of share."""
    return sorted({i for index, error_L in errors_L.items() for i in non_finite_clips(shares[index].clean, error_L)})

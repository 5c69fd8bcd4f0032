"""The loop. In: a configuration and the processes. Out: the run folder.

    packs = next(loader); shares; noised, target, weight = corrupt(shares); engine.train_step(noised, loss)

All that is drawn is keyed by (seed, step, sample id), and the loss is one sum over the tokens of all ranks divided once
by their number, so neither the layout of the ranks nor a stop and a resume changes a run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megasora
from megasora.batch import VideoBatch
from megasora.checkpoint.slices import Slices, write_slices
from megasora.checkpoint.store import CheckpointStore, remove_parts, verify
from megasora.config import Config, ModelConfig, to_yaml
from megasora.data.loader import NO_CLIP, PackLoader, Step
from megasora.data.mixture import open_mixture
from megasora.data.pack import make_batch
from megasora.data.packing import pack_clips
from megasora.data.plan import Cursor
from megasora.diffusion.flow import FlowMatching, velocity_error
from megasora.errors import DataError, NonFiniteError, StopRequested
from megasora.files import write_whole
from megasora.model.flops import pack_flops
from megasora.observe.damage import DamagedClips
from megasora.observe.ledger import Ledger, cut_ledger
from megasora.observe.metrics import JsonLines, ProgressLine, WandbLog
from megasora.observe.stopwatch import Stopwatch
from megasora.optim.ema import ShardedEMA
from megasora.optim.schedule import rate_at
from megasora.parallel.collectives import total
from megasora.parallel.guard import check_packs, check_replicas
from megasora.parallel.mesh import Mesh
from megasora.parallel.share import share_pack
from megasora.parallel.world import World
from megasora.parallelize import parallelize
from megasora.text import build_text_encoder

STATE_FILE = "state.json"


class Trainer:
    def __init__(
        self,
        config: Config,
        world: World,
        mesh: Mesh,
        stop_requested: Callable[[], bool] = lambda: False,
        moved: Callable[[str], None] = lambda to: None,
    ):
        """`stop_requested`: asked at every step; where it says so on any rank, all save and stop after that step.
        `moved`: told what comes next.
        """
        self.config, self.world, self.mesh, self.run_dir = config, world, mesh, Path(config.run.dir)
        self.stop_requested, self.stopping, self.moved = stop_requested, False, moved
        encoder = build_text_encoder(config.text)
        self.encode = None if encoder.precomputed else (lambda caption: encoder.encode([caption])[0])
        self.train_clips, self.val_clips = (open_mixture(config.data, split) for split in ("train", "val"))
        self.objective = FlowMatching(config.objective, config.run.seed)
        self.engine = parallelize(config, world, mesh)
        owned = self.engine.fragments()
        self.ema = ShardedEMA([f.values["weights"] for f in owned], config.optim.ema)
        self.fragments = [  # with the averages: what a checkpoint is made of
            dataclasses.replace(f, values={**f.values, "ema": average})
            for f, average in zip(owned, self.ema.averages, strict=True)
        ]
        self.store = CheckpointStore(self.run_dir / "checkpoints", config.checkpoint.keep)
        self.damage = DamagedClips(self.run_dir, config.data.max_bad_fraction, len(self.train_clips))
        self.speaks = mesh.model.rank == 0 and mesh.context.rank == 0  # for its packs, among the ranks that share them
        self.step, self.cursor, self.saved_layout = self.resume()
        self.loader = PackLoader(
            self.train_clips,
            config.data,
            config.run.seed,
            self.encode,
            attention_length(config.model, self.train_clips.manifest.patch_dim),
            mesh.data.rank,
            mesh.data.size,
            self.cursor,
            self.share,
        )
        self.peak_flops = measured_peak(world.device) if world.device.type == "cuda" else None

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        config, main = self.config, self.world.is_main
        if self.step >= config.run.steps:
            return
        parameters = self.engine.num_parameters
        if main:
            self.metrics = JsonLines(self.run_dir / "metrics.jsonl")
            self.validations = JsonLines(self.run_dir / "validation.jsonl")
            self.wandb = WandbLog(config.wandb, self.run_dir, dataclasses.asdict(config))
            self.progress = ProgressLine(config.run.steps, self.step)
            self.describe(parameters)
        if self.step == 0:
            self.validate()
        watch, warned = Stopwatch(self.world.device), None
        ledger = Ledger(self.run_dir, self.world.rank) if config.run.ledger and self.speaks else None
        self.moved(f"the loader, for step {self.step + 1}")
        for work in self.loader:
            watch.lap("data")
            self.moved(f"step {self.step + 1}")
            line = self.train_step(work, watch)
            self.cursor, self.step = work.after, self.step + 1
            if ledger is not None:
                ids = [i for pack in work.packs for i in pack.sample_ids_G.tolist() if i != NO_CLIP]
                ledger.write(self.step, ids)
            times = watch.read()
            if main:
                line = self.finish_line(line, work, times)
                self.metrics.write(line)
                self.wandb.write(self.step, line)
                text = f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
                self.progress.update(self.step, text)
                if self.wandb.warning and self.wandb.warning != warned:
                    warned = self.wandb.warning
                    self.progress.say(warned)
            last = self.step == config.run.steps
            if last or self.step % config.validation.every == 0:
                self.validate()
            if last or self.stopping or self.step % config.checkpoint.every == 0:
                self.save()
            if last or self.stopping:
                break
            watch.lap("apart")  # validation and saving are not part of a step
            watch.read()
            self.moved(f"the loader, for step {self.step + 1}")
        if ledger is not None:
            ledger.close()
        if main:
            self.progress.close()
            self.wandb.close()
            if self.wandb.warning and self.wandb.warning != warned:
                self.progress.say(self.wandb.warning)
            self.metrics.close()
            self.validations.close()
        if self.step < config.run.steps:
            raise StopRequested(f"saved after step {self.step}; the same command goes on from there")

    def share(self, pack: VideoBatch) -> VideoBatch:
        return share_pack(pack, self.config, self.mesh)

    def train_step(self, work: Step, watch: Stopwatch) -> dict[str, Any]:
        """One optimizer step on this rank's packs; the numbers are of all ranks."""
        config, device = self.config, self.world.device
        rate = rate_at(self.step, config.run.steps, config.optim)
        shares = [share.to(device) for share in work.shares]
        noised, targets, weights = zip(*(self.objective.corrupt(share, self.step) for share in shares), strict=True)
        if config.run.debug_parallel and self.step % config.run.debug_every == 0:
            self.compare_ranks(work.packs, list(noised))
        counts = torch.tensor(sum(int(weight.sum()) for weight in weights), device=device)
        tokens = int(total(counts, self.mesh.zero))
        watch.lap("data")
        error = torch.zeros((), dtype=torch.float64)

        def loss(prediction: Tensor, number: int) -> Tensor:
            nonlocal error
            found = velocity_error(prediction, targets[number], weights[number]).error
            error += found.detach().double().cpu()
            return found / tokens

        norm = self.engine.train_step(list(noised), loss, rate, watch.lap)
        self.ema.update()
        flops = sum(self.flops(pack) for pack in work.packs) if self.peak_flops and self.speaks else 0.0
        sent = self.engine.attention.take_bytes_sent() if self.engine.attention is not None else 0
        numbers = (flops, sent, self.stop_requested(), len(work.damaged) if self.speaks else 0)
        totals = torch.stack((error, *(torch.tensor(float(x), dtype=torch.float64) for x in numbers)))
        totals = self.world.sum(totals).cpu()
        self.stopping = bool(totals[3] > 0)
        loss_value = float(totals[0]) / self.mesh.tensor.size / tokens  # tensor peers have each computed all of it
        if not math.isfinite(loss_value) or not math.isfinite(norm):
            saved = self.step // config.checkpoint.every * config.checkpoint.every
            raise NonFiniteError(
                f"step {self.step}: loss {loss_value}, gradient norm {norm}; nothing was saved after step {saved}; "
                f"lower optim.rate={config.optim.rate}"
            )
        if totals[4] > 0:
            self.count_damage(work)
        watch.lap("optimizer")
        line = {"step": self.step + 1, "loss": loss_value, "grad_norm": norm, "rate": rate, "flops": float(totals[1])}
        if config.data.max_bad_fraction > 0:
            line["damaged_clips"] = int(totals[4])
        if self.mesh.context.is_split:  # mean of the ranks, forward and backward
            line["context_mib_sent"] = round(float(totals[2]) / self.world.size / 2**20, 4)
        return line

    def count_damage(self, work: Step) -> None:
        """At a step in which any rank left clips out. Raises DataError on all ranks when they have become too many."""
        damaged = work.damaged if self.speaks else []
        self.damage.note(self.step + 1, damaged)
        everyone = self.world.gather([(error.sample_id, str(error)) for error in damaged])
        problem = self.damage.add([clip for rank in everyone for clip in rank]) if everyone is not None else None
        problem = self.world.from_main(problem)
        if problem:
            raise DataError(problem)

    def compare_ranks(self, packs: list[VideoBatch], noised: list[VideoBatch]) -> None:
        """The debug guard; raises on all ranks where two that must agree do not."""
        mesh, engine = self.mesh, self.engine
        check_packs(packs, (mesh.tensor, mesh.context, mesh.pipeline), self.world, self.step)
        check_packs(noised, (mesh.tensor, mesh.pipeline), self.world, self.step)
        sliced = self.config.parallel.zero_stage == 3
        check_replicas(engine.copies(), engine.placements, mesh, self.world, self.step, sliced)

    def finish_line(self, line: dict[str, Any], work: Step, times: dict[str, float]) -> dict[str, Any]:
        flops, seconds = line.pop("flops"), times["step"]
        slots = self.config.data.tokens_per_pack * self.config.data.packs_per_step
        line |= {
            "tokens_per_second": work.real_tokens / seconds,
            "padding": 1 - work.real_tokens / slots,
            **({"dropped": work.dropped} if work.dropped else {}),
            **{f"time_{name}": round(t, 5) for name, t in times.items()},
            "mfu": flops / seconds / (self.peak_flops * self.world.size) if self.peak_flops else None,
            "memory_gib": round(peak_memory(self.world.device) / 2**30, 3),
        }
        return line

    def flops(self, batch: VideoBatch) -> float:
        patch_dim, text_dim = batch.patches_LP.shape[1], self.train_clips.manifest.text_dim or None
        return pack_flops(self.config.model, patch_dim, batch.cu_segments, batch.cu_text, text_dim=text_dim)

    def describe(self, parameters: int) -> None:
        """One line on the run, and run.json for the report."""
        axes = {name: getattr(self.mesh, name).size for name in ("pipeline", "data", "context", "tensor")}
        arranged = " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1)
        facts = {
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "world_size": self.world.size, "layout": axes,
            "parameters": parameters,
            "device": str(self.world.device), "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__, "megasora": megasora.__version__,
            "clips": len(self.train_clips), "validation_clips": len(self.val_clips),
        }  # fmt: skip
        write_whole(self.run_dir / "run.json", json.dumps(facts, indent=1) + "\n")
        tokens = self.config.data.tokens_per_pack * self.config.data.packs_per_step
        processes = f"{self.world.size} processes" + (f" ({arranged})" if arranged else "")
        self.progress.say(
            f"{parameters / 1e6:.2f}M parameters, {len(self.train_clips):,} clips, {processes} on {self.world.device}, "
            f"{tokens:,} tokens a step, from step {self.step} to {self.config.run.steps}"
        )
        if self.saved_layout != self.layout():
            before, now = (" ".join(f"{k}={v}" for k, v in x.items()) for x in (self.saved_layout, self.layout()))
            self.progress.say(f"step {self.step} was saved by {before}; this launch has {now}")

    # ------------------------------------------------------------------ validation

    def validate(self) -> None:
        """The loss by timestep bin on held-out clips, always with the same noise: only the weights change it."""
        count = len(self.val_clips)
        if self.config.validation.clips:
            count = min(count, self.config.validation.clips)
        if count == 0:
            return
        config, bins, data = self.config, self.config.validation.bins, self.mesh.data
        self.moved(f"the validation after step {self.step}")
        packs = pack_clips(self.val_clips.tokens_N[:count], config.data.tokens_per_pack)
        sums = torch.zeros(bins, 2, dtype=torch.float64)
        for first in range(0, len(packs), data.size):  # every rank asks the model equally often: it may be one of many
            number = first + data.rank
            records = [self.val_clips.read(int(i), self.encode) for i in packs[min(number, len(packs) - 1)]]
            batch = self.share(make_batch(records, config.data.tokens_per_pack)).to(self.world.device)
            levels = [self.objective.at_level(batch, (i + 0.5) / bins, stream=i) for i in range(bins)]
            predictions = self.engine.predict([noised for noised, _, _ in levels])
            for i, prediction in enumerate(predictions if predictions is not None and number < len(packs) else ()):
                loss = velocity_error(prediction, *levels[i][1:])
                sums[i] += torch.tensor([float(loss.error), loss.tokens], dtype=torch.float64)
        sums = self.world.sum(sums).cpu()
        if self.world.is_main:
            losses = (sums[:, 0] / sums[:, 1]).tolist()
            line = {
                "step": self.step,
                "loss": sum(losses) / bins,
                "bins": [{"low": i / bins, "high": (i + 1) / bins, "loss": loss} for i, loss in enumerate(losses)],
            }
            self.validations.write(line)
            self.wandb.write(self.step, {"validation_loss": line["loss"]})
            self.progress.say(f"step {self.step}: validation loss {line['loss']:.4f}")

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Every rank writes what it owns; the main one makes the save visible once all of them have."""
        self.moved(f"the save after step {self.step}")
        if self.world.is_main:
            self.store.begin(self.step)
        self.world.barrier()
        part = self.store.part(self.step)
        write_slices(part, self.world.rank, [f for f in self.fragments if self.mesh.counts_here(f.placement)])
        self.world.barrier()
        if self.world.is_main:
            state = {
                "step": self.step, "cursor": dataclasses.asdict(self.cursor), "layout": self.layout(),
                "ema_updates": self.ema.updates, "data": self.train_clips.identity(),
                "damaged": sorted(self.damage.sample_ids),
            }  # fmt: skip
            write_whole(part / STATE_FILE, json.dumps(state) + "\n")
            self.store.commit(self.step)
        self.world.barrier()

    def resume(self) -> tuple[int, Cursor, dict[str, Any]]:
        """Goes on from the newest checkpoint, or starts the run folder; (step, cursor, the layout that saved it)."""
        newest = self.store.newest()
        state = None
        if newest is not None:
            verify(newest)
            state = json.loads((newest / STATE_FILE).read_text(encoding="utf-8"))
        if self.world.is_main:
            self.store.folder.mkdir(parents=True, exist_ok=True)
            remove_parts(self.store.folder)
            cut_ledger(self.run_dir, state["step"] if state is not None else 0)
            write_whole(self.run_dir / "config.yaml", to_yaml(self.config))
        self.world.barrier()
        if state is None:
            return 0, Cursor(), self.layout()
        slices = Slices(newest)
        for fragment in self.fragments:
            slices.fill(fragment)
        self.engine.go_on(state["step"])
        self.ema.updates = state["ema_updates"]
        self.damage.sample_ids |= set(state["damaged"])
        return state["step"], Cursor(**state["cursor"]), state["layout"]

    def layout(self) -> dict[str, Any]:
        """Who shares the work; any may go on with what another saved."""
        return {"processes": self.world.size, **dataclasses.asdict(self.config.parallel)}


def attention_length(config: ModelConfig, patch_dim: int) -> int:
    """Tokens of a clip whose attention to itself costs as much as all else: of a + b l + c l^2 FLOPs, b / c."""
    text = torch.tensor([0, 0])
    one, two, three = (pack_flops(config, patch_dim, torch.tensor([0, l]), text) for l in (1, 2, 3))
    c = (three - 2 * two + one) // 2
    return (two - one - 3 * c) // c


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured_peak(device: torch.device, size: int = 8192, repeats: int = 10) -> float:
    """FLOP/s of a large bf16 matrix product on this GPU: what MFU is a fraction of."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product: Tensor = a @ a
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        torch.matmul(a, a, out=product)
    end.record()
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (start.elapsed_time(end) / 1000)

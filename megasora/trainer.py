"""The training loop: runs the optimizer steps of a task and writes metrics, validation and checkpoints to `run.dir`.

    for batch in task.batches():  train_step --> metrics --> log --> validate and save when due

The loop knows neither a model nor a mesh: a task computes the steps, see `megasora.tasks.task`. Each step makes one
all-reduce of the task's sums and of the stop requests, so that all ranks stop after the same step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megasora.checkpoint.saver import CheckpointSaver
from megasora.checkpoint.store import CheckpointStore
from megasora.config import Config
from megasora.errors import NonFiniteError, StopRequested
from megasora.optim.ema import ShardedEMA
from megasora.optim.schedule import lr_at
from megasora.parallel.world import World
from megasora.run_log.device_stats import measure_matmul_flops_per_s, peak_memory
from megasora.run_log.run_log import RunLog, prepare_run_folder
from megasora.run_log.stopwatch import Stopwatch
from megasora.tasks.task import StepMetrics, StepOutput, Task


class Trainer:
    """Trains `task` from the newest checkpoint of `run.dir`, or from step 0, to `run.steps`.

    `stop_requested()` is polled once per step; if it is true on any rank, all ranks save a checkpoint after that step
    and stop. `heartbeat(activity)` is called before each load, step, validation and save, for the watchdog.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        task: Task,
        stop_requested: Callable[[], bool] = lambda: False,
        heartbeat: Callable[[str], None] = lambda activity: None,
    ):
        self.config, self.world, self.task = config, world, task
        self.stop_requested, self.stopping, self.heartbeat = stop_requested, False, heartbeat
        fragments = task.fragments()
        self.ema = ShardedEMA([f.values["weights"] for f in fragments], config.optim.ema_decay)
        saved_fragments = [
            dataclasses.replace(f, values={**f.values, "ema": ema})
            for f, ema in zip(fragments, self.ema.ema_weights, strict=True)
        ]
        store = CheckpointStore(Path(config.run.dir) / "checkpoints", config.checkpoint.keep)
        self.saver = CheckpointSaver(store, saved_fragments, task.is_primary, world.rank, world.barrier)
        self.parallel_settings = {"processes": world.size, **dataclasses.asdict(config.parallel)}
        self.step, self.saved_settings = self.resume()
        on_gpu = world.device.type == "cuda"
        self.matmul_flops_per_s = measure_matmul_flops_per_s(world.device) if on_gpu else None

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Trains from the current step to `run.steps` and logs.

        Raises StopRequested after a requested stop, NonFiniteError, or what the task raises.
        """
        if self.step >= self.config.run.steps:
            if self.world.is_main:
                print(f"{self.config.run.dir} is complete: {self.step} of {self.config.run.steps} steps")
            return
        with RunLog(self.config, self.world.rank, self.step) as log:
            self.log_start(log)
            if self.step == 0:
                self.validate(log)
            self.train(log)
        if self.step < self.config.run.steps:
            raise StopRequested(f"saved after step {self.step}; the same command resumes from there")

    def train(self, log: RunLog) -> None:
        """The loop over batches, until the last step or a requested stop."""
        stopwatch, config = Stopwatch(self.world.device), self.config
        self.heartbeat(f"the loader, for step {self.step + 1}")
        for batch in self.task.batches():
            stopwatch.lap("data")
            self.heartbeat(f"step {self.step + 1}")
            metrics = self.train_step(batch, stopwatch)
            self.step += 1
            log.log_step(self.step, metrics, self.task.sample_ids(batch))
            is_last = self.step == config.run.steps
            if is_last or self.step % config.validation.every == 0:
                self.validate(log)
            if is_last or self.stopping or self.step % config.checkpoint.every == 0:
                self.save()
            if is_last or self.stopping:
                return
            stopwatch.lap("between_steps")  # validation and saving are not part of a step
            stopwatch.read()
            self.heartbeat(f"the loader, for step {self.step + 1}")

    def train_step(self, batch: Any, stopwatch: Stopwatch) -> dict[str, Any]:
        """One optimizer step; returns a line of metrics.jsonl: sums over all ranks, times and memory of this rank."""
        lr = lr_at(self.step, self.config.run.steps, self.config.optim)
        output = self.task.train_step(batch, self.step, lr, stopwatch.lap)
        self.ema.update()
        totals = self.sum_over_ranks(batch, output)
        self.stopping = totals["stop_requested"] > 0
        metrics = self.task.finish_step(batch, output, totals, self.step)
        self.check_finite(metrics, output)
        stopwatch.lap("optimizer")
        times = stopwatch.read()
        attainable = self.matmul_flops_per_s
        return {
            "step": self.step + 1,
            "loss": metrics.loss,
            "grad_norm": output.grad_norm,
            "lr": lr,
            "tokens_per_second": metrics.num_tokens / times["step"],
            **metrics.columns,
            **{f"time_{name}": round(seconds, 5) for name, seconds in times.items()},
            "mfu": totals["flops"] / times["step"] / (attainable * self.world.size) if attainable else None,
            "peak_memory_gib": round(peak_memory(self.world.device) / 2**30, 3),
        }

    def sum_over_ranks(self, batch: Any, output: StepOutput) -> dict[str, float]:
        """Sums over all ranks, by name: those of the task, FLOPs and stop requests; one all-reduce in fp64."""
        flops = self.task.flops(batch) if self.matmul_flops_per_s else 0.0
        summands = {**output.sums, "flops": flops, "stop_requested": self.stop_requested()}
        values = torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in summands.values()])
        return dict(zip(summands, self.world.all_reduce_sum(values).tolist(), strict=True))

    def check_finite(self, metrics: StepMetrics, output: StepOutput) -> None:
        if math.isfinite(metrics.loss) and math.isfinite(output.grad_norm):
            return
        newest = self.saver.store.newest()
        remedy = f"start another run.dir with optim.lr below {self.config.optim.lr:g}"
        if newest is not None:
            remedy += f", if need be from these weights: model.init_from={newest}"
        raise NonFiniteError(
            f"step {self.step + 1}: loss {metrics.loss:g}, gradient norm {output.grad_norm:g}; {remedy}"
        )

    def validate(self, log: RunLog) -> None:
        self.heartbeat(f"the validation after step {self.step}")
        log.log_validation(self.step, self.task.validate())

    def log_start(self, log: RunLog) -> None:
        info = {"parameters": self.task.num_parameters, **self.task.run_info()}
        log.write_run_info(info, self.world.device, self.world.size)
        log.print(f"from step {self.step} to {self.config.run.steps}")
        changes = [
            f"{key} {self.saved_settings.get(key)} -> {value}"
            for key, value in self.parallel_settings.items()
            if self.saved_settings.get(key) != value
        ]
        if changes:
            log.print(f"since the checkpoint of step {self.step}: {', '.join(changes)}")

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        self.heartbeat(f"the save after step {self.step}")
        state = {"parallel": self.parallel_settings, "ema_updates": self.ema.updates, "task": self.task.state_dict()}
        self.saver.save(self.step, state)

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Loads the newest checkpoint, if there is one; returns (its step or 0, the settings that saved it)."""
        self.heartbeat("loading the newest checkpoint")
        state = self.saver.load_newest()
        if self.world.is_main:
            prepare_run_folder(self.config, state["step"] if state is not None else 0)
        self.world.barrier()
        if state is None:
            return 0, self.parallel_settings
        self.task.load_state_dict(state["task"], state["step"])
        self.ema.updates = state["ema_updates"]
        return state["step"], state["parallel"]

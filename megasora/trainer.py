"""The training loop: runs the optimizer steps of a task and writes metrics, validation and checkpoints to `run.dir`.

    for batch in task.batches():  gradients --> sums of all ranks --> verdict --> optimizer step --> log
                                  then validate, save and sample when due

The loop knows neither a model nor a mesh: a task computes the steps, see `megasora.tasks.task`. Each step makes one
all-reduce of the task's sums and of the stop requests, so that all ranks stop after the same step. From these sums all
ranks decide alike, before the optimizer step, whether it is taken (`megasora.optim.step_guard`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megasora.config import Config
from megasora.errors import NonFiniteError, StopRequested
from megasora.optim.schedule import lr_at
from megasora.optim.step_guard import ABORT, APPLY, NON_FINITE, ROLL_BACK, SPIKE, Verdict
from megasora.parallel.world import World
from megasora.run_log.device_stats import measure_matmul_flops_per_s, speed_columns
from megasora.run_log.run_log import RunLog, prepare_run_folder
from megasora.run_log.skipped import gather_skipped_step, skipped_columns
from megasora.run_log.slow_ranks import build_slow_ranks
from megasora.run_log.stopwatch import Stopwatch
from megasora.tasks.task import StepOutput, Task
from megasora.training_state import TrainingState


class Trainer:
    """Trains `task` from the newest checkpoint of `run.dir`, or from step 0, to `run.steps`.

    `stop_requested()` is polled once per step; if it is true on any rank, all ranks save a checkpoint after that step
    and stop. `heartbeat(activity)` is called before each load, step, validation, save and sample, for the watchdog.
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
        self.state = TrainingState(config, world, task, heartbeat)
        self.slow_ranks = build_slow_ranks(Path(config.run.dir), world)
        self.ema, self.guard, self.saver = self.state.ema, self.state.guard, self.state.saver
        self.step, self.saved_layout = self.state.resume()
        if world.is_main:
            prepare_run_folder(config, self.step)
        world.barrier()
        on_gpu = world.device.type == "cuda"
        self.matmul_flops_per_s = measure_matmul_flops_per_s(world.device) if on_gpu else None

    def run(self) -> None:
        """Trains from the current step to `run.steps` and logs.

        Raises StopRequested after a requested stop, NonFiniteError, or what the task raises.
        """
        if self.step >= self.config.run.steps:
            if self.world.is_main:
                print(f"{self.config.run.dir} is complete: {self.step} of {self.config.run.steps} steps")
            return
        with RunLog(self.config, self.world.rank, self.step) as log:
            info = {"parameters": self.task.num_parameters, **self.task.run_info()}
            log.write_run_info(info, self.world.device, self.world.size)
            log.print_start(self.step, self.saved_layout, self.state.layout)
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
            self.step, self.state.validation_loss = self.step + 1, None
            log.log_step(self.step, metrics, self.task.sample_ids(batch))
            if self.slow_ranks.change:
                log.print(self.slow_ranks.change)
            if self.skipped is not None:
                log.log_skipped(self.skipped)
            if self.verdict.action == ABORT:
                self.saver.wait(self.heartbeat)
                raise NonFiniteError(self.guard.describe_abort(self.verdict, self.saver.store.newest()))
            is_last, is_rolled_back = self.step == config.run.steps, self.verdict.action == ROLL_BACK
            if is_last or self.step % config.validation.every == 0:
                self.validate(log)
            self.state.save_if_due(self.step, is_last or is_rolled_back or self.stopping)
            if config.sample.every and not self.stopping and (is_last or self.step % config.sample.every == 0):
                self.sample()
            if is_last or self.stopping:
                self.state.checkpoints.finish()
                return
            stopwatch.lap("between_steps")  # validation and saving are not part of a step
            stopwatch.read()
            self.heartbeat(f"the loader, for step {self.step + 1}")

    def train_step(self, batch: Any, stopwatch: Stopwatch) -> dict[str, Any]:
        """One step; returns a line of metrics.jsonl: sums over all ranks, times and memory of this rank."""
        lr = lr_at(self.step, self.config.run.steps, self.config.optim)
        output = self.task.forward_backward(batch, self.step, stopwatch.lap)
        totals = self.sum_over_ranks(batch, output)
        self.stopping = totals["stop_requested"] > 0
        self.saver.advance(totals["save_busy"], totals["save_failed"])
        metrics = self.task.step_metrics(batch, output, totals, self.step)
        grad_norm = math.inf if totals["non_finite_norms"] else output.grad_norm
        self.verdict, self.skipped = self.guard.decide(self.step + 1, metrics.loss, grad_norm), None
        if self.verdict.action == APPLY:
            self.task.optimizer_step(lr)
            self.ema.update()
        else:
            self.skipped = self.skip_step(batch, output, metrics.loss, grad_norm)
        stopwatch.lap("optimizer")
        figures = {"step": self.step + 1, "loss": metrics.loss, "grad_norm": grad_norm, "lr": lr, **metrics.columns}
        attainable, times = self.matmul_flops_per_s, self.slow_ranks.record(stopwatch.read())
        speed = speed_columns(times, metrics.num_items, metrics.unit, totals["flops"], attainable, self.world)
        return {**figures, **skipped_columns(self.skipped), **speed}

    def sum_over_ranks(self, batch: Any, output: StepOutput) -> dict[str, float]:
        """Sums over all ranks, by name: those of the task, FLOPs, stop requests and gradient norms that are not finite;
        one all-reduce in fp64."""
        flops = self.task.flops(batch) if self.matmul_flops_per_s else 0.0
        non_finite = output.grad_norm is not None and not math.isfinite(output.grad_norm)
        save_busy, save_failed = self.saver.progress()
        counts = {"stop_requested": self.stop_requested(), "non_finite_norms": non_finite}
        counts |= {"save_busy": save_busy, "save_failed": save_failed}
        summands = {**output.sums, "flops": flops, **counts}
        values = torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in summands.values()])
        sums = self.world.all_reduce_sum(torch.cat([values, self.slow_ranks.slots()])).tolist()
        self.slow_ranks.update(self.step + 1, sums[len(summands) :])
        return dict(zip(summands, sums, strict=False))

    def skip_step(self, batch: Any, output: StepOutput, loss: float | None, grad_norm: float | None) -> dict[str, Any]:
        """In place of the optimizer step: drops the gradients, and rolls back if that is the verdict. Returns the line
        of skipped.jsonl."""
        if output.loss_count:
            self.task.discard_grads()
        clips, named = self.task.sample_ids(batch) or [], output.non_finite_clips()
        line = gather_skipped_step(self.world, self.step + 1, self.verdict, loss, grad_norm, clips, named)
        if self.verdict.reason == NON_FINITE:
            self.guard.name_clips(line["non_finite_clips"], len(set(line["sample_ids"])))
        if self.verdict.action == ROLL_BACK:
            self.heartbeat(f"the rollback after step {self.step + 1}")
            step = self.state.roll_back()
            if step is None:
                self.verdict = Verdict(ABORT, SPIKE)
            else:
                line["rolled_back_to"] = step
        return line

    def validate(self, log: RunLog) -> None:
        self.heartbeat(f"the validation after step {self.step}")
        figures = self.task.validate()
        self.state.validation_loss = figures["loss"] if figures else None
        log.log_validation(self.step, figures)

    def sample(self) -> None:
        """Lets the task sample with the EMA weights, after a save: an error then costs no step."""
        self.saver.wait(self.heartbeat)
        with self.ema.in_place_of_weights(lambda: self.task.sync_after_load(self.ema.updates)):
            self.task.sample(self.step, self.heartbeat, self.stop_requested)

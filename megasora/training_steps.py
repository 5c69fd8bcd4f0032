"""The steps of a training: gradients, the verdict on them, and the update, without the host between them.

A GPU is not kept waiting for the host. The numbers of a step stay on the device, which decides by them; the host reads
them after it has launched the passes of the next step. A step is read at once if its verdict may be more than a skip
(`megasora.optim.step_guard`), if steps are long, or if a validation, a save, a sample or the end needs its state.

Each step makes one all-reduce of the task's sums and of the stop requests, so that all ranks stop after the same step.
From these sums all ranks decide alike, before the update, whether it is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.config import Config
from megasora.errors import NonFiniteError
from megasora.optim.schedule import lr_at
from megasora.optim.step_guard import ABORT, APPLY, NON_FINITE, ROLL_BACK, SPIKE, Verdict
from megasora.optim.update import Update
from megasora.parallel.world import World
from megasora.run_log.device_numbers import DeviceNumbers, numbers_on
from megasora.run_log.device_stats import speed_columns
from megasora.run_log.matmul_speed import matmul_flops_per_s
from megasora.run_log.run_log import RunLog
from megasora.run_log.skipped import gather_skipped_step, skipped_columns
from megasora.run_log.slow_ranks import build_slow_ranks
from megasora.run_log.stopwatch import Laps, Stopwatch
from megasora.tasks.task import StepOutput, Task
from megasora.training_state import TrainingState

LONG_STEP_SECONDS = 5.0  # longer steps are read at once: it costs them little, and stop requests wait for fewer


@dataclass
class PendingStep:
    """A step whose numbers are not read yet. `names`: of the first numbers of `numbers`, sums over all ranks; then come
    the numbers of the ranks (`SlowRanks.slots`)."""

    step: int  # from 1
    batch: Any
    output: StepOutput
    lr: float
    names: list[str]
    numbers: DeviceNumbers
    save_stage: int  # of the save under way, when its progress was summed up
    is_updated: bool = False  # whether `Task.optimizer_step` was called, with the verdict of the device
    laps: Laps | None = None


class TrainingSteps:
    """Takes the steps after step `step`, which is then the last one taken. All ranks must call `take` alike.

    `stop_requested()` is polled once per step; `stopping`: whether it was true on any rank. `pending`: the last step,
    if its numbers are not read yet; `verdict`: of the last one that was read.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        task: Task,
        state: TrainingState,
        step: int,
        stop_requested: Callable[[], bool],
        heartbeat: Callable[[str], None],
    ):
        self.config, self.world, self.task, self.state, self.step = config, world, task, state, step
        self.stop_requested, self.stopping, self.heartbeat = stop_requested, False, heartbeat
        self.slow_ranks = build_slow_ranks(Path(config.run.dir), world)
        self.pending: PendingStep | None = None
        self.verdict = Verdict(APPLY)
        self.mean_seconds = 0.0  # of a step, over all ranks; the same on all
        on_gpu = world.device.type == "cuda"
        self.reads_late = on_gpu and task.defers  # the numbers of a step during the next one
        self.matmul_flops_per_s = matmul_flops_per_s(world.device) if on_gpu else None

    def take(self, batch: Any, stopwatch: Stopwatch, log: RunLog) -> None:
        """One step: gradients, then the rest of the step before, if it is pending, then the update."""
        lr = lr_at(self.step, self.config.run.steps, self.config.optim)
        output = self.task.forward_backward(batch, self.step, stopwatch.lap)
        if self.pending is not None:  # the host waits for the step before, while the device computes this one
            self.finish_step(self.pending, stopwatch, log)
        save_stage = self.state.saver.stage
        sums, slots = self.sum_over_ranks(batch, output)
        sums["loss"] = self.task.loss(sums, output.loss_count)
        sums["loss_count"], sums["grad_norm"] = output.loss_count.double(), output.grad_norm.double()
        # ranks could disagree on a norm that is not finite; the number of those that have one is the same on all
        applies = self.state.guard.applies(sums["loss"], sums["grad_norm"]) & (sums["non_finite_norms"] == 0)
        sums["applies"] = applies.double()
        numbers = DeviceNumbers(torch.cat([torch.stack(list(sums.values())), slots]))
        self.step += 1
        self.pending = PendingStep(self.step, batch, output, lr, list(sums), numbers, save_stage)
        if self.must_read_now():
            self.finish_step(self.pending, stopwatch, log)
        else:
            self.update(self.pending, applies)
            stopwatch.lap("optimizer")
            self.pending.laps = stopwatch.end_step()

    @property
    def is_last(self) -> bool:
        return self.step == self.config.run.steps

    @property
    def validation_is_due(self) -> bool:
        return self.is_last or self.step % self.config.validation.every == 0

    @property
    def sample_is_due(self) -> bool:
        every = self.config.sample.every
        return bool(every) and not self.stopping and (self.is_last or self.step % every == 0)

    def must_read_now(self) -> bool:
        """Whether the host needs the numbers of the present step before it goes on."""
        is_due = self.validation_is_due or self.sample_is_due
        is_due |= self.state.checkpoints.due(self.step, must_save=self.stopping) is not None
        is_long = self.mean_seconds > LONG_STEP_SECONDS
        return not self.reads_late or is_long or is_due or self.state.guard.can_escalate

    def sum_over_ranks(self, batch: Any, output: StepOutput) -> tuple[dict[str, Tensor], Tensor]:
        """Sums over all ranks, by name: those of the task, FLOPs, stop requests and gradient norms that are not finite;
        and this step's slots of `SlowRanks`. One all-reduce in fp64, whose result stays on the device."""
        flops = self.task.flops(batch) if self.matmul_flops_per_s else 0.0
        save_busy, save_failed = self.state.saver.progress()
        summands: dict[str, Tensor | float] = {
            **output.sums, "non_finite_norms": ~torch.isfinite(output.grad_norm), "flops": flops,
            "stop_requested": self.stop_requested(), "save_busy": save_busy, "save_failed": save_failed,
            "step_seconds": self.slow_ranks.step_seconds,
        }  # fmt: skip
        on_device = {name: x.double() for name, x in summands.items() if isinstance(x, Tensor)}
        on_host = [float(x) for x in summands.values() if not isinstance(x, Tensor)]
        names = [*on_device, *(name for name in summands if name not in on_device)]
        values = numbers_on([*on_host, *self.slow_ranks.slots().tolist()], self.world.device)
        sums = self.world.all_reduce_sum(torch.cat([torch.stack(list(on_device.values())), values]))
        return dict(zip(names, sums[: len(names)].unbind(), strict=True)), sums[len(names) :]

    def update(self, pending: PendingStep, applies: Tensor | None) -> None:
        """The optimizer step and that of the averages. `applies`: a bool on the device; None: True."""
        update = Update(pending.lr, self.state.ema.updates, applies, self.state.ema)
        self.task.optimizer_step(update)
        self.state.ema.update(update)
        pending.is_updated = True

    def finish_step(self, pending: PendingStep, stopwatch: Stopwatch, log: RunLog) -> None:
        """Reads the numbers of a step; takes it or leaves it out, if the device has not; logs."""
        self.pending = None
        numbers = pending.numbers.read()
        totals = dict(zip(pending.names, numbers, strict=False))
        self.slow_ranks.update(pending.step, numbers[len(totals) :])
        self.stopping |= totals["stop_requested"] > 0
        self.mean_seconds = totals["step_seconds"] / self.world.size
        if pending.save_stage == self.state.saver.stage:
            self.state.saver.advance(totals["save_busy"], totals["save_failed"])
        has_clips = totals["loss_count"] > 0
        loss = totals["loss"] if has_clips else None
        metrics = self.task.step_metrics(pending.batch, totals, loss, pending.step - 1)
        grad_norm = (math.inf if totals["non_finite_norms"] else totals["grad_norm"]) if has_clips else None
        self.verdict, skipped = self.state.guard.decide(pending.step, loss, grad_norm), None
        if (self.verdict.action == APPLY) != (totals["applies"] == 1):
            raise RuntimeError(f"step {pending.step}: the device and the host decide differently: {totals}")
        if self.verdict.action == APPLY:
            if not pending.is_updated:
                self.update(pending, None)
            self.state.ema.updates += 1
        else:
            skipped = self.skip_step(pending, loss, grad_norm)
        if pending.laps is None:
            stopwatch.lap("optimizer")
            pending.laps = stopwatch.end_step()
        times = self.slow_ranks.record(pending.laps.seconds())
        speed = speed_columns(
            times, metrics.num_items, metrics.unit, totals["flops"], self.matmul_flops_per_s, self.world
        )
        figures = {"step": pending.step, "loss": loss, "grad_norm": grad_norm, "lr": pending.lr, **metrics.columns}
        figures |= {**skipped_columns(skipped), **speed}
        log.log_step(pending.step, figures, self.task.sample_ids(pending.batch))
        if self.slow_ranks.change:
            log.print(self.slow_ranks.change)
        if skipped is not None:
            log.log_skipped(skipped)
        if self.verdict.action == ABORT:
            self.state.saver.wait(self.heartbeat)
            raise NonFiniteError(self.state.guard.describe_abort(self.verdict, self.state.saver.store.newest()))

    def record_pending(self, log: RunLog) -> None:
        """Logs the pending step, if there is one, of a run that ends by an error of this rank. No collectives."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        totals = dict(zip(pending.names, pending.numbers.read(), strict=False))
        figures = {"step": pending.step, "loss": totals["loss"], "grad_norm": totals["grad_norm"], "lr": pending.lr}
        verdict = self.state.guard.decide(pending.step, totals["loss"], totals["grad_norm"])
        skipped = {} if totals["applies"] else {"skipped": verdict.reason}
        log.log_step(pending.step, {**figures, **skipped}, self.task.sample_ids(pending.batch))

    def skip_step(self, pending: PendingStep, loss: float | None, grad_norm: float | None) -> dict[str, Any]:
        """In place of the optimizer step: drops the gradients, and rolls back if that is the verdict. Returns the line
        of skipped.jsonl."""
        if not pending.is_updated:
            self.task.discard_grads()
        clips, named = self.task.sample_ids(pending.batch) or [], pending.output.non_finite_clips()
        line = gather_skipped_step(self.world, pending.step, self.verdict, loss, grad_norm, clips, named)
        if self.verdict.reason == NON_FINITE:
            self.state.guard.name_clips(line["non_finite_clips"], len(set(line["sample_ids"])))
        if self.verdict.action == ROLL_BACK:
            self.heartbeat(f"the rollback after step {pending.step}")
            step = self.state.roll_back()
            if step is None:
                self.verdict = Verdict(ABORT, SPIKE)
            else:
                line["rolled_back_to"] = step
        return line

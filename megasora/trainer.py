"""The training loop: runs the optimizer steps of a task and writes metrics, validation and checkpoints to `run.dir`.

    for batch in task.batches(step):  gradients --> sums of all ranks --> verdict --> optimizer step --> log
                                  then validate, save and sample when due

The loop knows neither a model nor a mesh: a task computes the steps, see `megasora.tasks.task`; how they are taken,
`megasora.training_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megasora.config import Config
from megasora.errors import MegaSoraError, StopRequested
from megasora.optim.step_guard import ROLL_BACK
from megasora.parallel.world import World
from megasora.run_log.run_log import RunLog, prepare_run_folder
from megasora.run_log.stopwatch import Stopwatch
from megasora.tasks.task import Task
from megasora.training_state import TrainingState
from megasora.training_steps import TrainingSteps


class Trainer:
    """Trains `task` from the newest checkpoint of `run.dir`, or from step 0, to `run.steps`.

    `stop_requested()` is polled once per step; if it is true on any rank, all ranks save a checkpoint after that step,
    or where numbers are read late after the next one, and stop. `heartbeat(activity)` is called before each load, step,
    validation, save and sample, for the watchdog.
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
        self.stop_requested, self.heartbeat = stop_requested, heartbeat
        self.state = TrainingState(config, world, task, heartbeat)
        step, self.saved_layout = self.state.resume()
        if world.is_main:
            prepare_run_folder(config, step)
        world.barrier()
        self.steps = TrainingSteps(config, world, task, self.state, step, stop_requested, heartbeat)

    @property
    def step(self) -> int:
        """The last step that was taken."""
        return self.steps.step

    def run(self) -> None:
        """Trains from the current step to `run.steps` and logs.

        Raises StopRequested after a requested stop, NonFiniteError, or what the task raises.
        """
        if self.step >= self.config.run.steps:
            if self.world.is_main:
                print(f"{self.config.run.dir} is complete: {self.step} of {self.config.run.steps} steps")
            return
        with RunLog(self.config, self.world.rank, self.step) as log:
            info = {"parameters": self.task.num_parameters, "zero_stage": self.state.layout["zero_stage"]}
            info |= {"matmul_flops_per_s": self.steps.matmul_flops_per_s, **self.task.run_info()}
            log.write_run_info(info, self.world.device, self.world.size)
            log.print_start(self.step, self.saved_layout, self.state.layout)
            if self.step == 0:
                self.validate(log)
            self.train(log)
        if self.step < self.config.run.steps:
            raise StopRequested(f"saved after step {self.step}; the same command resumes from there")

    def train(self, log: RunLog) -> None:
        """The loop over batches, until the last step or a requested stop."""
        stopwatch, steps = Stopwatch(self.world.device), self.steps
        self.heartbeat(f"the loader, for step {self.step + 1}")
        for batch in self.batches(log):
            stopwatch.lap("data")
            self.heartbeat(f"step {self.step + 1}")
            steps.take(batch, stopwatch, log)
            if steps.pending is None:
                self.validate_save_and_sample(log)
                if steps.is_last or steps.stopping:
                    self.state.checkpoints.finish()
                    return
                stopwatch.restart()  # validation and saving are not part of a step
            self.heartbeat(f"the loader, for step {self.step + 1}")

    def batches(self, log: RunLog) -> Iterator[Any]:
        """Those of the task. If one cannot be read, the step before it is logged first."""
        try:
            yield from self.task.batches(self.step)
        except MegaSoraError:
            self.steps.record_pending(log)
            raise

    def validate_save_and_sample(self, log: RunLog) -> None:
        """What is due after the present step."""
        steps, self.state.validation_loss = self.steps, None
        if steps.validation_is_due:
            self.validate(log)
        is_rolled_back = steps.verdict.action == ROLL_BACK
        self.state.save_if_due(self.step, steps.is_last or is_rolled_back or steps.stopping)
        if steps.sample_is_due:
            self.sample()

    def validate(self, log: RunLog) -> None:
        self.heartbeat(f"the validation after step {self.step}")
        figures = self.task.validate()
        self.state.validation_loss = figures["loss"] if figures else None
        log.log_validation(self.step, figures)

    def sample(self) -> None:
        """Lets the task sample with the EMA weights, after a save: an error then costs no step."""
        self.state.saver.wait(self.heartbeat)
        with self.state.ema.in_place_of_weights(lambda: self.task.sync_after_load(self.state.ema.updates)):
            self.task.sample(self.step, self.heartbeat, self.stop_requested)

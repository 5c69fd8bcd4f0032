"""The state of a training: the fragments of the task, their averages, the losses that the step guard has seen, and the
checkpoints that hold all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megasora.checkpoint.rollback import roll_back
from megasora.checkpoint.run_checkpoints import RunCheckpoints
from megasora.config import Config
from megasora.fragment import Fragment
from megasora.optim.ema import ShardedEMA
from megasora.optim.ema_decays import ema_decays
from megasora.optim.step_guard import StepGuard
from megasora.parallel.channel import Channel
from megasora.parallel.layout import resolve_zero_stage
from megasora.parallel.world import World
from megasora.run_log.code_version import source_hash


class SavedTask(Protocol):
    """What is saved of a task; see `megasora.tasks.task.Task`."""

    def fragments(self) -> list[Fragment]: ...

    def replicas(self, fragment: Fragment) -> tuple[int, int]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def sync_after_load(self, updates: int) -> None: ...


class TrainingState:
    """All ranks must call each method. `heartbeat(activity)`: for the watchdog."""

    def __init__(self, config: Config, world: World, task: SavedTask, heartbeat: Callable[[str], None]):
        self.config, self.world, self.task, self.heartbeat = config, world, task, heartbeat
        fragments = task.fragments()
        self.guard = StepGuard(config.optim)
        self.ema = ShardedEMA([f.values["weights"] for f in fragments], ema_decays(config.optim))
        zero_stage = resolve_zero_stage(config.parallel, world.device.type)
        self.layout = {"processes": world.size, **dataclasses.asdict(config.parallel), "zero_stage": zero_stage}
        self.validation_loss: float | None = None  # of the validation after the current step, if there was one
        self.checkpoints = RunCheckpoints(
            Path(config.run.dir), config.checkpoint, self.ema.extend(fragments), task.replicas,
            frozenset(self.ema.averages), world, Channel, heartbeat,
        )  # fmt: skip
        self.saver = self.checkpoints.saver

    def save_if_due(self, step: int, must_save: bool) -> None:
        """See RunCheckpoints."""
        self.checkpoints.save_if_due(step, must_save, self.state_dict)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has besides the fragments: JSON values."""
        return {
            "parallel": self.layout,
            "ema_updates": self.ema.updates,
            "task": self.task.state_dict(),
            "guard": self.guard.state_dict(),
            "validation_loss": self.validation_loss,
            "code": source_hash(),
            "config": dataclasses.asdict(self.config),
        }

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Loads the checkpoint that `run.start` asks for; returns (its step or 0, the layout that saved it)."""
        state = self.checkpoints.resume(self.config.run.start)
        if state is None:
            return 0, self.layout
        self.after_load(state)
        self.task.load_state_dict(state["task"])
        self.guard.load_state_dict(state["guard"])
        return state["step"], state["parallel"]

    def roll_back(self) -> int | None:
        """Takes weights, moments and averages back to the checkpoint before the spikes; returns its step, or None if
        there is none."""
        self.saver.wait(self.heartbeat)
        state = roll_back(self.checkpoints.loader, self.guard.first_spike - 1, self.config.checkpoint.every)
        if state is None:
            return None
        self.after_load(state)
        self.guard.rolled_back(state["guard"]["losses"])
        return state["step"]

    def after_load(self, state: dict[str, Any]) -> None:
        """Call after the fragments of a checkpoint were loaded, with its state."""
        for sentence in self.ema.start_missing(self.checkpoints.loader.kinds):
            if self.world.is_main:
                print(sentence, flush=True)
        self.ema.updates = state["ema_updates"]
        self.task.sync_after_load(state["ema_updates"])  # every update is followed by one of the averages

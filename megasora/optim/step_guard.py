"""Decides whether a step is applied, from its loss and gradient norm over all ranks, before the optimizer step.

    (loss, gradient norm) --decide--> Verdict: apply | skip | roll back | abort

no clips      no clip of the step could be read (`data.max_damaged_fraction`): there is nothing to apply
non-finite    the loss or the gradient norm is no finite number: skipped; abort at `optim.max_skipped_steps` in a row
spike         the loss is `optim.spike.threshold` deviations above the median of the last losses: skipped; at
              `optim.spike.patience` in a row the run rolls back to a checkpoint from before them

A deviation is 1.4826 times the median absolute deviation, which for a normal distribution is the standard deviation.
Only losses of applied steps are among the last losses, so that neither a NaN nor a spike changes later decisions.
All ranks pass the same numbers and so decide the same. The state is part of the checkpoint: a resume decides the same.
On a GPU `applies` decides where the numbers are, and `decide` repeats it when the host has them, one step later.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megasora.config import OptimConfig
from megasora.errors import first_of

APPLY, SKIP, ROLL_BACK, ABORT = "apply", "skip", "roll back", "abort"
NO_CLIPS, NON_FINITE, SPIKE = "no clips", "non-finite", "spike"
NORMAL_SCALE = 1.4826  # standard deviation / median absolute deviation of a normal distribution
MIN_DEVIATION = 1e-3  # of the median: losses that are nearly equal have no scale of their own
MAX_NAMED = 8  # clips and steps that a message names


@dataclass(frozen=True)
class Verdict:
    """What happens to a step, and why it is not applied."""

    action: str
    reason: str = ""


@dataclass
class NonFiniteStep:
    """A step that was skipped, with its clips whose loss is not finite, as far as they are known."""

    step: int
    named: list[int] = field(default_factory=list)  # sample ids, at most MAX_NAMED
    num_named: int = 0
    num_clips: int = 0  # of the step


class StepGuard:
    """Call `decide` once per step, on all ranks with the same numbers. Steps count from 1."""

    def __init__(self, config: OptimConfig):
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.spike.window)  # of the last applied steps
        self.spikes: list[int] = []  # steps, of the present series
        self.non_finite: list[NonFiniteStep] = []  # of the present series
        self.rollbacks = 0

    def decide(self, step: int, loss: float | None, grad_norm: float | None) -> Verdict:
        """`loss`: None if the step has no clips; then nothing changes in later decisions."""
        if loss is None or grad_norm is None:
            return Verdict(SKIP, NO_CLIPS)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.non_finite.append(NonFiniteStep(step))
            is_last = len(self.non_finite) >= self.config.max_skipped_steps
            return Verdict(ABORT if is_last else SKIP, NON_FINITE)
        self.non_finite = []
        if self.is_spike(loss):
            self.spikes.append(step)
            if len(self.spikes) < self.config.spike.patience:
                return Verdict(SKIP, SPIKE)
            return Verdict(ROLL_BACK if self.rollbacks < self.config.spike.max_rollbacks else ABORT, SPIKE)
        self.spikes = []
        self.losses.append(loss)
        return Verdict(APPLY)

    def is_spike(self, loss: float) -> bool:
        """False until `optim.spike.window` steps have been applied."""
        middle, most = self.spike_bounds()
        return loss - middle > most

    def spike_bounds(self) -> tuple[float, float]:
        """(median of the last losses, how far above it a loss is no spike yet)."""
        threshold = self.config.spike.threshold
        if threshold == 0 or len(self.losses) < self.config.spike.window:
            return 0.0, math.inf
        middle = median(self.losses)
        deviation = NORMAL_SCALE * median(abs(value - middle) for value in self.losses)
        return middle, threshold * max(deviation, MIN_DEVIATION * abs(middle))

    # ------------------------------------------------------------------ on the device

    @property
    def can_escalate(self) -> bool:
        """Whether the verdict on the next step may be another one than apply or skip."""
        may_roll_back = self.config.spike.threshold > 0 and len(self.spikes) + 1 >= self.config.spike.patience
        return may_roll_back or len(self.non_finite) + 1 >= self.config.max_skipped_steps

    def applies(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether `decide` will apply the step: a bool on the device of the loss and the norm, scalars in fp64."""
        middle, most = self.spike_bounds()
        return torch.isfinite(loss) & torch.isfinite(grad_norm) & ~(loss - middle > most)

    def name_clips(self, named: list[int], num_clips: int) -> None:
        """Of the last step, which was not finite: the sample ids of its clips whose loss is not finite, and the
        number of all its clips."""
        last = self.non_finite[-1]
        last.named, last.num_named, last.num_clips = named[:MAX_NAMED], len(named), num_clips

    @property
    def first_spike(self) -> int:
        """The first step of the present series of spikes."""
        return self.spikes[0]

    def rolled_back(self, losses: list[float]) -> None:
        """Call after a rollback, with the last losses as the checkpoint has them."""
        self.losses.clear()
        self.losses.extend(losses)
        self.spikes, self.rollbacks = [], self.rollbacks + 1

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "losses": list(self.losses),
            "spikes": self.spikes,
            "non_finite": [dataclasses.asdict(skipped) for skipped in self.non_finite],
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.spikes, self.rollbacks = list(state["spikes"]), state["rollbacks"]
        self.non_finite = [NonFiniteStep(**skipped) for skipped in state["non_finite"]]

    # ------------------------------------------------------------------ messages

    def describe_abort(self, verdict: Verdict, newest: Path | None) -> str:
        """Why the run ends, and the remedy. `newest`: the newest checkpoint."""
        if verdict.reason == SPIKE:
            most = self.config.spike.max_rollbacks
            why = f"this would be rollback {self.rollbacks + 1}, optim.spike.max_rollbacks={most}"
            if self.rollbacks < most:
                why = "there is no checkpoint from before them to roll back to"
            what = f"{describe_steps(self.spikes)}: the loss is a spike ({len(self.spikes)} in a row), and {why}"
            return f"{what}; {self.lower_lr(newest)}, or raise optim.spike.threshold"
        count = f"{len(self.non_finite)} in a row, optim.max_skipped_steps={self.config.max_skipped_steps}"
        what = f"{describe_steps([skipped.step for skipped in self.non_finite])}: loss or gradient norm not finite"
        clips = list(dict.fromkeys(clip for skipped in self.non_finite for clip in skipped.named))
        if not clips:
            return f"{what} ({count}); {self.lower_lr(newest)}"
        if all(0 < skipped.num_named < skipped.num_clips for skipped in self.non_finite):
            remedy = "the losses of all other clips are finite, so look at these and leave them out of the dataset"
            return f"{what} ({count}); not finite in {describe_clips(clips)}; {remedy}"
        return f"{what} ({count}); not finite in {describe_clips(clips)}; {self.lower_lr(newest)}"

    def lower_lr(self, newest: Path | None) -> str:
        remedy = f"start another run.dir with optim.lr below {self.config.lr:g}"
        return remedy if newest is None else f"{remedy}, if need be from these weights: run.start=init:{newest}"


def describe_steps(steps: list[int]) -> str:
    """ "step 7", or "steps 7 to 12"; there may be others between them."""
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def describe_clips(clips: list[int]) -> str:
    """ "clip 7", or "clips 7, 12 and 3 more"."""
    return f"clip{'s' * (len(clips) > 1)} {first_of(clips, MAX_NAMED)}"

"""The interface between the training loop and what it trains.

    loop:  for batch in task.batches():
               output = task.forward_backward(batch, step, lap)     gradients
               totals = all-reduce of output.sums                   one all-reduce per step, of all ranks
               metrics = task.step_metrics(batch, output, totals, step)
               task.optimizer_step(lr), or task.discard_grads()     StepGuard decides, from loss and gradient norm

A task owns the model, its optimizer, the objective and the data. The loop owns steps, learning rate, EMA weights,
checkpoints, times of validations and samples, stops and logs; it knows neither a model nor a mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from megasora.fragment import Fragment


class StepOutput(NamedTuple):
    """What `Task.forward_backward` returns on one rank."""

    grad_norm: float | None  # global norm before clipping, equal on all ranks; inf or NaN if it is not finite
    loss_count: int  # elements that the loss is a mean of, over all ranks; 0: there are none, and no gradients
    sums: dict[str, Tensor | float]  # this rank's summands, with the same keys on all ranks; the loop adds them up
    non_finite_clips: Callable[[], list[int]] = list  # the sample ids of this rank's clips whose loss is not finite


class StepMetrics(NamedTuple):
    """What `Task.step_metrics` returns: figures of the step over all ranks."""

    loss: float | None  # None if the step has no clips
    num_items: int  # tokens or clips trained on, for the speed
    columns: dict[str, Any]  # further columns of metrics.jsonl
    unit: str = "tokens"  # what `num_items` counts: tokens | clips; the column is tokens_per_second or clips_per_second


class Task(Protocol):
    """What a run trains: model, optimizer, objective and data. Each method is called on all ranks, in one order."""

    num_parameters: int  # of the full model

    def run_info(self) -> dict[str, Any]:
        """What run.json says of the model and the data. Required: `tokens_per_step` or `clips_per_step`, `clips`, and
        `layout`, the sizes of the axes by name. `task`: the kind of run, whose page `megasora report` writes."""

    def fragments(self) -> list[Fragment]:
        """This rank's live fp32 weights and moments: what a checkpoint saves and loads, and the EMA averages.

        All have the same kinds of values. They must exist before the loop is built: create AdamW's moments beforehand.
        An unsharded parameter is `Fragment(name, shape, Placement(), 0, 1, 0, {"weights": flat, ...})`.
        """

    def replicas(self, fragment: Fragment) -> tuple[int, int]:
        """(index of this rank among the ranks that hold the same elements of the parameter, their number): together
        they save them once."""

    def state_dict(self) -> dict[str, Any]:
        """What else a checkpoint saves, as JSON, equal on all ranks: the position in the data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state` of a checkpoint: the position in the data."""

    def sync_after_load(self, updates: int) -> None:
        """Call after the fragments of a checkpoint were loaded. `updates`: the optimizer steps that they have had."""

    def batches(self) -> Iterator[Any]:
        """This rank's batches, endless, from the current position in the data."""

    def sample_ids(self, batch: Any) -> list[int] | None:
        """The clips of a batch, for the ledger; None if another rank, which shares the batch, records them."""

    def flops(self, batch: Any) -> float:
        """FLOPs of a training step on the batch, for MFU; 0 if another rank, which shares the batch, counts them."""

    def forward_backward(self, batch: Any, step: int, lap: Callable[[str], None]) -> StepOutput:
        """Computes the gradients of a step. `step` counts from 0; `lap(name)` ends a timed phase."""

    def step_metrics(self, batch: Any, output: StepOutput, totals: dict[str, float], step: int) -> StepMetrics:
        """Metrics of the step from the sums over all ranks; advances the position in the data.

        Called before the optimizer step. May raise MegaSoraError, then on all ranks.
        """

    def optimizer_step(self, lr: float) -> None:
        """One update with the gradients of `forward_backward`."""

    def discard_grads(self) -> None:
        """In place of `optimizer_step`: drops the gradients; weights, moments and step counts stay as they are. Not
        called if `loss_count` is 0."""

    def validate(self) -> dict[str, Any] | None:
        """Validation figures, with the key `loss`, on the main process; None on others, and if no data is held out."""

    def sample(self, step: int, heartbeat: Callable[[str], None], stop_requested: Callable[[], bool]) -> None:
        """Called every `sample.every` steps, while fragments and model have the EMA weights: writes samples of the run.

        Must change nothing that training depends on. Gives up soon after `stop_requested()` is true on any rank.
        `heartbeat` as for `finish`.
        """

    def finish(self, heartbeat: Callable[[str], None]) -> None:
        """Call on all ranks after the last step, also where a complete run is started again: writes what the run is
        for, unless it is there. `heartbeat(activity)`: for the watchdog, before each part."""

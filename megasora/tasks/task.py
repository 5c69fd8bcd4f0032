"""The interface between the training loop and what it trains.

    loop:  for batch in task.batches(step):
               output = task.forward_backward(batch, step, lap)     gradients
               sums = all-reduce of output.sums                     one all-reduce per step, of all ranks
               loss = task.loss(sums, output.loss_count)
               task.optimizer_step(update), or task.discard_grads() StepGuard decides, from loss and gradient norm
               task.step_metrics(batch, sums, loss, step)

All numbers of a step are tensors on the device. Where `task.defers`, a GPU decides whether the update is applied, and
the loop reads the numbers on the host when the next step is already being computed.

A task owns the model, its optimizer, the objective and the data. The loop owns steps, learning rate, EMA weights,
checkpoints, times of validations and samples, stops and logs; it knows neither a model nor a mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from megasora.fragment import Fragment
from megasora.optim.update import Update


class StepOutput(NamedTuple):
    """What `Task.forward_backward` returns on one rank. Tensors are scalars on the device."""

    grad_norm: Tensor  # global norm before clipping, equal on all ranks; inf or NaN if it is not finite
    loss_count: Tensor  # elements that the loss is a mean of, over all ranks; 0: there are none
    sums: dict[str, Tensor | float]  # this rank's summands, with the same keys on all ranks; the loop adds them up
    non_finite_clips: Callable[[], list[int]] = list  # the sample ids of this rank's clips whose loss is not finite


class StepMetrics(NamedTuple):
    """What `Task.step_metrics` returns: figures of the step over all ranks."""

    num_items: int  # tokens or clips trained on, for the speed
    columns: dict[str, Any]  # further columns of metrics.jsonl
    unit: str = "tokens"  # what `num_items` counts: tokens | clips; the column is tokens_per_second or clips_per_second


class Task(Protocol):
    """What a run trains: model, optimizer, objective and data. Each method is called on all ranks, in one order."""

    num_parameters: int  # of the full model
    defers: bool  # whether `optimizer_step` takes an `Update.apply` that the host does not know yet

    def run_info(self) -> dict[str, Any]:
        """What run.json says of the model and the data. Required: `tokens_per_step` or `clips_per_step`, `clips`, and
        `layout`, the sizes of the axes by name. `task`: the kind of run, whose page `megasora report` writes.
        `notices`: sentences that are printed at the start, on what is slower than it could be."""

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

    def batches(self, step: int) -> Iterator[Any]:
        """This rank's batches, endless, from the current position in the data. `step`: of the first one, from 0."""

    def sample_ids(self, batch: Any) -> list[int] | None:
        """The clips of a batch, for the ledger; None if another rank, which shares the batch, records them."""

    def flops(self, batch: Any) -> float:
        """FLOPs of a training step on the batch, for MFU; 0 if another rank, which shares the batch, counts them."""

    def forward_backward(self, batch: Any, step: int, lap: Callable[[str], None]) -> StepOutput:
        """Computes the gradients of a step. `step` counts from 0; `lap(name)` ends a timed phase."""

    def loss(self, sums: Mapping[str, Tensor], loss_count: Tensor) -> Tensor:
        """The loss of the step, a scalar in fp64; not finite if `loss_count` is 0. `sums`: over all ranks, fp64."""

    def optimizer_step(self, update: Update) -> None:
        """One update with the gradients of `forward_backward`, which are gone afterwards. May update the averages of
        `update.ema` in the same pass; the loop updates those that are left."""

    def discard_grads(self) -> None:
        """In place of `optimizer_step`: drops the gradients; weights and moments stay as they are."""

    def step_metrics(self, batch: Any, totals: dict[str, float], loss: float | None, step: int) -> StepMetrics:
        """Metrics of the step from the sums over all ranks; advances the position in the data.

        `loss`: None if the step has no clips. May raise MegaSoraError, then on all ranks. Where the task `defers`, the
        next `forward_backward` may have been called before.
        """

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

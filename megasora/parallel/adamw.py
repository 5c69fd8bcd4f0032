"""AdamW for the flat partitions of ZeRO: the optimizer that DeepSpeed gets, whose steps `ZeroEngine` takes itself.

DeepSpeed's own step clips, updates and copies in passes of their own, and waits for the gradient norm on the host. Here
a partition has one pass, see `megasora.kernels.adamw`, and what decides is on the device.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megasora.kernels.adamw import MAX_AVERAGES, AdamWRule, Averages, adamw_

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")  # of the gradient and of its square


class WeightAverages(Protocol):
    """See `megasora.optim.ema.ShardedEMA`."""

    def take(self, flat_weights: Tensor, most: int) -> list[tuple[Tensor, float]]: ...


class Update(Protocol):
    """See `megasora.optim.update.Update`."""

    lr: float
    number: int
    apply: Tensor | None
    ema: WeightAverages | None


class PartitionStep(NamedTuple):
    """One step of a partition, all tensors flat and of one length."""

    master: Tensor  # fp32 weights
    grad: Tensor  # before clipping
    out: Tensor | None  # gets the new weights in the dtype of the computation
    factor: Tensor  # 0-dim, fp32: what the gradient is multiplied by
    apply: Tensor  # 0-dim, bool


class PartitionAdamW(torch.optim.Optimizer):
    """AdamW as torch.optim.AdamW: the same equations and settings. `update_partition` is the step of one partition;
    `step` is not used. State of a partition: ADAM_MOMENTS, from `init_partition`."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def init_partition(self, master: Tensor) -> None:
        """The state that the first step needs, so that a checkpoint can be loaded before it."""
        self.state[master] = {kind: torch.zeros_like(master, requires_grad=False) for kind in self.moments(master)}

    def moments(self, master: Tensor) -> tuple[str, ...]:
        """The kinds of state of a partition."""
        return ADAM_MOMENTS

    def update_partition(self, group: dict, step: PartitionStep, update: Update) -> None:
        """`group`: of `param_groups`, for its settings. All ranks of data x context must call it, in one order."""
        state = self.state[step.master]
        averages = update.ema.take(step.master, MAX_AVERAGES) if update.ema is not None else []
        rule = AdamWRule(update.lr, *group["betas"], group["eps"], group["weight_decay"], update.number)
        adamw_(
            step.master.detach(), *(state[kind] for kind in ADAM_MOMENTS), step.grad, rule, step.factor, step.apply,
            Averages([a for a, _ in averages], [weight for _, weight in averages]), step.out,
        )  # fmt: skip

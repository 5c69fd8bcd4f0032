"""Exponential moving average (EMA) of the weights, fp32, sharded like the optimizer's master weights."""

from __future__ import annotations

import torch
from torch import Tensor


class ShardedEMA:
    """EMA weights of the fragments of this rank: ema <- d ema + (1 - d) weights, at each `update`.

    d = min(decay, (1 + n) / (10 + n)) at update n, so that the initial weights lose their influence early.
    """

    def __init__(self, weights: list[Tensor], decay: float):
        self.weights, self.decay, self.updates = weights, decay, 0
        self.ema_weights = [w.detach().clone() for w in weights]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.ema_weights, self.weights, 1 - decay)
        self.updates += 1

"""Averaged weights, fp32, in the same slices as the optimizer's master weights: each rank averages what it owns."""

from __future__ import annotations

import torch
from torch import Tensor


class ShardedEMA:
    """ema <- d ema + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) at update n, so that the start fades."""

    def __init__(self, weights: list[Tensor], decay: float):
        self.weights, self.decay, self.updates = weights, decay, 0
        self.averages = [w.detach().clone() for w in weights]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)
        self.updates += 1

"""Exponential moving average (EMA) of the weights, fp32, sharded like the optimizer's master weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megasora.fragment import Fragment


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

    def extend(self, fragments: list[Fragment]) -> list[Fragment]:
        """The fragments, in the order of `weights`, with the EMA weights as one more kind of their values: "ema"."""
        pairs = zip(fragments, self.ema_weights, strict=True)
        return [dataclasses.replace(f, values={**f.values, "ema": ema}) for f, ema in pairs]

    @contextmanager
    def in_place_of_weights(self, sync: Callable[[], None]) -> Iterator[None]:
        """Within the context, `weights` have the values of the EMA, and afterwards their own again, bit for bit.

        `sync()` is called after each change, to bring it to where the model computes. After an exception all stays as
        it is: other ranks would not join in the collectives of `sync`, and the run ends.
        """
        self.swap()
        sync()
        yield
        self.swap()
        sync()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the values of the weights and of their EMA, a tensor at a time."""
        for weights, ema in zip(self.weights, self.ema_weights, strict=True):
            kept = weights.clone()
            weights.copy_(ema)
            ema.copy_(kept)

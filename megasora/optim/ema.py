"""Exponential moving averages (EMA) of the weights, fp32, sharded like the optimizer's master weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from megasora.fragment import Fragment
from megasora.optim.ema_decays import Decay


class ShardedEMA:
    """Averages of the fragments of this rank: average <- d average + (1 - d) weights, at each `update`.

    `decays`: d at update n, from 0, of each average by its kind, see `ema_decays`. `averages`: the tensors by kind.
    """

    def __init__(self, weights: list[Tensor], decays: Mapping[str, Decay]):
        self.weights, self.decays, self.updates = weights, decays, 0
        self.averages = {kind: [w.detach().clone() for w in weights] for kind in decays}

    @torch.no_grad()
    def update(self) -> None:
        for kind, decay in self.decays.items():
            torch._foreach_lerp_(self.averages[kind], self.weights, 1 - decay(self.updates))
        self.updates += 1

    def extend(self, fragments: list[Fragment]) -> list[Fragment]:
        """The fragments, in the order of `weights`, with the averages as more kinds of their values."""
        by_fragment = zip(*self.averages.values(), strict=True)  # a tensor of each kind
        return [
            dataclasses.replace(f, values={**f.values, **dict(zip(self.averages, tensors, strict=True))})
            for f, tensors in zip(fragments, by_fragment, strict=True)
        ]

    @torch.no_grad()
    def start_missing(self, loaded: Collection[str]) -> list[str]:
        """After a checkpoint with the kinds `loaded`: averages that it has not start from its weights.

        Returns a sentence for each average that was started or, because it is not configured, dropped.
        """
        missing = [kind for kind in self.averages if kind not in loaded]
        for kind in missing:
            torch._foreach_copy_(self.averages[kind], self.weights)
        dropped = [kind for kind in sorted(loaded) if kind.startswith("ema") and kind not in self.averages]
        return [
            *(f"the average {kind} is not in the checkpoint and starts from its weights" for kind in missing),
            *(f"the average {kind} of the checkpoint is not configured (optim.ema_*) and ends" for kind in dropped),
        ]

    @contextmanager
    def in_place_of_weights(self, sync: Callable[[], None], kind: str = "ema") -> Iterator[None]:
        """Within the context, `weights` have the values of an average, and afterwards their own again, bit for bit.

        `sync()` is called after each change, to bring it to where the model computes. After an exception all stays as
        it is: other ranks would not join in the collectives of `sync`, and the run ends.
        """
        self.swap(kind)
        sync()
        yield
        self.swap(kind)
        sync()

    @torch.no_grad()
    def swap(self, kind: str) -> None:
        """Exchanges the values of the weights and of an average of them, a tensor at a time."""
        for weights, average in zip(self.weights, self.averages[kind], strict=True):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)

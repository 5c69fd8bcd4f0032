"""Exponential moving averages (EMA) of the weights, fp32, sharded like the optimizer's master weights.

Averages are allocated like the weights: where many weights are views of one flat tensor, as those of a ZeRO partition
are, their averages are views of one flat tensor, too, with the same offsets. The optimizer step can then take a whole
partition along, in the pass over memory that updates the weights: see `ShardedEMA.take`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megasora.fragment import Fragment
from megasora.optim.ema_decays import Decay

if TYPE_CHECKING:
    from megasora.optim.update import Update


class ShardedEMA:
    """Averages of the fragments of this rank: average <- d average + (1 - d) weights, at each `update`.

    `decays`: d at update n, from 0, of each average by its kind, see `ema_decays`. `averages`: the tensors by kind.
    `updates`: n of the next update.
    """

    def __init__(self, weights: list[Tensor], decays: Mapping[str, Decay]):
        self.weights, self.decays, self.updates = weights, decays, 0
        storages = {address(w): whole_storage(w) for w in weights}
        self.flat = {kind: {key: flat.clone() for key, flat in storages.items()} for kind in decays}
        self.averages = {kind: [like(w, self.flat[kind][address(w)]) for w in weights] for kind in decays}
        self.taken: dict[str, list[tuple[int, int, int]]] = {kind: [] for kind in decays}  # storage, start, end

    @torch.no_grad()
    def take(self, flat_weights: Tensor, most: int) -> list[tuple[Tensor, float]]:
        """Up to `most` averages that the caller updates in place of the next `update`: (flat tensor parallel to
        `flat_weights`, 1 - d). `flat_weights`: contiguous, of the storage of weights, with all elements of each of
        them or none; no average, if none of the weights is in it."""
        key, start = address(flat_weights), flat_weights.storage_offset()
        result: list[tuple[Tensor, float]] = []
        for kind, decay in list(self.decays.items())[:most]:
            if key in self.flat[kind]:
                self.taken[kind].append((key, start, start + flat_weights.numel()))
                result.append((like(flat_weights, self.flat[kind][key]), 1 - decay(self.updates)))
        return result

    @torch.no_grad()
    def update(self, update: Update) -> None:
        """The averages of all weights, except those that `take` has given away since the last call; none if
        `update.apply` is False. The caller counts the update, if it is applied."""
        for kind, decay in self.decays.items():
            left = [i for i, w in enumerate(self.weights) if not self.is_taken(kind, w)]
            averages = self.averages[kind]
            average_(
                [averages[i] for i in left], [self.weights[i] for i in left], 1 - decay(self.updates), update.apply
            )
            self.taken[kind].clear()

    def is_taken(self, kind: str, weights: Tensor) -> bool:
        first = weights.storage_offset()
        return any(key == address(weights) and start <= first < end for key, start, end in self.taken[kind])

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


def average_(averages: Sequence[Tensor], weights: Sequence[Tensor], weight: float, apply: Tensor | None) -> None:
    """average <- average + weight (weights - average), in place; nothing where `apply`, 0-dim, is False."""
    if not averages or (apply is not None and apply.device.type == "cpu" and not apply):
        return
    if apply is None or apply.device.type == "cpu":
        torch._foreach_lerp_(averages, weights, weight)
        return
    for average, new in zip(averages, weights, strict=True):
        torch.where(apply, average.lerp(new, weight), average, out=average)


def address(x: Tensor) -> int:
    """Of the storage of x."""
    return x.untyped_storage().data_ptr()


def whole_storage(x: Tensor) -> Tensor:
    """All elements of the storage of x, flat; x itself must be contiguous."""
    count = x.untyped_storage().nbytes() // x.element_size()
    return x.detach().as_strided((count,), (1,), 0)


def like(x: Tensor, flat: Tensor) -> Tensor:
    """The elements of `flat` that are where those of x are in its storage."""
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())

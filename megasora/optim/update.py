"""What an optimizer step is asked to do: `Task.optimizer_step(update)`, then `ShardedEMA.update(update)`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megasora.optim.ema import ShardedEMA


class Update(NamedTuple):
    """One update of weights, moments and averages.

    lr      learning rate
    number  updates that weights and moments have had before this one, from 0: the bias corrections use number + 1
    apply   0-dim bool on the device; False: weights, moments and averages stay as they are, bit for bit. None: True
    ema     the averages, which the optimizer may take along; None: it takes none
    """

    lr: float
    number: int
    apply: Tensor | None = None
    ema: ShardedEMA | None = None

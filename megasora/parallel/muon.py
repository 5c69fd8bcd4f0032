"""Muon on the partitions of ZeRO 1 and 2: each rank computes the steps of the matrices of which it owns elements.

    gradient, exp_avg (this rank's partitions)  -->  Nesterov momentum, elementwise
        --MatrixExchange, over data x context-->  whole matrices: those on a border of two partitions are exchanged
        --orthogonalize-->  steps  -->  this rank's elements of them

So the work is divided like the optimizer states. A matrix on a border is computed by each of its owners, which store
the same values up to the order of sums; every element of the weights has one owner. Parameters that are no matrices
have AdamW's steps, with the same learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.parallel.adamw import ADAM_MOMENTS, PartitionAdamW, PartitionStep, Update
from megasora.parallel.deepspeed_optimizers import OwnedRange
from megasora.parallel.mesh import Axis


@dataclass(frozen=True)
class MuonRule:
    """Which parameters have Muon's steps, and their direction.

    num_matrices   (name, parameter) -> number of matrices in its first dim, one below the other; 0: AdamW
    orthogonalize  see `megasora.optim.muon.orthogonalize`
    """

    num_matrices: Callable[[str, Tensor], int]
    orthogonalize: Callable[[Sequence[Tensor], Sequence[int]], None]


class MatrixExchange:
    """The whole parameters of one group of which this rank owns elements. All ranks of `axis` must create and call it.

    shapes   of the parameters of the group
    owned    what this rank owns of each; None: nothing
    """

    def __init__(self, shapes: Sequence[torch.Size], owned: Sequence[OwnedRange | None], axis: Axis):
        self.axis, self.shapes = axis, list(shapes)
        by_rank: list[list[OwnedRange | None]] = [[] for _ in range(axis.size)]
        dist.all_gather_object(by_rank, list(owned), group=axis.group)
        self.by_rank = by_rank
        self.indices = [index for index, part in enumerate(owned) if part is not None]  # of the whole parameters
        self.has_borders = any(sum(part is not None for part in parts) > 1 for parts in zip(*by_rank, strict=True))
        self.send = [self.shared_parts(axis.rank, other) for other in range(axis.size)]
        self.receive = [self.shared_parts(other, axis.rank) for other in range(axis.size)]

    def shared_parts(self, owner: int, other: int) -> list[tuple[int, OwnedRange]]:
        """(index of the parameter, what `owner` has of it) of the parameters of which both own elements."""
        if owner == other:
            return []
        pairs = zip(self.by_rank[owner], self.by_rank[other], strict=True)
        return [(index, part) for index, (part, needed) in enumerate(pairs) if part is not None and needed is not None]

    def owned(self, index: int) -> OwnedRange:
        """What this rank owns of a parameter of `indices`."""
        return self.by_rank[self.axis.rank][index]

    def gather(self, flat: Tensor) -> list[Tensor]:
        """This rank's partition of the group -> the whole parameters of `indices`: views of it, new where they have
        several owners."""
        whole = {}
        for index in self.indices:
            own, shape = self.owned(index), self.shapes[index]
            values = flat[own.offset : own.offset + own.count]
            if own.count < shape.numel():
                whole[index] = flat.new_empty(shape.numel())
                whole[index][own.start : own.start + own.count] = values
            else:
                whole[index] = values
        if self.has_borders:
            for (index, part), values in self.exchange(flat):
                whole[index][part.start : part.start + part.count] = values
        return [whole[index].view(self.shapes[index]) for index in self.indices]

    def exchange(self, flat: Tensor) -> list[tuple[tuple[int, OwnedRange], Tensor]]:
        """(index of the parameter, part), values: of all parts that this rank receives."""
        parts = [flat[p.offset : p.offset + p.count] for parts in self.send for _, p in parts]
        sent = torch.cat(parts) if parts else flat.new_empty(0)
        send_sizes, receive_sizes = ([sum(p.count for _, p in to) for to in by] for by in (self.send, self.receive))
        received = flat.new_empty(sum(receive_sizes))
        dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=self.axis.group)
        keys = [key for parts in self.receive for key in parts]
        return list(zip(keys, received.split([part.count for _, part in keys]), strict=True))


@dataclass(frozen=True)
class MatrixGroup:
    """A parameter group of matrices, as this rank sees it."""

    exchange: MatrixExchange
    num_matrices: list[int]  # of each parameter of `exchange.indices`


class MuonAdamW(PartitionAdamW):
    """Muon for the parameter groups whose flat master weights are keys of `matrices`, AdamW for the others.

    Muon, with momentum m and the learning rate lr:

        exp_avg <- m exp_avg + (1 - m) gradient;  update = m exp_avg + (1 - m) gradient  (Nesterov)
        weights <- (1 - lr weight_decay) weights - lr orthogonalize(update)

    Their averages are left to the caller of the step.
    """

    def __init__(self, groups: list[dict], orthogonalize: Callable, momentum: float, **adamw):
        super().__init__(groups, **adamw)
        self.orthogonalize, self.momentum = orthogonalize, momentum
        self.matrices: dict[Tensor, MatrixGroup] = {}  # by flat master weights, set when DeepSpeed has made them

    def moments(self, master: Tensor) -> tuple[str, ...]:
        return ADAM_MOMENTS[:1] if master in self.matrices else ADAM_MOMENTS

    @torch.no_grad()
    def update_partition(self, group: dict, step: PartitionStep, update: Update) -> None:
        if step.master not in self.matrices:
            super().update_partition(group, step, update)
            return
        matrices, exp_avg = self.matrices[step.master], self.state[step.master]["exp_avg"]
        grad = step.grad.to(exp_avg.dtype) * step.factor
        new_exp_avg = exp_avg.lerp(grad, 1 - self.momentum)
        steps = matrices.exchange.gather(grad.lerp_(new_exp_avg, self.momentum))
        torch.where(step.apply, new_exp_avg, exp_avg, out=exp_avg)
        self.orthogonalize(steps, matrices.num_matrices)
        master = step.master.detach()
        for index, whole in zip(matrices.exchange.indices, steps, strict=True):
            own = matrices.exchange.owned(index)
            weights = master[own.offset : own.offset + own.count]
            new = weights * (1 - update.lr * group["weight_decay"])
            new.add_(whole.view(-1)[own.start : own.start + own.count], alpha=-update.lr)
            torch.where(step.apply, new, weights, out=weights)
        if step.out is not None:
            step.out.copy_(master)

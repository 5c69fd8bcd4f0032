"""Halo exchange: a convolution on a rank's piece of a clip gets the frames and rows around it from neighbouring ranks.

    [B, C, T, H, W] of each rank  --extend-->  [B, C, frames + T, border + H + border, W + 2 border]

Frames before the piece come from the preceding rank of the time axis. Then rows come from the ranks above and below,
with the frames just received, so that corners are right too. Beyond the clip are zeros. A rank sends to its neighbours
only, each value once. A rank that has fewer frames or rows than its neighbour needs passes on what it has received
itself. In the backward pass the gradient of a halo returns the same way and is added to that of the values it was
copied from, so gradients are those of one process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megasora.parallel.mesh import Axis

TIME, ROWS = 2, 3  # dims
Message = tuple[Tensor | None, int | None]  # (tensor, global rank of the other side); skipped if either is None


@dataclass(frozen=True)
class Side:
    """`size` slices along `dim`, beside a piece: before it, from the preceding rank (step 1), or after it, from the
    following rank (step -1)."""

    axis: Axis
    dim: int
    size: int
    step: int

    @property
    def source(self) -> int | None:
        """The global rank that sends this halo; None at the border of the clip."""
        return self.neighbour(-self.step)

    @property
    def destination(self) -> int | None:
        """The global rank that receives the halo of the same side from this rank."""
        return self.neighbour(self.step)

    def neighbour(self, step: int) -> int | None:
        rank = self.axis.rank + step
        return self.axis.global_rank(rank) if 0 <= rank < self.axis.size else None

    def is_short(self, x: Tensor) -> bool:
        """Whether x has fewer slices than the destination needs."""
        return x.shape[self.dim] < self.size

    def next_to_source(self, x: Tensor, count: int) -> Tensor:
        """The `count` slices of x at the end where the source is; a view."""
        return x.narrow(self.dim, 0 if self.step > 0 else x.shape[self.dim] - count, count)

    def next_to_destination(self, x: Tensor, count: int) -> Tensor:
        return x.narrow(self.dim, x.shape[self.dim] - count if self.step > 0 else 0, count)

    def empty(self, x: Tensor) -> Tensor:
        """An uninitialised halo of x, channels last in memory."""
        sizes = [self.size if dim == self.dim else size for dim, size in enumerate(x.shape)]
        return x.new_empty(sizes[0], *sizes[2:], sizes[1]).movedim(-1, 1)

    def sent(self, x: Tensor, halo: Tensor | None) -> Tensor:
        """What the destination needs: the slices of x next to it, and of this rank's halo if x is short."""
        own = min(self.size, x.shape[self.dim])
        edge = self.next_to_destination(x, own)
        if own < self.size:
            halo = torch.zeros_like(self.empty(x)) if halo is None else halo
            parts = [self.next_to_destination(halo, self.size - own), edge]
            edge = torch.cat(parts if self.step > 0 else parts[::-1], self.dim)
        return edge

    def add_returned(self, returned: Tensor | None, grad: Tensor, halo_grad: Tensor | None) -> None:
        """Adds the gradient of `sent`, None if there is no destination, to those of x and of this rank's halo, in
        place."""
        if returned is None:
            return
        own = min(self.size, grad.shape[self.dim])
        self.next_to_destination(grad, own).add_(self.next_to_destination(returned, own))
        if own < self.size and halo_grad is not None:
            rest = self.size - own
            self.next_to_destination(halo_grad, rest).add_(self.next_to_source(returned, rest))


class Transfer:
    """Messages [B, C, ...] in flight, channels last. What is sent must stay unchanged until `wait`."""

    def __init__(self, sent: Iterable[Message], received: Iterable[Message], axis: Axis):
        self.sent = [(x.movedim(1, -1).contiguous(), rank) for x, rank in sent if x is not None and rank is not None]
        received = [(x.movedim(1, -1), rank) for x, rank in received if x is not None and rank is not None]
        ops = [dist.P2POp(dist.isend, x, rank, axis.group) for x, rank in self.sent]
        ops += [dist.P2POp(dist.irecv, x, rank, axis.group) for x, rank in received]
        self.works = dist.batch_isend_irecv(ops) if ops else []
        self.bytes_sent = sum(x.nbytes for x, _ in self.sent)

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class HaloBoundary:
    """The boundary (megasora/codec/vae/boundary.py) of the pieces of a clip that is split over ranks: in frames over
    `time`, in rows over `rows`; either may have one rank.

    All ranks of both axes must create one, and call `extend` in the same order. Kept for all clips and steps.
    """

    def __init__(self, time: Axis, rows: Axis):
        self.time, self.rows = time, rows
        self.starts_clip = time.rank == 0
        self.bytes_sent = 0  # by this rank, forward and backward
        for axis in (time, rows):
            if axis.is_split:  # NCCL needs all ranks of a group in its first operation
                dist.barrier(axis.group)

    def extend(self, x: Tensor, frames: int, border: int, layer: nn.Module) -> Tensor:
        """[B, C, T, H, W] -> [B, C, frames + T, H + 2 border, W + 2 border], differentiable.

        B, C, W and, on ranks of one time axis, H must be equal; on ranks of one rows axis T. Any T, H >= 0.
        """
        if not frames and not border:
            return x
        return Extend.apply(x, frames, border, self)

    def pop_bytes_sent(self) -> int:
        """`bytes_sent` since the last call; resets it."""
        sent, self.bytes_sent = self.bytes_sent, 0
        return sent

    def time_sides(self, frames: int) -> list[Side]:
        return [Side(self.time, TIME, frames, 1)] if frames and self.time.is_split else []

    def rows_sides(self, border: int) -> list[Side]:
        return [Side(self.rows, ROWS, border, step) for step in (1, -1)] if border and self.rows.is_split else []

    def start(self, sent: Iterable[Message], received: Iterable[Message], axis: Axis) -> Transfer:
        transfer = Transfer(sent, received, axis)
        self.bytes_sent += transfer.bytes_sent
        return transfer

    def start_halos(self, x: Tensor, sides: list[Side]) -> tuple[list[Tensor | None], Transfer]:
        """Starts sending and receiving the halos of x, one per side; None at the border of the clip. `sides`: of one
        axis, at least one."""
        axis, halos = sides[0].axis, [side.empty(x) if side.source is not None else None for side in sides]
        pairs = list(zip(sides, halos, strict=True))
        if not any(side.is_short(x) for side in sides):
            sent = [(side.sent(x, None), side.destination) for side in sides if side.destination is not None]
            return halos, self.start(sent, [(halo, side.source) for side, halo in pairs], axis)
        for side, halo in pairs:  # a part of what is sent must first arrive
            self.start([], [(halo, side.source)], axis).wait()
            if side.destination is not None:
                self.start([(side.sent(x, halo), side.destination)], [], axis).wait()
        return halos, Transfer([], [], axis)

    def return_halos(self, grad: Tensor, halo_grads: list[Tensor], sides: list[Side]) -> None:
        """Returns the gradients of the halos to where they came from, and adds those of what this rank has sent to
        `grad`, in place."""
        axis, returned = sides[0].axis, [side.empty(grad) if side.destination is not None else None for side in sides]
        triples = list(zip(sides, halo_grads, returned, strict=True))
        if not any(side.is_short(grad) for side in sides):
            sent = [(halo_grad, side.source) for side, halo_grad, _ in triples]
            self.start(sent, [(x, side.destination) for side, _, x in triples], axis).wait()
            for side, halo_grad, x in triples:
                side.add_returned(x, grad, halo_grad)
            return
        for side, halo_grad, x in triples:
            halo_grad = halo_grad.clone() if side.source is not None else None
            self.start([], [(x, side.destination)], axis).wait()
            side.add_returned(x, grad, halo_grad)
            self.start([(halo_grad, side.source)], [], axis).wait()


class Extend(torch.autograd.Function):
    """`HaloBoundary.extend`. While frames are in flight, the piece is copied into the larger tensor."""

    @staticmethod
    def forward(ctx, x: Tensor, frames: int, border: int, halo: HaloBoundary) -> Tensor:
        ctx.frames, ctx.border, ctx.halo = frames, border, halo
        time, rows = halo.time_sides(frames), halo.rows_sides(border)
        arriving = halo.start_halos(x, time) if time else None
        out = F.pad(x, (border, border, border, border, frames, 0))
        inner, above, below = without_zeros(out, frames, border, halo.starts_clip)
        if arriving is not None:
            copy_arrived(arriving, [inner[:, :, :frames]])
        if rows:
            copy_arrived(halo.start_halos(inner, rows), [above, below])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        frames, border, halo = ctx.frames, ctx.border, ctx.halo
        time, rows = halo.time_sides(frames), halo.rows_sides(border)
        inner, above, below = without_zeros(grad, frames, border, halo.starts_clip)
        if time or rows:
            inner = inner.clone()
        if rows:
            halo.return_halos(inner, [above, below], rows)
        own = inner if halo.starts_clip else inner[:, :, frames:]
        if time:
            halo.return_halos(own, [inner[:, :, :frames]], time)
        return own, None, None, None


def copy_arrived(arriving: tuple[list[Tensor | None], Transfer], targets: list[Tensor]) -> None:
    """Waits for halos and copies each to where it belongs."""
    halos, transfer = arriving
    transfer.wait()
    for halo, target in zip(halos, targets, strict=True):
        if halo is not None:
            target.copy_(halo)


def without_zeros(out: Tensor, frames: int, border: int, starts_clip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of an extended piece: its rows, those above and those below; views without the columns beside the piece and, if
    it starts the clip, without the frames before it, all of which are zeros."""
    height, width = out.shape[ROWS] - 2 * border, out.shape[-1] - 2 * border
    out = out[:, :, frames if starts_clip else 0 :, :, border : border + width]
    above, inner, below = out.split([border, height, border], ROWS)
    return inner, above, below

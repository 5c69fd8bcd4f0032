"""Brings the pieces of a clip together: whole rows for the loss, and whole clips for pictures.

    rows_to_frames    [B, C, T, rows of this rank, W]  ->  [B, C, frames of this rank, H, W], differentiable
    gather_stack      the piece of each rank           ->  the whole stack on every rank, without a gradient

A loss that looks across rows (SSIM, differences of pixels) needs whole frames. The ranks that share the rows of frames
exchange rows for frames: afterwards each has all rows of some of the frames, and computes the loss of these. So the
loss of a clip is the sum of what its ranks compute, and so are all gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasora.parallel.clip_split import LATENTS, StackSplit, even_ranges
from megasora.parallel.halo import ROWS, TIME
from megasora.parallel.mesh import Axis


def rows_to_frames(x: Tensor, heights: list[int], axis: Axis) -> Tensor:
    """[B, C, T, heights[rank], W] -> [B, C, T', H, W]: the frames `even_ranges(T, axis.size)[rank]` with all rows.

    `heights`: rows of each rank of `axis`. T' may be 0. All ranks of the axis must call it.
    """
    frames = [stop - start for start, stop in even_ranges(x.shape[TIME], axis.size)]
    return RowsToFrames.apply(x, heights, frames, axis)


class RowsToFrames(torch.autograd.Function):
    """An all-to-all; the backward pass is its inverse. `heights`, `frames`: of each rank."""

    @staticmethod
    def forward(ctx, x: Tensor, heights: list[int], frames: list[int], axis: Axis) -> Tensor:
        ctx.heights, ctx.frames, ctx.axis = heights, frames, axis
        own = frames[axis.rank]
        received = [(*x.shape[:TIME], own, height, x.shape[-1]) for height in heights]
        return torch.cat(all_to_all(x.split(frames, TIME), received, axis), ROWS)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        own = ctx.heights[ctx.axis.rank]
        received = [(*grad.shape[:TIME], frames, own, grad.shape[-1]) for frames in ctx.frames]
        return torch.cat(all_to_all(grad.split(ctx.heights, ROWS), received, ctx.axis), TIME), None, None, None


def all_to_all(blocks: Sequence[Tensor], received_shapes: list[tuple[int, ...]], axis: Axis) -> list[Tensor]:
    """What each rank sends to this one. `blocks`: what goes to each; `received_shapes`: of what comes from each."""
    flat = torch.cat([block.reshape(-1) for block in blocks])
    sizes = [torch.Size(shape).numel() for shape in received_shapes]
    received = flat.new_empty(sum(sizes))
    dist.all_to_all_single(received, flat, sizes, [block.numel() for block in blocks], group=axis.group)
    return [part.view(shape) for part, shape in zip(received.split(sizes), received_shapes, strict=True)]


@torch.no_grad()
def gather_stack(
    x: Tensor | None, split: StackSplit, axis: Axis, like: Tensor, factors: Sequence[int] = LATENTS
) -> Tensor:
    """The whole stack [B, C, T, H, W] in a new tensor. All ranks of `axis`, the context axis, must call it.

    `x`: this rank's piece, None if it has none; `like`: a tensor of the shape of the stack, and of x's dtype and
    device; `factors`: of a latent in x.
    """
    whole = torch.empty_like(like, memory_format=torch.contiguous_format)
    for rank, piece in enumerate(split.pieces):
        if piece is not None:
            target = piece.take(whole, factors)
            if rank == axis.rank:
                target.copy_(x)
            if axis.is_split:
                block = target.contiguous()
                dist.broadcast(block, axis.global_rank(rank), group=axis.group)
                target.copy_(block)
    return whole

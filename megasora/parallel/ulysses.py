"""Ulysses (DeepSpeed-Ulysses, arXiv 2309.14509): ranks that share a pack exchange tokens for heads before attention,
and back after it, by all-to-alls.

The heads of a rank are exchanged and computed in groups, so that an all-to-all is in flight during the attention of
another group. Without recompute, for two groups:

    forward     network   | q k v 0 | q k v 1 |          | out 0 |       | out 1 |
                compute             | attention 0   | attention 1        |
    backward    network   | dout 0 | dout 1 |            | dq dk dv 0 |  | dq dk dv 1 |
                compute            | attention 0 backward | attention 1 backward |

The first all-to-all of a pass and the last one are exposed: `1 / groups` of all.

With `saved_output` (model.recompute=keep_attention) the recomputation returns the saved output at once. What the
backward pass of attention needs in the layout by heads, q, k, v and the output, is sent then, and waited for only by
that backward pass: it is in flight while the rest of the block is recomputed, and during the backward pass of the MLP
and of the cross-attention. To keep it instead would cost `8 width` bytes per token and block in bf16 (6 for q, k, v, 2
for the output), where keep_attention holds `4 width` otherwise.

Letters: `U` ranks of the Ulysses axis, `L` tokens of each, `N` heads of all, `M` heads of a group on one rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.parallel.collectives import Pending, wait
from megasora.parallel.mesh import Axis


def head_groups(heads: int) -> list[slice]:
    """The groups of the heads of one rank: `sqrt(heads / 2)` of them, rounded, of equal sizes within one.

    More groups expose less: 1 / groups of the all-to-alls. But each is a call of attention, whose last wave of thread
    blocks leaves half of a GPU idle on average. The all-to-alls of a forward pass last 0.2 waves per head (7 of 8
    tokens sent at 300 GB/s, a wave of 132 blocks of 128 queries at 600 TFLOP/s, whatever the length of the clip). The
    sum of both is least at this number for a pack of two or three clips. The first group is the smallest: q, k and v
    are three tensors, the output is one.
    """
    count = max(1, round(math.sqrt(heads / 2)))
    sizes = sorted((heads + group) // count for group in range(count))
    return [slice(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes), strict=True)]


@dataclass
class SavedOutput:
    """The only element of `saved_output`: what a recomputation needs of the first forward pass."""

    out_LNK: Tensor
    lse: list[Tensor]  # of each group
    arriving: list[Pending] = field(default_factory=list)  # sent by the recomputation, for the backward pass


class UlyssesAttention(Function):
    """q, k, v [L, N, K] of this rank's tokens -> [L, N, K]. `context`: see ContextAttention."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, context: Any, segments: Any, saved_output: list | None
    ) -> Tensor:
        axis = context.ulysses
        groups = head_groups(q.shape[1] // axis.size)
        ctx.context, ctx.segments, ctx.groups, ctx.saved_output = context, segments, groups, saved_output
        arriving = [context.all_to_all(tokens_by_peer((q, k, v), heads, axis)) for heads in groups]
        if saved_output:
            (saved,) = saved_output
            arriving_out = [context.all_to_all(tokens_by_peer((saved.out_LNK,), heads, axis)) for heads in groups]
            saved.arriving = arriving + arriving_out
            received = [qkv for qkv, _ in arriving]
            outs = [out.view(-1, *out.shape[-2:]) for out, _ in arriving_out]
            ctx.save_for_backward(*received, *outs, *saved.lse)
            return saved.out_LNK.detach()
        received, outs, lse, returning = [], [], [], []
        for pending in arriving:
            received.append(wait(pending))
            out, group_lse = context.attend_forward(*received[-1].flatten(0, 1).unbind(1), segments)
            returning.append(context.all_to_all(out.unflatten(0, (axis.size, -1))))
            outs.append(out)
            lse.append(group_lse)
        out_LNK = torch.empty_like(q, memory_format=torch.contiguous_format)
        for heads, pending in zip(groups, returning, strict=True):
            heads_of(out_LNK, heads, axis).copy_(wait(pending).movedim(0, 1))
        if saved_output is not None:
            saved_output.append(SavedOutput(out_LNK, lse))
        ctx.save_for_backward(*received, *outs, *lse)
        return out_LNK.detach()  # the returned tensor gets a graph, the saved one must not have one

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        context, groups, axis = ctx.context, ctx.groups, ctx.context.ulysses
        saved = ctx.saved_tensors  # a checkpointed block is recomputed now, if it has not been
        if ctx.saved_output:
            sent_by_recomputation, ctx.saved_output[0].arriving = ctx.saved_output[0].arriving, []
            for pending in sent_by_recomputation:
                wait(pending)
        arriving = [context.all_to_all(tokens_by_peer((grad_out,), heads, axis)) for heads in groups]
        by_group = (saved[i :: len(groups)] for i in range(len(groups)))
        returning = []
        for pending, (received, out, lse) in zip(arriving, by_group, strict=True):
            q, k, v = received.flatten(0, 1).unbind(1)
            grad = wait(pending)[:, :, 0].flatten(0, 1)
            gradients = torch.stack(context.attend_backward(grad, q, k, v, out, lse, ctx.segments), 1)
            returning.append(context.all_to_all(gradients.unflatten(0, (axis.size, -1))))
        dqkv = grad_out.new_empty(3, *grad_out.shape)
        for heads, pending in zip(groups, returning, strict=True):
            for x_LNK, gradient in zip(dqkv, wait(pending).unbind(2), strict=True):
                heads_of(x_LNK, heads, axis).copy_(gradient.movedim(0, 1))
        return *dqkv.unbind(), None, None, None


def heads_of(x_LNK: Tensor, heads: slice, axis: Axis) -> Tensor:
    """[L, U, M, K]: of the heads of each rank those of one group; a view."""
    return x_LNK.unflatten(1, (axis.size, -1))[:, :, heads]


def tokens_by_peer(tensors: Sequence[Tensor], heads: slice, axis: Axis) -> Tensor:
    """[U, L, len(tensors), M, K]: what each rank gets of tensors [L, N, K], the heads of one group that it has."""
    return torch.stack([heads_of(x_LNK, heads, axis).movedim(1, 0) for x_LNK in tensors], 2)

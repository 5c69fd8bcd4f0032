"""Self-attention over a pack whose tokens are on several ranks: q, k, v of this rank's tokens in, their outputs out.

The context axis is ring x ulysses. A ContextSplit assigns the pack's tokens to the ranks of the ring. The share of a
ring rank is divided into equal ranges of slots over its Ulysses ranks. These exchange tokens for heads, so that each
has all tokens of the share and some of the heads, and back after attention (`ulysses.py`).

Along the ring, each rank attends to its own keys, then to those of others (Ring Attention, arXiv 2310.01889), in the
exchanges planned by `ring_exchanges.py`. Partial softmaxes are merged by their log-sum-exp. The backward pass makes the
same exchanges; gradients of received keys are sent straight back.

Keys are sent by their owner directly to the ranks that need them, and ranks without a common clip exchange nothing. A
forwarding ring would also send keys and values that the neighbour does not need. The gradient of a key is summed by its
owner alone, in the order of the exchanges, so it does not depend on which rank was faster. The keys of the next
exchange are in flight while the current ones are computed with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.batch import VideoBatch
from megasora.kernels.attention import attention, attention_backward, attention_forward, prepare, reuse_or_compute
from megasora.kernels.merge_partial_attention import merge_partial_attention
from megasora.parallel.collectives import Pending, all_to_all_async
from megasora.parallel.mesh import Axis
from megasora.parallel.ring_exchanges import ContextSegments, RingExchange, build_context_segments
from megasora.parallel.ulysses import UlyssesAttention, head_groups


@dataclass(frozen=True)
class Transfer:
    """A send and a receive in flight. Keeps the sent tensor alive until the send has finished."""

    works: list[dist.Work]
    sent: Tensor | None
    received: Tensor | None

    def wait(self) -> Tensor | None:
        """The received tensor, complete; None if nothing is received."""
        for work in self.works:
            work.wait()
        return self.received


def prefetch_one(transfers: Iterator[Transfer]) -> Iterator[Transfer]:
    """The same transfers, each started one early: the first by this call, the next before the current is yielded."""
    following = next(transfers, None)

    def rest() -> Iterator[Transfer]:
        nonlocal following
        while following is not None:
            current, following = following, next(transfers, None)
            yield current

    return rest()


class ContextAttention:
    """Replaces `megasora.kernels.attention.attention` where ranks share a pack.

    All ranks of both axes must create one and call it in the same order. `backend` and `deterministic` as in
    `attention`.
    """

    def __init__(self, ring: Axis, ulysses: Axis, backend: str = "auto", deterministic: bool = True):
        self.ring, self.ulysses = ring, ulysses
        self.backend, self.deterministic = backend, deterministic
        self.bytes_sent = 0  # by this rank, forward and backward
        if ring.is_split:  # NCCL needs all ranks of a group in its first operation; an exchange may have only some
            dist.barrier(ring.group)

    def pop_bytes_sent(self) -> int:
        """`bytes_sent` since the last call; resets it."""
        sent, self.bytes_sent = self.bytes_sent, 0
        return sent

    def segments(self, batch: VideoBatch) -> ContextSegments:
        """The attention segments of a rank's share of a pack. ValueError if its split is for axes of other sizes."""
        split, local_tokens = batch.context_split, len(batch.patches_LP)
        if split is None:
            raise ValueError("this batch is not a share of a pack: it has no context_split")
        if split.ranks != self.ring.size or split.slots_per_rank != self.ulysses.size * local_tokens:
            raise ValueError(
                f"the split has {split.ranks} ranks of {split.slots_per_rank} slots, the axes {self.ring.size} (ring) "
                f"of {self.ulysses.size} (ulysses) x {local_tokens}"
            )
        return build_context_segments(split, self.ring.rank, batch.patches_LP.device)

    def prepared_segments(self, batch: VideoBatch, q: Tensor) -> ContextSegments:
        """`segments`, prepared for queries like `q` [0, N, K] with the heads of this rank outside of attention."""
        segments = self.segments(batch)
        for heads in head_groups(q.shape[1] // self.ulysses.size) if self.ulysses.is_split else [slice(None)]:
            for part in (segments.local, *(exchange.segments for exchange in segments.exchanges)):
                prepare(part, q[:, heads], self.backend, self.deterministic)
        return segments

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, segments: ContextSegments, saved_output: list | None = None
    ) -> Tensor:
        """q, k, v [L, N, K] of this rank's tokens -> [L, N, K], zeros at padding. Differentiable.

        `saved_output` as in `megasora.kernels.attention.attention`. A call that finds the result there makes no ring
        exchange; the all-to-alls of Ulysses are repeated, and in flight until the backward pass. ValueError on shapes
        that do not fit.
        """
        attend = self.attend
        if torch.compiler.is_compiling():  # as megasora.kernels.attention.attention
            attend = torch.compiler.disable(attend)
        return attend(q, k, v, segments, saved_output)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: ContextSegments, saved_output: list | None) -> Tensor:
        self.check_inputs(q, k, v, segments)
        if self.ulysses.is_split:
            return UlyssesAttention.apply(q, k, v, self, segments, saved_output)
        if self.ring.is_split:
            return RingAttention.apply(q, k, v, self, segments, saved_output)
        return attention(q, k, v, segments.local, saved_output, self.backend, self.deterministic)

    def check_inputs(self, q: Tensor, k: Tensor, v: Tensor, segments: ContextSegments) -> None:
        size = self.ulysses.size
        if not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype or q.ndim != 3:
            raise ValueError(
                f"q, k, v must have one shape [L, N, K] and one dtype, not {tuple(q.shape)} {q.dtype}, "
                f"{tuple(k.shape)} {k.dtype}, {tuple(v.shape)} {v.dtype}"
            )
        if len(q) * size != segments.num_slots:
            raise ValueError(
                f"q has {len(q)} tokens on each of {size} Ulysses ranks, the split has {segments.num_slots} slots"
            )
        if q.shape[1] % size:
            raise ValueError(f"{q.shape[1]} heads cannot be divided by {size} Ulysses ranks")

    def attend_forward(self, q: Tensor, k: Tensor, v: Tensor, segments: ContextSegments) -> tuple[Tensor, Tensor]:
        """out [L, N, K] and lse [L, N] of all tokens of this ring rank, for some heads."""
        if self.ring.is_split:
            return self.ring_forward(q, k, v, segments)
        return attention_forward(q, k, v, segments.local, self.backend, self.deterministic)

    def attend_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: ContextSegments
    ) -> tuple[Tensor, ...]:
        """dq, dk, dv of the same."""
        tensors = grad_out, q, k, v, out, lse
        if self.ring.is_split:
            return self.ring_backward(*tensors, segments)
        return attention_backward(*tensors, segments.local, self.backend, self.deterministic)

    def all_to_all(self, x: Tensor) -> Pending:
        """Starts an all-to-all: [peer, ...], what goes to each Ulysses peer -> [peer, ...], what came from each."""
        self.bytes_sent += x.nbytes // len(x) * (len(x) - 1)
        return all_to_all_async(x, self.ulysses)

    def ring_forward(self, q: Tensor, k: Tensor, v: Tensor, segments: ContextSegments) -> tuple[Tensor, Tensor]:
        """out [L, N, K] and lse [L, N] over the keys of all ranks."""
        exchanges = [exchange for exchange in segments.exchanges if exchange.num_sent or exchange.num_received]
        arrivals = prefetch_one(self.post_keys(exchange, k, v) for exchange in exchanges)
        out, lse = attention_forward(q, k, v, segments.local, self.backend, self.deterministic)
        out = out.to(lse.dtype)
        for exchange, arriving in zip(exchanges, arrivals, strict=True):
            keys = arriving.wait()
            if keys is not None:
                at = exchange.query_slots
                partial = attention_forward(q[at], *keys.unbind(), exchange.segments, self.backend, self.deterministic)
                out[at], lse[at] = merge_partial_attention(out[at], lse[at], *partial)
        return out.to(q.dtype), lse

    def ring_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: ContextSegments
    ) -> tuple[Tensor, ...]:
        """dq, dk, dv, accumulated in the dtype of `lse`: those of local keys first, then by distance.

        Two kinds of messages are in flight: keys, and returned gradients. NCCL runs a rank's exchanges one after the
        other, so all ranks must issue them in one order: keys of an exchange, then gradients of the one before, over
        all exchanges of the ring. In the forward pass there are only keys, and a rank can skip exchanges in which it
        does nothing.
        """
        arrivals = prefetch_one(self.post_keys(exchange, k, v) for exchange in segments.exchanges)
        local = attention_backward(grad_out, q, k, v, out, lse, segments.local, self.backend, self.deterministic)
        dq, dk, dv = (x.to(lse.dtype) for x in local)

        def return_gradients(exchange: RingExchange, arriving: Transfer) -> Transfer:
            gradients = self.exchange_backward(exchange, arriving.wait(), grad_out, q, out, lse, dq)
            return self.post_gradients(exchange, gradients, dk)

        exchanges = zip(segments.exchanges, arrivals, strict=True)
        returns = prefetch_one(return_gradients(*exchange) for exchange in exchanges)
        for exchange, returning in zip(segments.exchanges, returns, strict=True):
            gradients = returning.wait()  # in flight since before the computation of the next exchange
            if gradients is not None:
                dk[exchange.sent_slots] += gradients[0]
                dv[exchange.sent_slots] += gradients[1]
        return tuple(x.to(q.dtype) for x in (dq, dk, dv))

    def exchange_backward(
        self, exchange: RingExchange, keys: Tensor | None, grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor,
        dq: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """Gradients [2, l, N, K] of the received keys and values; None if none were received. Adds to `dq` in place."""
        if keys is None:
            return None
        at = exchange.query_slots
        dq_part, dk, dv = attention_backward(
            grad_out[at], q[at], *keys.unbind(), out[at], lse[at], exchange.segments, self.backend, self.deterministic
        )
        dq[at] += dq_part
        return torch.stack((dk, dv)).to(lse.dtype)

    def post_keys(self, exchange: RingExchange, k: Tensor, v: Tensor) -> Transfer:
        """Starts sending the keys and values [2, l, N, K] that dst needs as one message, and receiving those of src."""
        sent = torch.stack((k[exchange.sent_slots], v[exchange.sent_slots])) if exchange.num_sent else None
        received = k.new_empty(2, exchange.num_received, *k.shape[1:]) if exchange.num_received else None
        return self.post(sent, exchange.dst, received, exchange.src, 2 * exchange.distance)

    def post_gradients(self, exchange: RingExchange, gradients: Tensor | None, like: Tensor) -> Transfer:
        """Starts returning gradients of received keys to src, and receiving those of sent keys from dst."""
        received = like.new_empty(2, exchange.num_sent, *like.shape[1:]) if exchange.num_sent else None
        return self.post(gradients, exchange.src, received, exchange.dst, 2 * exchange.distance + 1)

    def post(self, sent: Tensor | None, dst: int, received: Tensor | None, src: int, tag: int) -> Transfer:
        """Starts both in one batch; `dst` and `src` are ranks of the ring."""
        group, ops = self.ring.group, []
        if sent is not None:
            ops.append(dist.P2POp(dist.isend, sent, self.ring.global_rank(dst), group, tag))
            self.bytes_sent += sent.nbytes
        if received is not None:
            ops.append(dist.P2POp(dist.irecv, received, self.ring.global_rank(src), group, tag))
        return Transfer(dist.batch_isend_irecv(ops) if ops else [], sent, received)


class RingAttention(torch.autograd.Function):
    """Attention over the keys of all ranks of the ring; saves q, k, v, out and lse, but no received keys."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, context: ContextAttention, segments: ContextSegments,
        saved_output: list | None,
    ) -> Tensor:  # fmt: skip
        out, lse = reuse_or_compute(saved_output, lambda: context.ring_forward(q, k, v, segments))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.context, ctx.segments = context, segments
        return out.detach()  # the returned tensor gets a graph, the saved one must not have one

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.context.ring_backward(grad_out.contiguous(), *ctx.saved_tensors, ctx.segments)
        return *gradients, None, None, None

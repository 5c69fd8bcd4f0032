"""Self-attention over a pack that lies on several ranks: q, k, v of this rank's tokens in, their outputs out.

The context axis is ring x ulysses. A PackPlan deals the pack's tokens to the ring's ranks. Along ulysses, the share of
a ring rank is cut into equal runs of slots; there, ranks swap tokens for heads, so that each has all the share's tokens
of some heads, and swap back afterwards (DeepSpeed-Ulysses, arXiv 2309.14509).

Along the ring, each rank attends to its own keys, then to those of others (Ring Attention, arXiv 2310.01889): at hop h,
rank r sends keys and values to rank r + h and receives those of rank r - h. Parts of a softmax are merged by their
log-sum-exp. The backward makes the same hops; what a rank finds out about another's keys goes straight back there.

Keys go from their owner directly to who needs them; they are not forwarded from neighbour to neighbour. In a pack, only
tokens of one clip need each other: a rank sends another the keys of those of its clips which the other has tokens of,
and ranks without a common clip make no hop. A ring that forwards carries along what the neighbour has no use for.
Gradients of keys, which the owner alone sums, in the order of the hops, do not depend on who was faster.

Every rank knows the plan, hence what the others send. The next hop's keys travel while this one's are computed with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.batch import PackPlan, VideoBatch
from megasora.kernels.attention import (
    Segments,
    attention,
    attention_backward,
    attention_forward,
    kept_or_computed,
)
from megasora.kernels.merge_partial_attention import merge_partial_attention
from megasora.parallel.mesh import Axis

Slots = slice | Tensor  # tokens of a rank: one run of them, or int64 numbers
Pieces = dict[int, tuple[int, int]]  # of a rank: segment to (first slot, number of tokens)


@dataclass(frozen=True)
class Hop:
    """This rank's part in a hop. It may have none: of a hop that others make, it must still know the turn."""

    distance: int
    to: int  # peer of the ring
    source: int
    num_sent: int  # tokens
    num_received: int
    sent: Slots
    queries: Slots  # who attends to what is received
    segments: Segments  # of these queries, counted from 0, and of what is received


@dataclass(frozen=True)
class ContextSegments:
    """Who attends to whom, and over which hops. Build one per pack and use it in every layer."""

    num_slots: int  # of a rank of the ring
    own: Segments
    hops: tuple[Hop, ...]  # all that any ranks make, nearest first


def build_segments(plan: PackPlan, rank: int, device: torch.device | str) -> ContextSegments:
    """What rank `rank` of the plan's ring computes, sends and receives."""
    pieces = pieces_by_rank(plan)
    mine = pieces[rank]
    own = segments_of(list(mine.values()), list(mine.values()), plan.tokens_per_rank, device)
    hops = []
    for distance in distances(plan):
        to, source = (rank + distance) % plan.ranks, (rank - distance) % plan.ranks
        sent = [piece for segment, piece in mine.items() if segment in pieces[to]]
        received = {segment: length for segment, (_, length) in pieces[source].items() if segment in mine}
        queries = {segment: piece for segment, piece in mine.items() if segment in received}
        queries_at, keys_at = side_by_side({s: n for s, (_, n) in queries.items()}), side_by_side(received)
        common = list(queries)
        num_queries = sum(n for _, n in queries.values())
        segments = segments_of([queries_at[s] for s in common], [keys_at[s] for s in common], num_queries, device)
        sizes = sum(n for _, n in sent), sum(received.values())
        at = slots_of(sent, device), slots_of(list(queries.values()), device)
        hops.append(Hop(distance, to, source, *sizes, *at, segments))
    return ContextSegments(plan.tokens_per_rank, own, tuple(hops))


def pieces_by_rank(plan: PackPlan) -> list[Pieces]:
    """ValueError if a rank has two pieces of a segment."""
    result: list[Pieces] = [{} for _ in range(plan.ranks)]
    filled = [0] * plan.ranks
    for rank, segment, first, last in plan.pieces_Q4.tolist():
        if last > first:
            if segment in result[rank]:
                raise ValueError(f"rank {rank} has two pieces of segment {segment}; a plan may give it one")
            result[rank][segment] = (filled[rank], last - first)
            filled[rank] += last - first
    return result


def distances(plan: PackPlan) -> list[int]:
    """How far apart on the ring two ranks with tokens of one segment are, over all of them."""
    real_Q4 = plan.pieces_Q4[plan.pieces_Q4[:, 3] > plan.pieces_Q4[:, 2]]
    rank_Q, segment_Q = real_Q4[:, 0], real_Q4[:, 1]
    found = torch.zeros(plan.ranks, dtype=torch.bool)
    segments, counts = segment_Q.unique(return_counts=True)
    for segment in segments[counts > 1]:
        ranks = rank_Q[segment_Q == segment]
        found[((ranks[:, None] - ranks) % plan.ranks).flatten()] = True
    found[0] = False
    return found.nonzero().flatten().tolist()


def side_by_side(lengths: dict[int, int]) -> Pieces:
    """Where the segments lie if one follows the other from 0."""
    result, at = {}, 0
    for segment, length in lengths.items():
        result[segment] = (at, length)
        at += length
    return result


def segments_of(
    queries: list[tuple[int, int]], keys: list[tuple[int, int]], num_queries: int, device: torch.device | str
) -> Segments:
    starts_and_lengths = (torch.tensor(side, dtype=torch.int64).view(-1, 2).unbind(1) for side in (queries, keys))
    (start_q, length_q), (start_k, length_k) = starts_and_lengths
    return Segments.from_ranges(start_q, length_q, start_k, length_k, num_queries, device)


def slots_of(runs: list[tuple[int, int]], device: torch.device | str) -> Slots:
    """The slots of some runs in rising order: one slice, which needs no copy, where they are adjacent."""
    if all(a + n == b for (a, n), (b, _) in zip(runs, runs[1:], strict=False)):
        return slice(runs[0][0], sum(runs[-1])) if runs else slice(0, 0)
    return torch.cat([torch.arange(start, start + length) for start, length in runs]).to(device)


@dataclass(frozen=True)
class Transfer:
    """Messages on their way. Holds what is sent until it has left."""

    works: list[dist.Work]
    sent: Tensor | None
    received: Tensor | None

    def wait(self) -> Tensor | None:
        for work in self.works:
            work.wait()
        return self.received


def taken_ahead(items: Iterator[Transfer]) -> Iterator[Transfer]:
    """The same items; the first is taken at once, any other before the one in front of it is handed out."""
    head = next(items, None)

    def rest() -> Iterator[Transfer]:
        nonlocal head
        while head is not None:
            current, head = head, next(items, None)
            yield current

    return rest()


class ContextAttention:
    """Takes the place of `megasora.kernels.attention.attention` where ranks share a pack. All ranks of both axes must
    make one, and call it in the same order. `backend` and `deterministic` as there."""

    def __init__(self, ring: Axis, ulysses: Axis, backend: str = "auto", deterministic: bool = True):
        self.ring, self.ulysses = ring, ulysses
        self.backend, self.deterministic = backend, deterministic
        self.bytes_sent = 0  # by this rank, forward and backward
        if ring.is_split:  # NCCL needs all of a group's ranks in its first operation, and hops may leave some out
            dist.barrier(ring.group)

    def take_bytes_sent(self) -> int:
        """`bytes_sent` since the last call."""
        taken, self.bytes_sent = self.bytes_sent, 0
        return taken

    def segments(self, batch: VideoBatch) -> ContextSegments:
        """For a rank's share of a pack. ValueError if its plan is for other axes."""
        plan, local = batch.plan, len(batch.patches_LP)
        if plan is None:
            raise ValueError("this batch is no share of a pack: it has no plan")
        if plan.ranks != self.ring.size or plan.tokens_per_rank != self.ulysses.size * local:
            raise ValueError(
                f"the plan has {plan.ranks} ranks of {plan.tokens_per_rank} tokens, the axes {self.ring.size} (ring) "
                f"of {self.ulysses.size} (ulysses) times {local}"
            )
        return build_segments(plan, self.ring.rank, batch.patches_LP.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: ContextSegments, kept: list | None = None) -> Tensor:
        """q, k, v [L, N, K] of this rank's tokens -> [L, N, K], zeros at padding. Differentiable.

        `kept` as in `megasora.kernels.attention.attention`. A run that finds the result there makes no hop; the swaps
        along ulysses take place again, as the backward needs what they bring. ValueError on shapes that do not fit.
        """
        num = self.ulysses.size
        if not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype or q.ndim != 3:
            raise ValueError(
                f"q, k, v must have one shape [L, N, K] and one dtype, not {tuple(q.shape)} {q.dtype}, "
                f"{tuple(k.shape)} {k.dtype}, {tuple(v.shape)} {v.dtype}"
            )
        if len(q) * num != segments.num_slots:
            raise ValueError(f"q has {len(q)} tokens on each of {num} ranks, its plan {segments.num_slots} together")
        if q.shape[1] % num:
            raise ValueError(f"{q.shape[1]} heads cannot be dealt to {num} ranks along ulysses")
        if num == 1:
            return self.attend(q, k, v, segments, kept)
        heads_of_peer = torch.stack((q, k, v), 1).unflatten(2, (num, -1)).movedim(2, 0)  # [peer, L, 3, N / num, K]
        q, k, v = SwapAlongUlysses.apply(heads_of_peer, self).flatten(0, 1).unbind(1)
        out = self.attend(q, k, v, segments, kept)
        tokens_of_peer = out.unflatten(0, (num, -1))  # [peer, L, N / num, K]
        return SwapAlongUlysses.apply(tokens_of_peer, self).movedim(0, 1).flatten(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: ContextSegments, kept: list | None) -> Tensor:
        """Of all tokens of this rank of the ring."""
        if not self.ring.is_split:
            return attention(q, k, v, segments.own, kept, self.backend, self.deterministic)
        return AttentionAlongRing.apply(q, k, v, self, segments, kept)

    def swap(self, x: Tensor) -> Tensor:
        """[peer, ...] of what each peer of ulysses shall have -> [peer, ...] of what each had for this rank."""
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=self.ulysses.group)
        self.bytes_sent += x.nbytes // len(x) * (len(x) - 1)
        return received

    def ring_forward(self, q: Tensor, k: Tensor, v: Tensor, segments: ContextSegments) -> tuple[Tensor, Tensor]:
        """out and lse over the keys of all ranks."""
        hops = [hop for hop in segments.hops if hop.num_sent or hop.num_received]
        arrivals = taken_ahead(self.post_keys(hop, k, v) for hop in hops)
        out, lse = attention_forward(q, k, v, segments.own, self.backend)
        out = out.to(lse.dtype)
        for hop, arriving in zip(hops, arrivals, strict=True):
            keys = arriving.wait()
            if keys is not None:
                at = hop.queries
                part = attention_forward(q[at], *keys.unbind(), hop.segments, self.backend)
                out[at], lse[at] = merge_partial_attention(out[at], lse[at], *part)
        return out.to(q.dtype), lse

    def ring_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: ContextSegments
    ) -> tuple[Tensor, ...]:
        """dq, dk, dv, summed in the dtype of `lse`: own part first, then by distance.

        Two kinds of messages are under way here: keys, and gradients on their way back. NCCL makes a rank's exchanges
        one after the other, so all ranks must have them in one order: keys of a hop, then gradients of the hop before,
        over all hops that anybody makes. Forward, where there are but keys, a rank can look beyond hops that skip it.
        """
        arrivals = taken_ahead(self.post_keys(hop, k, v) for hop in segments.hops)
        how = self.backend, self.deterministic
        own = attention_backward(grad_out, q, k, v, out, lse, segments.own, *how)
        dq, dk, dv = (x.to(lse.dtype) for x in own)

        def add_returned(hop: Hop, returning: Transfer) -> None:
            gradients = returning.wait()
            if gradients is not None:
                dk[hop.sent] += gradients[0]
                dv[hop.sent] += gradients[1]

        last: tuple[Hop, Transfer] | None = None
        for hop, arriving in zip(segments.hops, arrivals, strict=True):
            keys, gradients = arriving.wait(), None
            if keys is not None:
                at = hop.queries
                dq_h, dk_h, dv_h = attention_backward(
                    grad_out[at], q[at], *keys.unbind(), out[at], lse[at], hop.segments, *how
                )
                dq[at] += dq_h
                gradients = torch.stack((dk_h, dv_h)).to(lse.dtype)
            returning = self.post_gradients(hop, gradients, dk)
            if last is not None:  # it had this hop's computation to travel
                add_returned(*last)
            last = hop, returning
        if last is not None:
            add_returned(*last)
        return tuple(x.to(q.dtype) for x in (dq, dk, dv))

    def post_keys(self, hop: Hop, k: Tensor, v: Tensor) -> Transfer:
        """Own keys and values [2, l, N, K] in one message to where they are needed."""
        sent = torch.stack((k[hop.sent], v[hop.sent])) if hop.num_sent else None
        received = k.new_empty(2, hop.num_received, *k.shape[1:]) if hop.num_received else None
        return self.post(sent, hop.to, received, hop.source, 2 * hop.distance)

    def post_gradients(self, hop: Hop, gradients: Tensor | None, like: Tensor) -> Transfer:
        """The way back of `post_keys`."""
        received = like.new_empty(2, hop.num_sent, *like.shape[1:]) if hop.num_sent else None
        return self.post(gradients, hop.source, received, hop.to, 2 * hop.distance + 1)

    def post(self, sent: Tensor | None, to: int, received: Tensor | None, source: int, tag: int) -> Transfer:
        group, ops = self.ring.group, []
        if sent is not None:
            ops.append(dist.P2POp(dist.isend, sent, self.ring.global_rank(to), group, tag))
            self.bytes_sent += sent.nbytes
        if received is not None:
            ops.append(dist.P2POp(dist.irecv, received, self.ring.global_rank(source), group, tag))
        return Transfer(dist.batch_isend_irecv(ops) if ops else [], sent, received)


class SwapAlongUlysses(torch.autograd.Function):
    """Its own adjoint: a gradient goes back to whom the value came from."""

    @staticmethod
    def forward(ctx, x: Tensor, context: ContextAttention) -> Tensor:
        ctx.context = context
        return context.swap(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.context.swap(grad), None


class AttentionAlongRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, context: ContextAttention, segments: ContextSegments, kept: list | None) -> Tensor:
        out, lse = kept_or_computed(kept, lambda: context.ring_forward(q, k, v, segments))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.context, ctx.segments = context, segments
        return out.detach()  # what is returned gets a history, what is kept must not

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.context.ring_backward(grad_out.contiguous(), *ctx.saved_tensors, ctx.segments)
        return *gradients, None, None, None

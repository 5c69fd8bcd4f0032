"""Attention inside segments: softmax(q k^T / sqrt(K)) v, each segment by itself, forward and backward.

    s[i,j] = q[i] . k[j] / sqrt(K)          j over the keys of i's segment
    lse[i] = log sum_j exp s[i,j]
    p[i,j] = exp(s[i,j] - lse[i])
    out[i] = sum_j p[i,j] v[j]

    dv[j] = sum_i p[i,j] dout[i]            delta[i] = dout[i] . out[i]
    ds[i,j] = p[i,j] (dout[i] . v[j] - delta[i]) / sqrt(K)
    dq[i] = sum_j ds[i,j] k[j]              dk[j] = sum_i ds[i,j] q[i]

Queries `[Lq, N, K]` and keys `[Lk, N, K]` hold each segment's tokens side by side; a query of no segment gets zeros.
Segments of similar length are computed together, padded to the longest of their bucket, so that a pack of hundreds of
short clips costs a few calls, and a pack of one long clip costs neither padding nor copies.

The backward needs `out` and `lse` of the forward alone. Both may come from a softmax over more keys than are given: p
and delta are then those of the larger softmax, and dq, dk and dv these keys' part in its gradients. So keys that lie on
several ranks can be worked off one part after another: outputs merge by their lse, gradients are plain sums.

What computes a bucket depends on the device: PyTorch's flash attention for CPUs; on GPUs its flash attention for 16-bit
numbers without padding, its memory-efficient attention otherwise; the equations above for what these do not take.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

BUCKET_WASTE = 1.35  # a bucket's longest run of queries over its shortest
KEY_WASTE = 4.0  # and of keys: these are uneven in captions, whose padding costs little
LSE_ALIGNMENT = 32  # memory-efficient attention reads the log-sum-exp of so many queries at once
BIAS_ALIGNMENT = 16  # and its bias in runs of so many keys

Ranges = list[tuple[int, int]]  # (first token, number of tokens)


@dataclass(frozen=True)
class Side:
    """The queries, or the keys, of a bucket's `g` segments: token numbers [g, m], m the longest segment's length."""

    index: Tensor  # int64 [g, m]; a shorter segment repeats its first token
    real: Tensor | None  # bool [g, m]: what is no such repetition; None if nothing is
    places: Tensor  # int64: where the real tokens are in the flattened [g, m]
    start: int | None  # all tokens are one run from here, so that a view takes the place of copies
    shared: bool  # a token may be in several segments

    @classmethod
    def from_ranges(cls, ranges: Ranges, shared: bool, device: torch.device | str) -> Side:
        starts, lengths = torch.tensor(ranges).unbind(1)
        columns = torch.arange(int(lengths.max()))
        real = columns < lengths[:, None]
        index = starts[:, None] + columns.where(real, 0)
        flat = index.flatten()
        is_run = bool(real.all()) and bool((flat.diff() == 1).all()) and not shared
        return cls(
            index.to(device),
            None if bool(real.all()) else real.to(device),
            real.flatten().nonzero().flatten().to(device),
            int(flat[0]) if is_run else None,
            shared,
        )

    def take(self, x: Tensor) -> Tensor:
        """[L, ...] -> [g, m, ...]"""
        if self.start is not None:
            return x.narrow(0, self.start, self.index.numel()).unflatten(0, self.index.shape)
        return x.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)

    def put(self, x: Tensor, into: Tensor) -> None:
        """The real ones of [g, m, ...] to their places in [L, ...]; values of a shared token add up."""
        flat, index = x.flatten(0, 1), self.index.flatten()
        if self.start is not None:
            into.narrow(0, self.start, len(flat)).copy_(flat)
            return
        if self.real is not None:
            flat, index = flat.index_select(0, self.places), index.index_select(0, self.places)
        (into.index_add_ if self.shared else into.index_copy_)(0, index, flat)


class Bucket(NamedTuple):
    queries: Side
    keys: Side


@dataclass(frozen=True)
class Segments:
    """Which queries see which keys. Build one per pack and use it in every layer."""

    queries: Ranges  # of each segment
    keys: Ranges
    num_queries: int
    num_keys: int  # how many keys there must be at least
    buckets: tuple[Bucket, ...]

    @classmethod
    def from_cu_seqlens(cls, cu_q: Tensor, cu_k: Tensor, num_queries: int, device: torch.device | str) -> Segments:
        """Segments one after the other from the first token. `cu_q`, `cu_k`: integers [G + 1] on the CPU, rising, from
        0. Raises ValueError for other input."""
        for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
            if cu.ndim != 1 or len(cu) < 2 or int(cu[0]) != 0 or bool((cu.diff() < 0).any()):
                raise ValueError(f"{name} must be cumulative lengths from 0, not {cu.tolist()[:8]}")
        if len(cu_q) != len(cu_k):
            raise ValueError(f"cu_q has {len(cu_q) - 1} segments, cu_k {len(cu_k) - 1}")
        if int(cu_q[-1]) > num_queries:
            raise ValueError(f"cu_q ends at {int(cu_q[-1])}, behind the last of {num_queries} queries")
        return cls.from_ranges(cu_q[:-1], cu_q.diff(), cu_k[:-1], cu_k.diff(), num_queries, device)

    @classmethod
    def from_ranges(
        cls,
        start_q: Tensor,
        length_q: Tensor,
        start_k: Tensor,
        length_k: Tensor,
        num_queries: int,
        device: torch.device | str,
    ) -> Segments:
        """Segment g is queries `start_q[g] ...` and keys `start_k[g] ...`, so many as its lengths say; integers [G] on
        the CPU, G may be 0. A query is in one segment at most, a key may be in several. ValueError for other input."""
        queries, keys = (
            list(zip(starts.tolist(), lengths.tolist(), strict=True))
            for starts, lengths in ((start_q, length_q), (start_k, length_k))
        )
        if len(queries) != len(keys):
            raise ValueError(f"{len(queries)} ranges of queries, {len(keys)} of keys")
        if any(start < 0 or length < 0 for start, length in queries + keys):
            raise ValueError(f"ranges must not begin or end before 0: queries {queries[:4]}, keys {keys[:4]}")
        if overlap(queries):
            raise ValueError(f"a query is in two segments: {sorted(queries)[:8]}")
        if end_of(queries) > num_queries:
            raise ValueError(f"segments end at query {end_of(queries)}, behind the last of {num_queries}")
        shared = overlap(keys)
        at_work = [g for g in range(len(queries)) if queries[g][1] and keys[g][1]]
        buckets = tuple(
            Bucket(
                Side.from_ranges([queries[g] for g in similar], False, device),
                Side.from_ranges([keys[g] for g in similar], shared, device),
            )
            for close in runs_of_similar(at_work, [length for _, length in queries], BUCKET_WASTE)
            for similar in runs_of_similar(close, [length for _, length in keys], KEY_WASTE)
        )
        return cls(queries, keys, num_queries, end_of(keys), buckets)


def overlap(ranges: Ranges) -> bool:
    ordered = sorted(r for r in ranges if r[1])
    return any(a + n > b for (a, n), (b, _) in zip(ordered, ordered[1:], strict=False))


def end_of(ranges: Ranges) -> int:
    return max((start + length for start, length in ranges), default=0)


def runs_of_similar(members: list[int], lengths: list[int], waste: float) -> list[list[int]]:
    """`members` in order of their lengths, cut where a length is more than `waste` times that of its run's first."""
    runs: list[list[int]] = []
    for g in sorted(members, key=lambda g: (lengths[g], g)):
        if runs and lengths[g] <= waste * lengths[runs[-1][0]]:
            runs[-1].append(g)
        else:
            runs.append([g])
    return runs


def attention_reference(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """The maths, segment by segment, at least in fp32; shapes as in `attention_forward`. Differentiable."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q, dtype=wide), torch.full(q.shape[:2], -math.inf, dtype=wide, device=q.device)
    for (a, m), (c, n) in zip(segments.queries, segments.keys, strict=True):
        if m and n:
            scores = torch.einsum("qnk,snk->nqs", q[a : a + m].to(wide), k[c : c + n].to(wide)) / math.sqrt(q.shape[-1])
            out[a : a + m] = torch.einsum("nqs,snk->qnk", scores.softmax(-1), v[c : c + n].to(wide))
            lse[a : a + m] = scores.logsumexp(-1).T
    return out.to(q.dtype), lse


class Backend(NamedTuple):
    """What computes one bucket: q [g, N, mq, K], k, v [g, N, mk, K], lse [g, N, mq]; bias [g, N, mq, mk] of 0 and -inf,
    which is added to the scores, or None.

    forward(q, k, v, bias) -> out, lse        backward(grad_out, q, k, v, out, lse, bias) -> dq, dk, dv
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def plain_scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.matmul(q, k.mT) / math.sqrt(q.shape[-1])
    return scores if bias is None else scores + bias


def plain_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    q_wide, k_wide, v_wide = widened(q, k, v)
    scores = plain_scores(q_wide, k_wide, bias)
    return torch.matmul(scores.softmax(-1), v_wide).to(q.dtype), scores.logsumexp(-1)


def plain_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    g_wide, q_wide, k_wide, v_wide, out_wide = widened(grad_out, q, k, v, out)
    p = (plain_scores(q_wide, k_wide, bias) - lse[..., None]).exp()
    delta = (g_wide * out_wide).sum(-1, keepdim=True)
    ds = p * (torch.matmul(g_wide, v_wide.mT) - delta) / math.sqrt(q.shape[-1])
    gradients = torch.matmul(ds, k_wide), torch.matmul(ds.mT, q_wide), torch.matmul(p.mT, g_wide)
    return tuple(x.to(q.dtype) for x in gradients)


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)


def cpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, False, attn_mask=bias
    )


def flash_forward(q: Tensor, k: Tensor, v: Tensor, bias: None) -> tuple[Tensor, Tensor]:
    q, k, v = aligned(q), aligned(k), aligned(v)
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = aligned(q), aligned(k), aligned(v)
    no_dropout = torch.empty(0, dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        grad_out, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, False, no_dropout, no_dropout
    )


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = aligned(q), aligned(k), aligned(v)
    out, lse, _, _ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, compute_log_sumexp=True)
    return out, lse[..., : q.shape[2]]  # padded by the kernel


def efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = aligned(q), aligned(k), aligned(v)
    # As its forward pads it: exp(s - inf) = 0, so that queries which are not there have no part in dk and dv.
    padded_lse = F.pad(lse, (0, -lse.shape[-1] % LSE_ALIGNMENT), value=math.inf).contiguous()
    no_dropout = torch.empty(0, dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, bias, out, padded_lse, no_dropout, no_dropout, 0.0, [True, True, True, False]
    )[:3]


def aligned(x: Tensor) -> Tensor:
    """GPU kernels read 16 bytes at once: a copy where `x` [g, N, m, K] does not let them, which is rare."""
    fits = x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


PLAIN = Backend(plain_forward, plain_backward)
CPU = Backend(cpu_forward, cpu_backward)
FLASH = Backend(flash_forward, flash_backward)
EFFICIENT = Backend(efficient_forward, efficient_backward)


def backend_for(q: Tensor, is_padded: bool) -> Backend:
    """For queries [..., K] of a bucket whose keys are padded or not."""
    if q.device.type == "cpu":
        return CPU
    if q.device.type != "cuda" or q.dtype == torch.float64 or q.shape[-1] % 8:
        return PLAIN
    if torch.cuda.get_device_capability(q.device) < (8, 0):  # neither has all dtypes there
        return PLAIN
    is_flash = not is_padded and q.dtype != torch.float32 and q.shape[-1] <= 256
    return FLASH if is_flash else EFFICIENT


def key_bias(bucket: Bucket, dtype: torch.dtype, num_heads: int) -> Tensor | None:
    """[g, N, mq, mk]: 0 at keys, -inf at their padding; None without padding."""
    real = bucket.keys.real
    if real is None:
        return None
    num_segments, mk = real.shape
    stored = torch.zeros(num_segments, 1, 1, mk + -mk % BIAS_ALIGNMENT, dtype=dtype, device=real.device)
    bias = stored[..., :mk].masked_fill_(~real[:, None, None], -math.inf)
    return bias.expand(num_segments, num_heads, bucket.queries.index.shape[1], mk)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """`q` [Lq, N, K], `k`, `v` [Lk, N, K] -> out [Lq, N, K] and lse [Lq, N], at least fp32; out is 0 and lse -inf where
    a query has no key. Records no gradient. ValueError on shapes that do not fit."""
    check_inputs(q, k, v, segments)
    outs, lses = [], []
    with torch.no_grad():
        for bucket in segments.buckets:
            q_b, k_b, v_b = by_head(bucket.queries, q), by_head(bucket.keys, k), by_head(bucket.keys, v)
            bias = key_bias(bucket, q.dtype, q.shape[1])
            out_b, lse_b = backend_for(q, bias is not None).forward(q_b, k_b, v_b, bias)
            outs.append((bucket.queries, out_b.transpose(1, 2)))
            lses.append((bucket.queries, lse_b.transpose(1, 2)))
        lse_like = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        return assembled(outs, q, 0.0), assembled(lses, lse_like, -math.inf)


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [Lq, N, K], dk, dv [Lk, N, K] in the dtype of `q`. `out` and `lse` may be those of a softmax over more keys
    than these: the result is then these keys' part of the gradient. ValueError on shapes that do not fit."""
    check_inputs(q, k, v, segments)
    for name, x, shape in (("grad_out", grad_out, q.shape), ("out", out, q.shape), ("lse", lse, q.shape[:2])):
        if x.shape != shape:
            raise ValueError(f"{name} is {tuple(x.shape)}, its queries are {tuple(q.shape)}")
    dqs, dks, dvs = [], [], []
    with torch.no_grad():
        grad_out, out = grad_out.contiguous(), out.contiguous()  # what the kernels assume
        for bucket in segments.buckets:
            q_b, k_b, v_b = by_head(bucket.queries, q), by_head(bucket.keys, k), by_head(bucket.keys, v)
            grad_b, out_b = by_head(bucket.queries, grad_out), by_head(bucket.queries, out)
            lse_b = bucket.queries.take(lse)
            if bucket.queries.real is not None:  # a repeated query must not count twice: p = exp(s - inf) = 0
                lse_b = lse_b.masked_fill(~bucket.queries.real[..., None], math.inf)
            bias = key_bias(bucket, q.dtype, q.shape[1])
            backward = backend_for(q, bias is not None).backward
            dq_b, dk_b, dv_b = backward(grad_b, q_b, k_b, v_b, out_b, lse_b.transpose(1, 2), bias)
            dqs.append((bucket.queries, dq_b.transpose(1, 2)))
            dks.append((bucket.keys, dk_b.transpose(1, 2)))
            dvs.append((bucket.keys, dv_b.transpose(1, 2)))
        return assembled(dqs, q, 0.0), assembled(dks, k, 0.0), assembled(dvs, v, 0.0)


def by_head(side: Side, x: Tensor) -> Tensor:
    """[L, N, K] -> [g, N, m, K]"""
    return side.take(x).transpose(1, 2)


def assembled(parts: list[tuple[Side, Tensor]], like: Tensor, fill: float) -> Tensor:
    """The buckets' results [g, m, ...] in one tensor of the shape and dtype of `like`, `fill` where there is none."""
    if len(parts) == 1:
        side, x = parts[0]
        if side.start == 0 and side.index.numel() == len(like):
            return x.flatten(0, 1).contiguous()
    result = torch.full(like.shape, fill, dtype=like.dtype, device=like.device)
    for side, x in parts:
        side.put(x, result)
    return result


def check_inputs(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> None:
    if q.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be [L, N, K] with equal N and K"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if len(q) != segments.num_queries:
        raise ValueError(f"q has {len(q)} tokens, its segments were made for {segments.num_queries}")
    if len(k) < segments.num_keys:
        raise ValueError(f"k has {len(k)} tokens, its segments end at {segments.num_keys}")


def merge_partial_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the keys of a and b together, from attention to each: out [L, N, K], lse [L, N], at least fp32.

    out = out_a + w (out_b - out_a), w = exp(lse_b) / (exp(lse_a) + exp(lse_b)): the weights sum to one whatever
    rounding did to the two lse. A side without keys (lse -inf, out 0) leaves the other as it is.
    """
    wide = torch.promote_types(out_a.dtype, torch.float32)
    lse_a, lse_b = lse_a.to(wide), lse_b.to(wide)
    w = torch.sigmoid(lse_b - lse_a).masked_fill(lse_b == -math.inf, 0.0)
    return torch.lerp(out_a.to(wide), out_b.to(wide), w[..., None]), torch.logaddexp(lse_a, lse_b)


def kept_or_computed(kept: list | None, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) from `kept` where a run before this one left them, otherwise computed and left there."""
    if kept:
        out, lse = kept
        return out, lse
    result = compute()
    if kept is not None:
        kept.extend(result)
    return result


class SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, segments: Segments, kept: list | None) -> Tensor:
        out, lse = kept_or_computed(kept, lambda: attention_forward(q, k, v, segments))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments = segments
        return out.detach()  # what is returned gets a history, what is kept must not

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return *attention_backward(grad_out, *ctx.saved_tensors, ctx.segments), None, None


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, kept: list | None = None) -> Tensor:
    """`q` [Lq, N, K], `k`, `v` [Lk, N, K] -> [Lq, N, K]; zeros where a query has no key. ValueError on other shapes.

    `kept` is for a forward that is run again in the backward pass (activation recompute): the first run puts its result
    into the empty list, later runs with the same list take it from there and compute nothing.
    """
    return SegmentAttention.apply(q, k, v, segments, kept)

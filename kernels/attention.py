"""Attention inside segments: softmax(q k^T / sqrt(K)) v, each segment by itself.

    out[i] = sum_j softmax_j(q[i] . k[j] / sqrt(K)) v[j]        j over the keys of i's segment

Queries `[Lq, N, K]` and keys `[Lk, N, K]` hold the segments one after the other; queries behind the last segment get
zeros. Segments of similar length are computed together, padded to the longest of their bucket, so that a pack of
hundreds of short clips costs a few calls, and a pack of one long clip costs no padding at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

BUCKET_WASTE = 1.35  # a bucket's longest segment over its shortest


@dataclass(frozen=True)
class Bucket:
    """`g` segments side by side: queries [g, mq], keys [g, mk], mask [g, 1, 1, mk] or None if no key is padding."""

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Segments:
    """Which queries see which keys. Build one per pack with `from_cu_seqlens` and use it in every layer."""

    cu_q: Tensor  # int32 [G + 1], CPU
    cu_k: Tensor
    buckets: tuple[Bucket, ...]
    gather: Tensor = field(
        repr=False
    )  # [Lq]: where each query's result lies in the buckets' output; the last place is zeros

    @classmethod
    def from_cu_seqlens(cls, cu_q: Tensor, cu_k: Tensor, num_queries: int, device: torch.device | str) -> Segments:
        """`cu_q`, `cu_k`: int32 [G + 1], rising, from 0. Raises ValueError for other input."""
        for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
            if cu.ndim != 1 or len(cu) < 2 or int(cu[0]) != 0 or bool((cu.diff() < 0).any()):
                raise ValueError(f"{name} must be cumulative lengths from 0, not {cu.tolist()[:8]}")
        if len(cu_q) != len(cu_k):
            raise ValueError(f"cu_q has {len(cu_q) - 1} segments, cu_k {len(cu_k) - 1}")
        if int(cu_q[-1]) > num_queries:
            raise ValueError(f"cu_q ends at {int(cu_q[-1])}, behind the last of {num_queries} queries")
        starts_q, starts_k = cu_q[:-1].long(), cu_k[:-1].long()
        lengths_q, lengths_k = cu_q.diff().long(), cu_k.diff().long()
        order = sorted(
            (i for i in range(len(lengths_q)) if lengths_q[i] and lengths_k[i]),
            key=lambda i: (int(lengths_q[i]), int(lengths_k[i])),
        )
        groups: list[list[int]] = []
        for i in order:
            if groups and lengths_q[i] <= BUCKET_WASTE * lengths_q[groups[-1][0]]:
                groups[-1].append(i)
            else:
                groups.append([i])

        buckets, place = [], 0
        total = sum(len(g) * int(lengths_q[g].max()) for g in groups)
        gather = torch.full((num_queries,), total, dtype=torch.int64)
        for group in groups:
            g = torch.tensor(group)
            mq, mk = int(lengths_q[g].max()), int(lengths_k[g].max())
            cols_q, cols_k = torch.arange(mq), torch.arange(mk)
            real_q, real_k = cols_q < lengths_q[g, None], cols_k < lengths_k[g, None]
            queries = starts_q[g, None] + cols_q.where(real_q, 0)
            keys = starts_k[g, None] + cols_k.where(real_k, 0)
            gather[queries[real_q]] = place + torch.arange(len(group) * mq).view(len(group), mq)[real_q]
            mask = None if bool(real_k.all()) else real_k[:, None, None, :].to(device)
            buckets.append(Bucket(queries.to(device), keys.to(device), mask))
            place += len(group) * mq
        return cls(cu_q, cu_k, tuple(buckets), gather.to(device))


def attention_reference(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The maths, segment by segment, in the dtype of its input. Shapes as in `attention`."""
    out = torch.zeros_like(q)
    for a, b, c, d in zip(
        segments.cu_q[:-1].tolist(), segments.cu_q[1:].tolist(),
        segments.cu_k[:-1].tolist(), segments.cu_k[1:].tolist(), strict=True,
    ):  # fmt: skip
        if b > a and d > c:
            scores = torch.einsum("qnk,snk->nqs", q[a:b], k[c:d]) / math.sqrt(q.shape[-1])
            out[a:b] = torch.einsum("nqs,snk->qnk", scores.softmax(-1), v[c:d])
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`q` [Lq, N, K], `k`, `v` [Lk, N, K] -> [Lq, N, K]; zeros where a query has no key. ValueError on other shapes."""
    if q.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be [L, N, K] with equal N and K"
        )
    if len(q) != len(segments.gather):
        raise ValueError(f"q has {len(q)} tokens, its segments were made for {len(segments.gather)}")
    if len(k) < int(segments.cu_k[-1]):
        raise ValueError(f"k has {len(k)} tokens, its segments end at {int(segments.cu_k[-1])}")
    outs = []
    for bucket in segments.buckets:
        q_b, k_b, v_b = (
            x.index_select(0, index.reshape(-1)).view(*index.shape, *x.shape[1:]).transpose(1, 2)
            for x, index in ((q, bucket.queries), (k, bucket.keys), (v, bucket.keys))
        )
        out = F.scaled_dot_product_attention(q_b, k_b, v_b, attn_mask=bucket.mask)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    outs.append(q.new_zeros(1, *q.shape[1:]))
    return torch.cat(outs).index_select(0, segments.gather)

"""Attention within segments: softmax(q k^T / sqrt(K)) v of each segment, forward and backward.

    s[i,j] = q[i] . k[j] / sqrt(K)          j over the keys of i's segment
    lse[i] = log sum_j exp s[i,j]
    p[i,j] = exp(s[i,j] - lse[i])
    out[i] = sum_j p[i,j] v[j]

    dv[j] = sum_i p[i,j] dout[i]            delta[i] = dout[i] . out[i]
    ds[i,j] = p[i,j] (dout[i] . v[j] - delta[i]) / sqrt(K)
    dq[i] = sum_j ds[i,j] k[j]              dk[j] = sum_i ds[i,j] q[i]

Queries are `[Lq, N, K]`, keys `[Lk, N, K]`; `Segments` assigns keys to queries. A query without keys gets zeros.

Of the forward pass, the backward pass needs only `out` and `lse`. Both may come from a softmax over more keys than are
passed: p and delta are then those of the larger softmax, and dq, dk and dv the contributions of the passed keys. So
keys that are sharded over ranks can be processed one shard at a time: outputs merge by their lse, gradients add up.

All values of `backend` compute the same:

    flash4, flash3   the packages flash-attn-4 and flash-attn 3, if installed: 16 bit, on a Hopper GPU; flash4: or newer
    cudnn            cuDNN's attention, one call for all segments of one length: 16 bit, on a GPU, in any order only
    flash2           the package flash-attn 2, if installed: 16 bit, on a GPU
    varlen           the same with PyTorch's own flash attention
    sdpa             PyTorch's scaled dot product attention, one call per bucket: flash attention for CPUs; on GPUs
                     memory-efficient attention, or flash attention for 16 bit without padding
    math             the equations in PyTorch, one call per bucket, on any device
    auto             the fastest for the chip, dtype, head dim, order of sums and pack: attention_choice.py

GPU kernels sum dq by atomics, in an order that differs between runs. `deterministic` fixes the order, at some cost of
time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megasora.kernels.attention_choice import resolve_attention_backend
from megasora.kernels.attention_padded import buckets_of, padded_backward, padded_forward
from megasora.kernels.attention_varlen import VARLEN, backward_calls, varlen_backward, varlen_forward
from megasora.kernels.launch import check_device
from megasora.kernels.segments import Segments


def attention_reference(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Reference implementation, segment by segment, in fp32 at least; differentiable; as `attention_forward`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q, dtype=wide), torch.full(q.shape[:2], -math.inf, dtype=wide, device=q.device)
    for (a, m), (c, n) in zip(segments.queries, segments.keys, strict=True):
        if m and n:
            scores = torch.einsum("qnk,snk->nqs", q[a : a + m].to(wide), k[c : c + n].to(wide)) / math.sqrt(q.shape[-1])
            out[a : a + m] = torch.einsum("nqs,snk->qnk", scores.softmax(-1), v[c : c + n].to(wide))
            lse[a : a + m] = scores.logsumexp(-1).T
    return out.to(q.dtype), lse


def prepare(segments: Segments, q: Tensor, backend: str = "auto", deterministic: bool = True) -> None:
    """Computes what attention will read of `segments`, on the CPU, before there are queries: then no layer has to.

    `q`: [Lq, N, K] with the device, dtype, heads and head dim of the queries; its length may be 0. `backend` and
    `deterministic` as in `attention`. ValueError if the backend does not support such queries.
    """
    name = resolve_attention_backend(backend, q, segments, deterministic)
    if name not in VARLEN:
        buckets_of(name, segments)
    elif segments.varlen is not None:
        backward_calls(VARLEN[name], q, segments, deterministic)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str = "auto", deterministic: bool = True
) -> tuple[Tensor, Tensor]:
    """`q` [Lq, N, K], `k`, `v` [Lk, N, K] -> out [Lq, N, K] and lse [Lq, N], the latter in fp32 at least; out is 0 and
    lse -inf for queries without keys. Records no gradient. `deterministic`: as of the backward pass that will follow;
    the forward pass always is. ValueError for shapes that do not match or a backend that does not support the inputs.
    """
    check_inputs(q, k, v, segments)
    name = resolve_attention_backend(backend, q, segments, deterministic)
    with torch.no_grad():
        if name in VARLEN:
            return varlen_forward(VARLEN[name], q, k, v, segments.varlen)
        return padded_forward(name, q, k, v, segments)


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    backend: str = "auto",
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [Lq, N, K], dk, dv [Lk, N, K] in the dtype of `q`. `out` and `lse` may come from a softmax over more keys; the
    result is then the contribution of these keys. `deterministic`: bitwise reproducible. ValueError as of
    `attention_forward`."""
    check_inputs(q, k, v, segments)
    for name, x, shape in (("grad_out", grad_out, q.shape), ("out", out, q.shape), ("lse", lse, q.shape[:2])):
        if x.shape != shape:
            raise ValueError(f"{name} {tuple(x.shape)} must be {tuple(shape)}, as q is {tuple(q.shape)}")
    name = resolve_attention_backend(backend, q, segments, deterministic)
    tensors = grad_out, q, k, v, out, lse
    with torch.no_grad():
        if name in VARLEN:
            return varlen_backward(VARLEN[name], *tensors, segments, deterministic)
        return padded_backward(name, *tensors, segments, deterministic)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> None:
    if q.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be [L, N, K] with equal N and K"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have the same dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    check_device(q=q, k=k, v=v)
    if len(q) != segments.num_queries:
        raise ValueError(f"q has {len(q)} tokens, its segments {segments.num_queries} queries")
    if len(k) < segments.num_keys:
        raise ValueError(f"k has {len(k)} tokens, its segments end at {segments.num_keys}")


def reuse_or_compute(saved_output: list | None, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) from `saved_output` if it is not empty; otherwise from `compute`, and saved in the list if given."""
    if saved_output:
        out, lse = saved_output
        return out, lse
    result = compute()
    if saved_output is not None:
        saved_output.extend(result)
    return result


class SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, segments: Segments, saved_output: list | None, backend: str, deterministic: bool
    ) -> Tensor:
        out, lse = reuse_or_compute(saved_output, lambda: attention_forward(q, k, v, segments, backend, deterministic))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.backend, ctx.deterministic = segments, backend, deterministic
        return out.detach()  # the returned tensor gets a grad_fn, the saved one must not

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gradients = attention_backward(grad_out, *ctx.saved_tensors, ctx.segments, ctx.backend, ctx.deterministic)
        return *gradients, None, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    saved_output: list | None = None,
    backend: str = "auto",
    deterministic: bool = True,
) -> Tensor:
    """`q` [Lq, N, K], `k`, `v` [Lk, N, K] -> [Lq, N, K]; zeros for queries without keys. `deterministic`: gradients are
    bitwise reproducible. ValueError for shapes that do not match or a backend that does not support the inputs.

    `saved_output` is for activation recompute: the first call with an empty list saves its result in it, later calls
    with the same list reuse the result and compute nothing.

    torch.compile does not trace into this function: it would compile a version for the segments of each pack.
    """
    apply = SegmentAttention.apply
    if torch.compiler.is_compiling():
        apply = torch.compiler.disable(apply)
    return apply(q, k, v, segments, saved_output, backend, deterministic)

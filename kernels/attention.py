"""Attention inside segments: softmax(q k^T / sqrt(K)) v, each segment by itself, forward and backward.

    s[i,j] = q[i] . k[j] / sqrt(K)          j over the keys of i's segment
    lse[i] = log sum_j exp s[i,j]
    p[i,j] = exp(s[i,j] - lse[i])
    out[i] = sum_j p[i,j] v[j]

    dv[j] = sum_i p[i,j] dout[i]            delta[i] = dout[i] . out[i]
    ds[i,j] = p[i,j] (dout[i] . v[j] - delta[i]) / sqrt(K)
    dq[i] = sum_j ds[i,j] k[j]              dk[j] = sum_i ds[i,j] q[i]

Queries are `[Lq, N, K]`, keys `[Lk, N, K]`; which see which is said by Segments. A query without a key gets zeros.

The backward needs `out` and `lse` of the forward alone. Both may come from a softmax over more keys than are given: p
and delta are then those of the larger softmax, and dq, dk and dv these keys' part in its gradients. So keys that lie on
several ranks can be worked off one part after another: outputs merge by their lse, gradients are plain sums.

Who computes is the `backend`; all mean the same:

    flash3, flash2   the flash-attn packages, where installed: a pack in one call, 16 bit, on a GPU
    varlen           the same by PyTorch's own flash attention
    sdpa             PyTorch's attention, bucket by bucket: flash attention for CPUs; on GPUs memory-efficient
                     attention, or flash attention for 16 bit without padding
    math             the equations in PyTorch, bucket by bucket, anywhere
    auto             the first of these that can

Kernels for GPUs add up dq by atomics, in an order that changes from run to run. `deterministic` fixes the order, at the
price of some time and memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from megasora.kernels.attention_buckets import buckets_backward, buckets_forward
from megasora.kernels.attention_packs import FLASH2, FLASH3, VARLEN, missing, outdated, pack_backward, pack_forward
from megasora.kernels.launch import check_device
from megasora.kernels.segments import Segments


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


BACKENDS = ("flash3", "flash2", "varlen", "sdpa", "math")  # "auto" takes the first that can


@functools.cache
def obstacle(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why it cannot compute with such queries, None if it can."""
    if backend == "math" or (backend == "sdpa" and device.type == "cpu"):
        return None
    if device.type != "cuda":
        return f"it has no kernel for device {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
    if head_dim % 8:
        return f"head dim {head_dim} must be a multiple of 8"
    if backend == "sdpa":
        return "it takes no float64" if dtype == torch.float64 else None
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes bfloat16 and float16, not {dtype}"
    longest = 192 if backend == "flash3" else 256  # above, FlashAttention-3 has no deterministic backward
    if head_dim > longest:
        return f"it takes head dims to {longest}, not {head_dim}"
    if backend == "flash3":
        if capability[0] != 9:  # its machine code is for these alone
            return f"it needs compute capability 9, {device} has {capability[0]}.{capability[1]}"
        return missing(FLASH3)
    return missing(FLASH2) or outdated("flash_attn", (2, 7)) if backend == "flash2" else None


@functools.cache
def automatic(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return next(name for name in BACKENDS if obstacle(name, device, dtype, head_dim) is None)


def chosen_backend(backend: str, q: Tensor) -> str:
    """`backend` without "auto". ValueError for a word that is none of them, or where it cannot compute."""
    given = q.device, q.dtype, q.shape[-1]
    if backend == "auto":
        return automatic(*given)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be auto or one of {', '.join(BACKENDS)}")
    reason = obstacle(backend, *given)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot compute this: {reason}; use {automatic(*given)!r} or 'auto'")
    return backend


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`q` [Lq, N, K], `k`, `v` [Lk, N, K] -> out [Lq, N, K] and lse [Lq, N], at least fp32; out is 0 and lse -inf where
    a query has no key. Records no gradient. ValueError on shapes that do not fit, or a backend that cannot compute."""
    check_inputs(q, k, v, segments)
    name = chosen_backend(backend, q)
    with torch.no_grad():
        if name in VARLEN:
            return pack_forward(VARLEN[name], q, k, v, segments.varlen)
        return buckets_forward(name, q, k, v, segments)


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
    """dq [Lq, N, K], dk, dv [Lk, N, K] in the dtype of `q`. `out` and `lse` may be those of a softmax over more keys
    than these: the result is then these keys' part of the gradient. `deterministic`: the same bits at every run.
    ValueError as in `attention_forward`."""
    check_inputs(q, k, v, segments)
    for name, x, shape in (("grad_out", grad_out, q.shape), ("out", out, q.shape), ("lse", lse, q.shape[:2])):
        if x.shape != shape:
            raise ValueError(f"{name} is {tuple(x.shape)}, its queries are {tuple(q.shape)}")
    name = chosen_backend(backend, q)
    given = grad_out, q, k, v, out, lse
    with torch.no_grad():
        if name in VARLEN:
            return pack_backward(VARLEN[name], *given, segments.varlen, deterministic)
        return buckets_backward(name, *given, segments, deterministic)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> None:
    if q.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be [L, N, K] with equal N and K"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    check_device(q=q, k=k, v=v)
    if len(q) != segments.num_queries:
        raise ValueError(f"q has {len(q)} tokens, its segments were made for {segments.num_queries}")
    if len(k) < segments.num_keys:
        raise ValueError(f"k has {len(k)} tokens, its segments end at {segments.num_keys}")


def reuse_or_compute(saved_output: list | None, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) from `saved_output` where a run before this one left them, otherwise computed and left there."""
    if saved_output:
        out, lse = saved_output
        return out, lse
    result = compute()
    if saved_output is not None:
        saved_output.extend(result)
    return result


class SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, segments: Segments, saved_output: list | None, backend: str, deterministic: bool) -> Tensor:
        out, lse = reuse_or_compute(saved_output, lambda: attention_forward(q, k, v, segments, backend))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.backend, ctx.deterministic = segments, backend, deterministic
        return out.detach()  # what is returned gets a history, what is kept must not

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        how = ctx.segments, ctx.backend, ctx.deterministic
        return *attention_backward(grad_out, *ctx.saved_tensors, *how), None, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    saved_output: list | None = None,
    backend: str = "auto",
    deterministic: bool = True,
) -> Tensor:
    """`q` [Lq, N, K], `k`, `v` [Lk, N, K] -> [Lq, N, K]; zeros where a query has no key. `deterministic`: the same bits
    of gradients at every run. ValueError on other shapes, or a backend that cannot compute with these.

    `saved_output` is for a forward that is run again in the backward pass (activation recompute): the first run puts its result
    into the empty list, later runs with the same list take it from there and compute nothing.

    torch.compile leaves it as it is: of code traced with a pack's segments it would make one version a pack.
    """
    apply = SegmentAttention.apply
    if torch.compiler.is_compiling():
        apply = torch.compiler.disable(apply)
    return apply(q, k, v, segments, saved_output, backend, deterministic)

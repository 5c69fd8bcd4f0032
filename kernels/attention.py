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
    plain            the equations in PyTorch, bucket by bucket, anywhere
    auto             the first of these that can

Kernels for GPUs add up dq by atomics, in an order that changes from run to run. `deterministic` fixes the order, at the
price of some time and memory.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.deterministic
from torch import Tensor

from megasora.kernels.launch import check_device, widened
from megasora.kernels.segments import Bucket, Segments, Side, Tokens, Varlen

aten = torch.ops.aten

LSE_ALIGNMENT = 32  # memory-efficient attention reads the log-sum-exp of so many queries at once
BIAS_ALIGNMENT = 16  # and its bias in runs of so many keys


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


@contextmanager
def fixed_order(wanted: bool) -> Iterator[None]:
    """PyTorch's GPU kernels add up in one order inside, where wanted; what was set before stands again afterwards."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # kernels overwrite what they allocate
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def aligned(x: Tensor) -> Tensor:
    """GPU kernels read 16 bytes at once: a copy where `x` [..., K] does not let them, which is rare."""
    fits = x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


class BucketKernel(NamedTuple):
    """What computes one bucket: q [g, N, mq, K], k, v [g, N, mk, K], lse [g, N, mq]; bias [g, N, mq, mk] of 0 and -inf,
    which is added to the scores, or None.

    forward(q, k, v, bias) -> out, lse        backward(grad_out, q, k, v, out, lse, bias) -> dq, dk, dv
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    in_any_order: bool  # the backward adds up as it comes, unless inside `fixed_order`


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


PLAIN = BucketKernel(plain_forward, plain_backward, False)
CPU = BucketKernel(cpu_forward, cpu_backward, False)
FLASH = BucketKernel(flash_forward, flash_backward, True)
EFFICIENT = BucketKernel(efficient_forward, efficient_backward, True)


def bucket_kernel(backend: str, q: Tensor, is_padded: bool) -> BucketKernel:
    """For queries [..., K] of a bucket whose keys are padded or not."""
    if backend == "plain":
        return PLAIN
    if q.device.type == "cpu":
        return CPU
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
    return bias.expand(num_segments, num_heads, bucket.queries.shape[1], mk)


def by_head(side: Side, x: Tensor) -> Tensor:
    """[L, N, K] -> [g, N, m, K]"""
    return side.take(x).transpose(1, 2)


def by_token(side: Side, x: Tensor) -> tuple[Tokens, Tensor]:
    """The real ones of [g, N, m, ...], and whose they are."""
    return side.real_tokens, side.real_of(x.transpose(1, 2))


def buckets_forward(backend: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for bucket in segments.buckets:
        q_b, k_b, v_b = by_head(bucket.queries, q), by_head(bucket.keys, k), by_head(bucket.keys, v)
        bias = key_bias(bucket, q.dtype, q.shape[1])
        out_b, lse_b = bucket_kernel(backend, q, bias is not None).forward(q_b, k_b, v_b, bias)
        outs.append(by_token(bucket.queries, out_b))
        lses.append(by_token(bucket.queries, lse_b))
    lse_like = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    return assembled(outs, q, 0.0), assembled(lses, lse_like, -math.inf)


def buckets_backward(
    backend: str,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dqs, dks, dvs = [], [], []
    grad_out, out = grad_out.contiguous(), out.contiguous()  # what the kernels assume
    for bucket in segments.buckets:
        q_b, k_b, v_b = by_head(bucket.queries, q), by_head(bucket.keys, k), by_head(bucket.keys, v)
        grad_b, out_b = by_head(bucket.queries, grad_out), by_head(bucket.queries, out)
        lse_b = bucket.queries.take(lse)
        if bucket.queries.real is not None:  # a repeated query must not count twice: p = exp(s - inf) = 0
            lse_b = lse_b.masked_fill(~bucket.queries.real[..., None], math.inf)
        bias = key_bias(bucket, q.dtype, q.shape[1])
        kernel = bucket_kernel(backend, q, bias is not None)
        with fixed_order(deterministic and kernel.in_any_order):
            dq_b, dk_b, dv_b = kernel.backward(grad_b, q_b, k_b, v_b, out_b, lse_b.transpose(1, 2), bias)
        dqs.append(by_token(bucket.queries, dq_b))
        dks.append(by_token(bucket.keys, dk_b))
        dvs.append(by_token(bucket.keys, dv_b))
    return tuple(assembled(parts, like, 0.0, deterministic) for parts, like in ((dqs, q), (dks, k), (dvs, v)))


class VarlenKernel(NamedTuple):
    """What computes a pack: q [Lq, N, K], k, v [n, N, K] of the keys of a Varlen, lse [N, Lq] in fp32.

    forward(q, k, v, varlen) -> out, lse
    backward(grad_out, q, k, v, out, lse, varlen, deterministic) -> dq, dk, dv
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


@functools.cache
def library(name: str) -> ModuleType | str:
    """A module that need not be there, or why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # built for another PyTorch, it raises any of them
        return f"{name} cannot be imported ({error})"


FLASH3 = "flash_attn_interface"
FLASH2 = "flash_attn.flash_attn_interface"


def flash3_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
    # By position, in which all versions agree; the early ones give no defaults.
    no_cache = (None,) * 4  # k_new, v_new, qv, out
    lengths = varlen.cu_q, varlen.cu_k, None, None, None, varlen.max_q, varlen.max_k
    no_pages = (None,) * 9  # nor rotation, nor scales of fp8
    scale, causal = 1 / math.sqrt(q.shape[-1]), False
    return library(FLASH3)._flash_attn_forward(q, k, v, *no_cache, *lengths, *no_pages, scale, causal)[:2]


def flash3_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, varlen: Varlen, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = like_contiguous(q, k, v)
    lengths = varlen.cu_q, varlen.cu_k, None, None, varlen.max_q, varlen.max_k
    scale, causal = 1 / math.sqrt(q.shape[-1]), False
    library(FLASH3)._flash_attn_backward(
        grad_out, q, k, v, out, lse, *lengths, *gradients, scale, causal, deterministic=deterministic
    )
    return gradients


def flash2_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
    lengths = varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k
    scale, causal = 1 / math.sqrt(q.shape[-1]), False
    return library(FLASH2)._flash_attn_varlen_forward(q, k, v, *lengths, 0.0, scale, causal)[:2]


def flash2_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, varlen: Varlen, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = like_contiguous(q, k, v)
    library(FLASH2)._flash_attn_varlen_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        *gradients,
        varlen.cu_q,
        varlen.cu_k,
        varlen.max_q,
        varlen.max_k,
        dropout_p=0.0,
        softmax_scale=1 / math.sqrt(q.shape[-1]),
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=deterministic,
    )
    return gradients


def like_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def varlen_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
    lengths = varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k
    return aten._flash_attention_forward(q, k, v, *lengths, 0.0, False, False)[:2]


def varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, varlen: Varlen, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k
    no_dropout = torch.empty(0, dtype=torch.int64, device=q.device)
    with fixed_order(deterministic):
        return aten._flash_attention_backward(grad_out, q, k, v, out, lse, *lengths, 0.0, False, no_dropout, no_dropout)


VARLEN = {
    "flash3": VarlenKernel(flash3_forward, flash3_backward),
    "flash2": VarlenKernel(flash2_forward, flash2_backward),
    "varlen": VarlenKernel(varlen_forward, varlen_backward),
}


def pack_forward(kernel: VarlenKernel, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen | None) -> tuple[Tensor, Tensor]:
    if varlen is None:
        return torch.zeros_like(q), q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    out, lse = kernel.forward(aligned(q), aligned(varlen.keys.take(k)), aligned(varlen.keys.take(v)), varlen)
    if varlen.keyless is not None:  # libraries leave there what they like
        out.index_fill_(0, varlen.keyless, 0.0)
        lse.index_fill_(1, varlen.keyless, -math.inf)
    return out, lse.T


def pack_backward(
    kernel: VarlenKernel,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    varlen: Varlen | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if varlen is None:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    inputs = (aligned(x) for x in (grad_out, q, varlen.keys.take(k), varlen.keys.take(v), out))
    dq, dk, dv = kernel.backward(*inputs, lse.T.contiguous(), varlen, deterministic)
    if varlen.keyless is not None:
        dq.index_fill_(0, varlen.keyless, 0.0)
    return dq, *(assembled([(varlen.keys, x)], like, 0.0, deterministic) for x, like in ((dk, k), (dv, v)))


def assembled(parts: list[tuple[Tokens, Tensor]], like: Tensor, fill: float, deterministic: bool = True) -> Tensor:
    """What belongs to some tokens, [count, ...] each, in one tensor of the shape and dtype of `like`, else `fill`."""
    if len(parts) == 1:
        tokens, x = parts[0]
        if tokens.start == 0 and tokens.count == len(like):
            return x.contiguous()
    result = torch.full(like.shape, fill, dtype=like.dtype, device=like.device)
    for tokens, x in parts:
        tokens.put(x, result, deterministic)
    return result


BACKENDS = ("flash3", "flash2", "varlen", "sdpa", "plain")  # "auto" takes the first that can


@functools.cache
def obstacle(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why it cannot compute with such queries, None if it can."""
    if backend == "plain" or (backend == "sdpa" and device.type == "cpu"):
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


def missing(name: str) -> str | None:
    found = library(name)
    return found if isinstance(found, str) else None


def outdated(name: str, oldest: tuple[int, int]) -> str | None:
    version = library(name).__version__
    is_old = tuple(map(int, version.split(".")[:2])) < oldest
    return f"{name} is {version}, it needs {oldest[0]}.{oldest[1]} or newer" if is_old else None


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
    def forward(ctx, q, k, v, segments: Segments, kept: list | None, backend: str, deterministic: bool) -> Tensor:
        out, lse = kept_or_computed(kept, lambda: attention_forward(q, k, v, segments, backend))
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
    kept: list | None = None,
    backend: str = "auto",
    deterministic: bool = True,
) -> Tensor:
    """`q` [Lq, N, K], `k`, `v` [Lk, N, K] -> [Lq, N, K]; zeros where a query has no key. `deterministic`: the same bits
    of gradients at every run. ValueError on other shapes, or a backend that cannot compute with these.

    `kept` is for a forward that is run again in the backward pass (activation recompute): the first run puts its result
    into the empty list, later runs with the same list take it from there and compute nothing.

    torch.compile leaves it as it is: of code traced with a pack's segments it would make one version a pack.
    """
    apply = SegmentAttention.apply
    if torch.compiler.is_compiling():
        apply = torch.compiler.disable(apply)
    return apply(q, k, v, segments, kept, backend, deterministic)

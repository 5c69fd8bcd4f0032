"""Attention by batched calls: one per bucket, whose segments are padded to the longest. See attention.py.

Backend "sdpa" uses PyTorch's scaled dot product kernels, "math" explicit matmul and softmax. "cudnn" has buckets of
segments of one length, so without padding, as cuDNN prepares an execution plan for each new shape. Padding keys are
masked by a bias of -inf. A padding query (a copy of a real one) gets a log-sum-exp of +inf in the backward pass, so
that its p, and with it its contribution to dk and dv, is 0.

Letters: `g` segments of a bucket, each padded to `mq` queries and `mk` keys, those of the longest; `m` is either.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.deterministic
from torch import Tensor

from megasora.kernels.launch import upcast
from megasora.kernels.segments import Bucket, PaddedSide, Segments, TokenIndex

aten = torch.ops.aten

LSE_ALIGNMENT = 32  # queries: memory-efficient attention requires the log-sum-exp padded to a multiple of this
BIAS_ALIGNMENT = 16  # keys: the row stride of its bias must be a multiple of this


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms inside, if `enabled`; restores the previous settings."""
    if not enabled:
        yield
        return
    previous = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # kernels overwrite what they allocate
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def aligned(x: Tensor) -> Tensor:
    """`x` [..., K], or a copy if GPU kernels could not read it 16 bytes at once."""
    fits = x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


class BucketKernel(NamedTuple):
    """Forward and backward of one bucket: q [g, N, mq, K], k, v [g, N, mk, K], lse [g, N, mq]; bias [g, N, mq, mk] of 0
    and -inf, which is added to the scores, or None.

    forward(q, k, v, bias) -> out, lse        backward(grad_out, q, k, v, out, lse, bias) -> dq, dk, dv
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    nondeterministic: bool  # whether the backward needs `deterministic_algorithms` for a fixed order of its sums


def math_scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.matmul(q, k.mT) / math.sqrt(q.shape[-1])
    return scores if bias is None else scores + bias


def math_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    q_wide, k_wide, v_wide = upcast(q, k, v)
    scores = math_scores(q_wide, k_wide, bias)
    return torch.matmul(scores.softmax(-1), v_wide).to(q.dtype), scores.logsumexp(-1)


def math_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    g_wide, q_wide, k_wide, v_wide, out_wide = upcast(grad_out, q, k, v, out)
    p = (math_scores(q_wide, k_wide, bias) - lse[..., None]).exp()
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
    # As padded by its forward: exp(s - inf) = 0, so that the padding contributes nothing to dk and dv.
    padded_lse = F.pad(lse, (0, -lse.shape[-1] % LSE_ALIGNMENT), value=math.inf).contiguous()
    no_dropout = torch.empty(0, dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, bias, out, padded_lse, no_dropout, no_dropout, 0.0, [True, True, True, False]
    )[:3]


@functools.cache
def cudnn_lse_dims(device: torch.device, dtype: torch.dtype, head_dim: int) -> int:
    """Dims of the log-sum-exp of PyTorch's cuDNN attention: 3, or 4 with a last one of size 1, by version."""
    x = torch.zeros(1, 1, 64, head_dim, device=device, dtype=dtype)
    return aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].ndim


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, bias: None) -> tuple[Tensor, Tensor]:
    q, k, v = aligned(q), aligned(k), aligned(v)
    out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return out, lse.reshape(q.shape[:3])


def cudnn_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = aligned(q), aligned(k), aligned(v)
    lse = lse.contiguous()
    if cudnn_lse_dims(q.device, q.dtype, q.shape[-1]) == 4:
        lse = lse[..., None]
    no_dropout = torch.empty(0, dtype=torch.int64, device=q.device)
    no_cu_seqlens = None, None
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, q, k, v, out, lse, no_dropout, no_dropout, None, *no_cu_seqlens, q.shape[2], k.shape[2], 0.0, False
    )


MATH = BucketKernel(math_forward, math_backward, False)
CPU = BucketKernel(cpu_forward, cpu_backward, False)
FLASH = BucketKernel(flash_forward, flash_backward, True)
EFFICIENT = BucketKernel(efficient_forward, efficient_backward, True)
CUDNN = BucketKernel(cudnn_forward, cudnn_backward, False)


def bucket_kernel(backend: str, bucket: Bucket, q: Tensor) -> BucketKernel:
    """The kernel for a bucket with queries like `q` [..., K]."""
    is_padded = bucket.keys.valid is not None
    if backend == "math":
        return MATH
    if backend == "cudnn" and min(bucket.queries.shape[1], bucket.keys.shape[1]) > 1:  # cuDNN takes no length of 1
        return CUDNN
    if q.device.type == "cpu":
        return CPU
    is_flash = not is_padded and q.dtype != torch.float32 and q.shape[-1] <= 256
    return FLASH if is_flash else EFFICIENT


def key_bias(bucket: Bucket, dtype: torch.dtype, num_heads: int) -> Tensor | None:
    """[g, N, mq, mk]: 0 at keys, -inf at padding; None without padding."""
    valid = bucket.keys.valid
    if valid is None:
        return None
    num_segments, mk = valid.shape
    stored = torch.zeros(num_segments, 1, 1, mk + -mk % BIAS_ALIGNMENT, dtype=dtype, device=valid.device)
    bias = stored[..., :mk].masked_fill_(~valid[:, None, None], -math.inf)
    return bias.expand(num_segments, num_heads, bucket.queries.shape[1], mk)


def buckets_of(backend: str, segments: Segments) -> tuple[Bucket, ...]:
    return segments.equal_buckets if backend == "cudnn" else segments.buckets


def to_heads(side: PaddedSide, x: Tensor) -> Tensor:
    """[L, N, K] -> [g, N, m, K]"""
    return side.pad(x).transpose(1, 2)


def from_heads(side: PaddedSide, x: Tensor) -> tuple[TokenIndex, Tensor]:
    """[g, N, m, ...] -> [count, N, ...] without padding, and its tokens."""
    return side.valid_tokens, side.unpad(x.transpose(1, 2))


def padded_forward(backend: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for bucket in buckets_of(backend, segments):
        q_b, k_b, v_b = to_heads(bucket.queries, q), to_heads(bucket.keys, k), to_heads(bucket.keys, v)
        bias = key_bias(bucket, q.dtype, q.shape[1])
        out_b, lse_b = bucket_kernel(backend, bucket, q).forward(q_b, k_b, v_b, bias)
        outs.append(from_heads(bucket.queries, out_b))
        lses.append(from_heads(bucket.queries, lse_b))
    lse_like = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    return scatter_all(outs, q, 0.0), scatter_all(lses, lse_like, -math.inf)


def padded_backward(
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
    grad_out, out = grad_out.contiguous(), out.contiguous()  # required by the kernels
    for bucket in buckets_of(backend, segments):
        q_b, k_b, v_b = to_heads(bucket.queries, q), to_heads(bucket.keys, k), to_heads(bucket.keys, v)
        grad_b, out_b = to_heads(bucket.queries, grad_out), to_heads(bucket.queries, out)
        lse_b = bucket.queries.pad(lse)
        if bucket.queries.valid is not None:  # padding: p = exp(s - inf) = 0
            lse_b = lse_b.masked_fill(~bucket.queries.valid[..., None], math.inf)
        bias = key_bias(bucket, q.dtype, q.shape[1])
        kernel = bucket_kernel(backend, bucket, q)
        with deterministic_algorithms(deterministic and kernel.nondeterministic):
            dq_b, dk_b, dv_b = kernel.backward(grad_b, q_b, k_b, v_b, out_b, lse_b.transpose(1, 2), bias)
        dqs.append(from_heads(bucket.queries, dq_b))
        dks.append(from_heads(bucket.keys, dk_b))
        dvs.append(from_heads(bucket.keys, dv_b))
    return tuple(scatter_all(parts, like, 0.0, deterministic) for parts, like in ((dqs, q), (dks, k), (dvs, v)))


def scatter_all(
    parts: list[tuple[TokenIndex, Tensor]], like: Tensor, fill: float, deterministic: bool = True
) -> Tensor:
    """A tensor of the shape and dtype of `like`: `parts`, values [count, ...] at their tokens, and `fill` elsewhere."""
    if len(parts) == 1:
        tokens, x = parts[0]
        if tokens.start == 0 and tokens.count == len(like):
            return x.contiguous()
    result = torch.full(like.shape, fill, dtype=like.dtype, device=like.device)
    for tokens, x in parts:
        tokens.scatter(x, result, deterministic)
    return result

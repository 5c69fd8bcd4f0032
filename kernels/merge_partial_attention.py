"""Merges attention to two disjoint sets of keys into attention to all of them, by log-sum-exp.

    w   = exp(lse_b) / (exp(lse_a) + exp(lse_b))
    out = out_a + w (out_b - out_a)         lse = log(exp(lse_a) + exp(lse_b))

of outputs [L, N, K] and log-sum-exps [L, N]. The two weights sum to one in spite of rounding errors in the lse, so that
repeated merging does not drift. A side without keys (out 0, lse -inf) leaves the other unchanged, bit by bit. Computed
and returned in fp32 at least: ring attention merges once per exchange, and would round each time.

Least traffic: both outputs in, one out; 12 bytes per element in fp32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megasora.kernels.launch import (
    LaunchConfig,
    LaunchTable,
    call,
    cdiv,
    check_device,
    jit_for_packs,
    launch_config,
    resolve_backend,
    unit_stride,
)

MERGE: LaunchTable = {"any": LaunchConfig()}


def merge_partial_attention_reference(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Reference implementation; arguments as of `merge_partial_attention`."""
    wide = torch.promote_types(torch.promote_types(out_a.dtype, out_b.dtype), torch.float32)
    lse_a, lse_b = lse_a.to(wide), lse_b.to(wide)
    w = torch.sigmoid(lse_b - lse_a).masked_fill(lse_b == -math.inf, 0.0)
    return torch.lerp(out_a.to(wide), out_b.to(wide), w[..., None]), torch.logaddexp(lse_a, lse_b)


@jit_for_packs
def merge_kernel(
    out_a, lse_a, out_b, lse_b, out, lse,
    token_a, head_a, token_lse_a, head_lse_a, token_b, head_b, token_lse_b, head_lse_b,
    COUNT, N, K, VECTORS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)  # of all L * N
    mask, i, n, k = vector < COUNT, vector // N, vector % N, tl.arange(0, BLOCK_K)
    inside = mask[:, None] & (k < K)[None]
    a = tl.load(out_a + (i * token_a + n * head_a)[:, None] + k[None], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(out_b + (i * token_b + n * head_b)[:, None] + k[None], mask=inside, other=0.0).to(tl.float32)
    x = tl.load(lse_a + i * token_lse_a + n * head_lse_a, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(lse_b + i * token_lse_b + n * head_lse_b, mask=mask, other=0.0).to(tl.float32)
    w = tl.where(y == -float("inf"), 0.0, 1 / (1 + tl.exp(x - y)))[:, None]
    merged = tl.where(w < 0.5, a + w * (b - a), b - (1 - w) * (b - a))  # exact where one side has no keys
    larger = tl.maximum(x, y)
    both = larger + tl.log(tl.exp(x - larger) + tl.exp(y - larger))
    both = tl.where(y == -float("inf"), x, tl.where(x == -float("inf"), y, both))
    tl.store(out + vector[:, None] * K + k[None], merged, mask=inside)
    tl.store(lse + vector, both, mask=mask)


@torch.library.custom_op("megasora::merge_partial_attention", mutates_args=())
def merge_triton(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out_a, out_b = unit_stride(out_a), unit_stride(out_b)
    out, lse = empty_merged(out_a)
    config, block = launch_config(MERGE, out.device), triton.next_power_of_2(out.shape[2])
    vectors, count = config.vectors_per_tile(block), lse.numel()
    strides = (stride for x in (out_a, lse_a, out_b, lse_b) for stride in x.stride()[:2])
    if out.numel():
        merge_kernel[(cdiv(count, vectors),)](
            out_a, lse_a, out_b, lse_b, out, lse, *strides, count, *out.shape[1:], vectors, block,
            num_warps=config.num_warps(block),
        )  # fmt: skip
    return out, lse


@merge_triton.register_fake
def _(out_a, lse_a, out_b, lse_b):
    return empty_merged(out_a)


def empty_merged(out_a: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape, dtype=torch.float32), out_a.new_empty(out_a.shape[:2], dtype=torch.float32)


def merge_partial_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`out_a`, `out_b` [L, N, K] and `lse_a`, `lse_b` [L, N] of attention to different keys -> out [L, N, K] and
    lse [L, N] of attention to all of them, at least fp32. `backend`: see launch.py. Records no gradient. ValueError for
    shapes that do not match."""
    if out_a.ndim != 3 or out_a.shape != out_b.shape:
        raise ValueError(f"out_a {tuple(out_a.shape)} and out_b {tuple(out_b.shape)} must have one shape [L, N, K]")
    for name, x in (("lse_a", lse_a), ("lse_b", lse_b)):
        if x.shape != out_a.shape[:2]:
            raise ValueError(f"{name} {tuple(x.shape)} must be [L, N] of outputs {tuple(out_a.shape)}")
    check_device(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    tensors = out_a, lse_a, out_b, lse_b
    with torch.no_grad():
        if resolve_backend(backend, out_a) == "triton":
            return call(merge_triton, *tensors)
        return merge_partial_attention_reference(*tensors)

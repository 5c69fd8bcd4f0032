"""x"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasora.kernels.rope3d import cos_sin, turn_pairs


@triton.jit
def load_heads(x, stride, there, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, C: tl.constexpr):
    """C chunks [T, H, BLOCK_K], all heads of tokens, asked for at once; `x` [T, 1, BLOCK_K] points to the first head."""
    d = tl.arange(0, x.shape[2])[None, None]
    chunks = ()
    for c in tl.static_range(C):
        head = (c * H + tl.arange(0, H))[None, :, None]
        chunks += (tl.load(x + head * stride, mask=there & (head < N) & (d < K), other=0.0),)
    return chunks


@triton.jit
def load_weights(weight, d, NORM: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, C: tl.constexpr):
    """For each chunk what fits it, [1, H, BLOCK_K] of the width or [1, 1, BLOCK_K] of every head."""
    if NORM == "width":
        weights = load_heads(weight + d, K, True, N, K, H, C)
    elif NORM == "head":
        of_head = tl.load(weight + d, mask=d < K, other=0.0)
        weights = ()
        for _ in tl.static_range(C):
            weights += (of_head,)
    else:
        weights = ()
    return weights


@triton.jit
def store_heads(y, stride, c: tl.constexpr, chunk, there, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr):
    head, d = (c * H + tl.arange(0, H))[None, :, None], tl.arange(0, y.shape[2])[None, None]
    tl.store(y + head * stride, chunk.to(y.dtype.element_ty), mask=there & (head < N) & (d < K))


@triton.jit
def inverses(xs, size, eps, NORM: tl.constexpr):
    """Of each chunk 1 / sqrt(mean x^2 + eps), [T, H, 1] of heads or [T, 1, 1] of the width."""
    found = ()
    if NORM == "head":
        for c in tl.static_range(len(xs)):
            x = xs[c].to(tl.float32)
            found += (tl.rsqrt(tl.sum(x * x, 2, keep_dims=True) / size + eps),)
    else:
        total = tl.zeros(xs[0].shape, tl.float32)
        for c in tl.static_range(len(xs)):
            x = xs[c].to(tl.float32)
            total += x * x
        inverse = tl.rsqrt(tl.sum(tl.sum(total, 2, keep_dims=True), 1, keep_dims=True) / size + eps)
        for _ in tl.static_range(len(xs)):
            found += (inverse,)
    return found


@triton.jit
def forward_part(
    x, weight, coords_L3, frequency_P, y_LNK, inverse, token, L, token_stride, head_stride, eps,
    NORM: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    d, p = tl.arange(0, BLOCK_K)[None, None], tl.arange(0, BLOCK_K // 2)
    at, there = token.to(tl.int64)[:, None, None], (token < L)[:, None, None]
    xs = load_heads(x + at * token_stride + d, head_stride, there, N, K, H, C)
    weights = load_weights(weight, d, NORM, N, K, H, C)
    if coords_L3 is not None:
        frequency = tl.load(frequency_P + p, mask=p < K // 2, other=0.0)
        cos, sin = cos_sin(coords_L3, token, token < L, frequency, FIRST_H, FIRST_W)
    if NORM != "none":
        scales = inverses(xs, K if NORM == "head" else N * K, eps, NORM)
    y = y_LNK + at * (N * K) + d
    for c in tl.static_range(C):
        chunk = xs[c].to(tl.float32)
        if NORM != "none":
            chunk = chunk * scales[c] * weights[c].to(tl.float32)
        if coords_L3 is not None:
            chunk = turn_pairs(chunk, cos, sin)
        store_heads(y, K, c, chunk, there, N, K, H)
    if NORM == "head":
        for c in tl.static_range(C):
            head = (c * H + tl.arange(0, H))[None, :, None]
            tl.store(inverse + at * N + head, scales[c], mask=there & (head < N))
    elif NORM == "width":
        tl.store(inverse + at, scales[0], mask=there)


@triton.jit
def forward_kernel(
    qkv_L3NK, q_weight, k_weight, coords_L3, frequency_P, q_LNK, k_LNK, inverse_2LM,
    token_stride, part_stride, head_stride, L, eps,
    NORM: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * T + tl.arange(0, T)
    if tl.program_id(1) == 0:
        forward_part(
            qkv_L3NK, q_weight, coords_L3, frequency_P, q_LNK, inverse_2LM, token, L, token_stride, head_stride,
            eps, NORM, FIRST_H, FIRST_W, N, K, H, C, BLOCK_K,
        )  # fmt: skip
    else:
        inverse_2LM = inverse_2LM + (0 if NORM == "none" else L * (N if NORM == "head" else 1))
        forward_part(
            qkv_L3NK + part_stride, k_weight, coords_L3, frequency_P, k_LNK, inverse_2LM, token, L, token_stride, head_stride,
            eps, NORM, FIRST_H, FIRST_W, N, K, H, C, BLOCK_K,
        )  # fmt: skip

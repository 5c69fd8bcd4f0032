"""QK-norm and 3D RoPE of a fused projection: qkv [L, 3, N, K] in; q and k, normalized and rotated, and v out, [L, N, K]
each (QK-norm, arXiv 2302.05442; 3D rotary embedding: see rope3d.py).

    n = x r,   r = 1 / sqrt(mean x^2 + eps)        x is q or k; the mean is over one normalized vector
    y = R (n w)                                    R rotates every pair by the angle of its token

    norm="per_head": a vector is one head of K elements, w [K].  "across_heads": all N K elements of a token, w [N K]
    (Wan, arXiv 2503.20314).  "none": y = R x

    a = R^T dy                                     rotated back
    dx = r (a w - n mean(a w n)),  dw = sum over tokens (and heads) of a n

v is a view of qkv. The backward pass writes the gradients of q, k and v into one tensor dqkv, so that no concatenation
follows. It saves qkv only: r is recomputed from x, which it reads anyway. Computed in fp32 at least and rounded once.
The gradient of a bias of the projection, the sum of dqkv over tokens, is computed in the same pass. For "across_heads"
it is not: beside the sums of dw, those of dq or dk exceed 128 registers by 72 to 104 bytes (Triton 3.7, sm_90).

Least traffic in bf16: 4 bytes per element of q and k forward (x, y); backward 6 (x, dy, dx), and 4 per element of v (dv
and its copy).

A program processes whole tokens: it loads all of their heads in a few chunks, all loads in flight at once, and then
computes. In the backward pass it loops over many tokens and accumulates dw in registers; the sums of all programs are
added up afterwards. Both sums have a fixed order.

Letters: `M` normalized vectors of a token, of `W` elements each; `P` pairs of a head; `Q` programs of the backward. In
kernels: `T` tokens of an iteration, `H` heads of a chunk, `C` chunks of the heads of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.kernels import rms_norm
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
    upcast,
)
from megasora.kernels.rope3d import (
    Rope,
    contiguous_heads,
    cos_sin,
    first_pairs,
    rope3d_reference,
    rotate_pairs,
    rotate_torch,
    tile_shape,
)
from megasora.kernels.rows import tile_tokens_for

FORWARD: LaunchTable = {"any": LaunchConfig(tile_elements=1024, elements_per_thread=8)}
BACKWARD: LaunchTable = {"any": LaunchConfig(tile_elements=1024, elements_per_thread=8)}
FORWARD_CHUNKS = 5  # of the heads of a token, at most: 6, 12, 20, 24 and 40 heads need no padding heads
BACKWARD_CHUNKS = 3  # fewer, as registers also hold the gradients and the sums of dw
BACKWARD_REGISTERS = 128  # per thread, at most: then 16 warps fit a multiprocessor, each with 3 KiB of loads in flight
NORMS = ("per_head", "across_heads", "none")


def qk_norm_rope3d_reference(
    qkv_L3NK: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Rope | None,
    eps: float,
    norm: str = "per_head",
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference implementation, differentiable; arguments as of `qk_norm_rope3d`."""
    *qk, v_LNK = qkv_L3NK.unbind(1)
    outputs = []
    for x_LNK, weight in zip(qk, (q_weight, k_weight), strict=True):
        y = vectors(x_LNK, norm)
        if norm != "none":
            y = rms_norm.rms_norm_reference(y, weight, eps)
        y = y.view(x_LNK.shape)
        y = y if rope is None else rope3d_reference(y, rope)
        outputs.append(y.to(x_LNK.dtype))
    return *outputs, v_LNK


def vectors(x_LNK: Tensor, norm: str) -> Tensor:
    """[L, M, W]: the M vectors of W elements that are normalized, in fp32 at least."""
    (x,) = upcast(x_LNK)
    return x.flatten(1)[:, None] if norm == "across_heads" else x


def forward_torch(
    qkv_L3NK: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotation_L1P: Tensor | None,
    eps: float,
    norm: str,
) -> tuple[Tensor, ...]:
    outputs = []
    for qkv_index, weight in enumerate((q_weight, k_weight)):
        y = x_LNK = qkv_L3NK[:, qkv_index]
        if norm != "none":
            x = vectors(x_LNK, norm)
            y = rms_norm.forward_torch(x, weight, inverses(x, eps)).view(x_LNK.shape)
        y = y if rotation_L1P is None else rotate_torch(y, rotation_L1P)
        outputs.append(y.to(x_LNK.dtype))
    return tuple(outputs)


def inverses(x: Tensor, eps: float) -> Tensor:
    """r [..., 1] of vectors x [..., W]."""
    return torch.rsqrt(rms_norm.squares_torch(x) / x.shape[-1] + eps)


def backward_torch(
    grads: Sequence[Tensor],
    qkv_L3NK: Tensor | None,
    weights: Sequence[Tensor | None],
    rotation_L1P: Tensor | None,
    eps: float,
    norm: str,
) -> tuple[Tensor, list[Tensor | None]]:
    """dqkv, and the gradients of q_weight and k_weight."""
    dq_LNK = grads[0]
    dqkv_L3NK, dweights = dq_LNK.new_empty(len(dq_LNK), 3, *dq_LNK.shape[1:]), []
    for qkv_index, (grad_LNK, weight) in enumerate(zip(grads, (*weights, None), strict=True)):
        a, dweight = grad_LNK, None
        if rotation_L1P is not None and qkv_index < 2:
            a = rotate_torch(grad_LNK, rotation_L1P.conj())
        if weight is not None:
            x = vectors(qkv_L3NK[:, qkv_index], norm)
            dx, dweight = rms_norm.backward_torch(vectors(a, norm), x, weight, inverses(x, eps), x.shape[-1], None)
            a = dx.view(grad_LNK.shape)
        dqkv_L3NK[:, qkv_index] = a
        dweights.append(dweight)
    return dqkv_L3NK, dweights[:2]


@triton.jit
def load_heads(x, mask, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr):
    """C chunks [T, H, BLOCK_K] in the dtype of `x`; `x` [T, 1, BLOCK_K] points to the first head of each token.

    All loads are issued at once.
    """
    d = tl.arange(0, x.shape[2])[None, None]
    chunks = ()
    for c in tl.static_range(C):
        head = (c * H + tl.arange(0, H))[None, :, None]
        chunks += (tl.load(x + head * STRIDE, mask=mask & (head < N) & (d < K), other=0.0),)
    return chunks


@triton.jit
def store_heads(y, c: tl.constexpr, chunk, mask, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr):
    head, d = (c * H + tl.arange(0, H))[None, :, None], tl.arange(0, y.shape[2])[None, None]
    tl.store(y + head * K, chunk.to(y.dtype.element_ty), mask=mask & (head < N) & (d < K))


@triton.jit
def load_weight(
    weight, mask, d, NORM: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, C: tl.constexpr
):
    """Chunks of the shape of those of heads: one copy per token, so that they have the layout of the heads."""
    if NORM == "none":
        chunks = ()
    else:
        chunks = load_heads(weight + d, mask, N, K, H, C, K if NORM == "across_heads" else 0)
    return chunks


@triton.jit
def product(xs, ys, ws, c: tl.constexpr):
    """x * y * w of one chunk in fp32; x * y if `ws` is empty."""
    xy = xs[c].to(tl.float32) * ys[c].to(tl.float32)
    if len(ws) > 0:
        xy *= ws[c].to(tl.float32)
    return xy


@triton.jit
def means(xs, ys, ws, NORM: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """For each chunk the mean of x y w over each normalized vector, [T, H, 1] or [T, 1, 1]; of x y if `ws` is empty."""
    means_of_chunks = ()
    if NORM == "per_head":
        for c in tl.static_range(len(xs)):
            means_of_chunks += (tl.sum(product(xs, ys, ws, c), 2, keep_dims=True) / K,)
    else:
        total = product(xs, ys, ws, 0)
        for c in tl.static_range(1, len(xs)):
            total += product(xs, ys, ws, c)
        total = tl.sum(tl.sum(total, 2, keep_dims=True), 1, keep_dims=True)
        for _ in tl.static_range(len(xs)):
            means_of_chunks += (total / (N * K),)
    return means_of_chunks


@triton.jit
def forward_qk(
    qkv_L3NK, weight, coords_L3, frequency_P, y_LNK, token, L, stride, qkv_stride, eps,
    QKV_INDEX: tl.constexpr, NORM: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    d, p = tl.arange(0, BLOCK_K)[None, None], tl.arange(0, BLOCK_K // 2)
    at, mask = token.to(tl.int64)[:, None, None], (token < L)[:, None, None]
    xs = load_heads(qkv_L3NK + QKV_INDEX * qkv_stride + at * stride + d, mask, N, K, H, C, K)
    ws = load_weight(weight, mask, d, NORM, N, K, H, C)
    if coords_L3 is not None:
        frequency = tl.load(frequency_P + p, mask=p < K // 2, other=0.0)
        cos, sin = cos_sin(coords_L3, token, token < L, frequency, FIRST_H, FIRST_W)
    if NORM != "none":
        squares = means(xs, xs, (), NORM, N, K)
    for c in tl.static_range(C):
        y = xs[c].to(tl.float32)
        if NORM != "none":
            y = y * tl.rsqrt(squares[c] + eps) * ws[c].to(tl.float32)
        if coords_L3 is not None:
            y = rotate_pairs(y, cos, sin)
        store_heads(y_LNK + at * (N * K) + d, c, y, mask, N, K, H)


@jit_for_packs
def forward_kernel(
    qkv_L3NK, q_weight, k_weight, coords_L3, frequency_P, q_LNK, k_LNK, stride, qkv_stride, L, eps,
    NORM: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * T + tl.arange(0, T)
    if tl.program_id(1) == 0:
        forward_qk(
            qkv_L3NK, q_weight, coords_L3, frequency_P, q_LNK, token, L, stride, qkv_stride, eps,
            0, NORM, FIRST_H, FIRST_W, N, K, H, BLOCK_K, C,
        )  # fmt: skip
    else:
        forward_qk(
            qkv_L3NK, k_weight, coords_L3, frequency_P, k_LNK, token, L, stride, qkv_stride, eps,
            1, NORM, FIRST_H, FIRST_W, N, K, H, BLOCK_K, C,
        )  # fmt: skip


@triton.jit
def norm_gradient(xs, gs, ws, sums, eps, NORM: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """dx of all chunks, from x, a and w; and `sums` of a n with these tokens added, per chunk or one for all heads."""
    squares, dots = means(xs, xs, (), NORM, N, K), means(xs, gs, ws, NORM, N, K)
    dxs, added = (), ()
    for c in tl.static_range(len(xs)):
        inverse = tl.rsqrt(squares[c] + eps)
        n = xs[c].to(tl.float32) * inverse
        dxs += (inverse * (gs[c] * ws[c].to(tl.float32) - n * (inverse * dots[c])),)
        if NORM == "across_heads":
            added += (sums[c] + gs[c] * n,)
        elif c == 0:
            added = (sums[0] + gs[c] * n,)
        else:
            added = (added[0] + gs[c] * n,)
    return dxs, added


@triton.jit
def zero_chunks(dbias_3QW, T: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr):
    """Sums of all heads; none if there is no bias."""
    sums = ()
    if dbias_3QW is not None:
        for _ in tl.static_range(C):
            sums += (tl.zeros([T, H, BLOCK_K], tl.float32),)
    return sums


@triton.jit
def add_chunks(sums, xs):
    added = ()
    for c in tl.static_range(len(sums)):
        added += (sums[c] + xs[c].to(tl.float32),)
    return added


@triton.jit
def store_bias_sums(dbias_3QW, sums, tile, d, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr):
    for c in tl.static_range(len(sums)):
        tile_sum = tl.sum(sums[c], 0, keep_dims=True)
        store_heads(dbias_3QW + tile.to(tl.int64) * (N * K) + d, c, tile_sum, True, N, K, H)


@triton.jit
def backward_qk(
    grad_LNK, qkv_L3NK, weight, coords_L3, frequency_P, dqkv_L3NK, dweights_2QW, dbias_3QW, start, end,
    grad_stride, stride, qkv_stride, eps,
    QKV_INDEX: tl.constexpr, NORM: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, T: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    d, p = tl.arange(0, BLOCK_K)[None, None], tl.arange(0, BLOCK_K // 2)
    sums = ()
    for _ in tl.static_range(C if NORM == "across_heads" else 1):
        sums += (tl.zeros([T, H, BLOCK_K], tl.float32),)
    bias_sums = zero_chunks(dbias_3QW, T, H, BLOCK_K, C)
    for first in range(start, end, T):
        token = first + tl.arange(0, T)
        at, mask = token.to(tl.int64)[:, None, None], (token < end)[:, None, None]
        grads = load_heads(grad_LNK + at * grad_stride + d, mask, N, K, H, C, K)
        if NORM != "none":
            xs = load_heads(qkv_L3NK + QKV_INDEX * qkv_stride + at * stride + d, mask, N, K, H, C, K)
        if coords_L3 is not None:
            frequency = tl.load(frequency_P + p, mask=p < K // 2, other=0.0)  # here, to save registers
            cos, sin = cos_sin(coords_L3, token, token < end, frequency, FIRST_H, FIRST_W)
        gs = ()
        for c in tl.static_range(C):
            g = grads[c].to(tl.float32)
            if coords_L3 is not None:
                g = rotate_pairs(g, cos, -sin)
            gs += (g,)
        if NORM == "none":
            dxs = gs
        else:
            ws = load_weight(weight, mask, d, NORM, N, K, H, C)  # here, to save registers
            dxs, sums = norm_gradient(xs, gs, ws, sums, eps, NORM, N, K)
        bias_sums = add_chunks(bias_sums, dxs)
        for c in tl.static_range(C):
            store_heads(dqkv_L3NK + (at * 3 + QKV_INDEX) * (N * K) + d, c, dxs[c], mask, N, K, H)
    tile = QKV_INDEX * tl.num_programs(0) + tl.program_id(0)
    if NORM == "across_heads":
        for c in tl.static_range(C):
            tile_sum = tl.sum(sums[c], 0, keep_dims=True)
            store_heads(dweights_2QW + tile.to(tl.int64) * (N * K) + d, c, tile_sum, True, N, K, H)
    elif NORM == "per_head":
        tile_sum = tl.sum(tl.sum(sums[0], 1, keep_dims=True), 0, keep_dims=True)
        tl.store(dweights_2QW + tile * K + d, tile_sum, mask=d < K)
    store_bias_sums(dbias_3QW, bias_sums, tile, d, N, K, H)


@triton.jit
def copy_v(
    grad_LNK, dqkv_L3NK, dbias_3QW, start, end, grad_stride, QKV_INDEX: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_K)[None, None]
    sums = zero_chunks(dbias_3QW, T, H, BLOCK_K, C)
    for first in range(start, end, T):
        token = first + tl.arange(0, T)
        at, mask = token.to(tl.int64)[:, None, None], (token < end)[:, None, None]
        grads = load_heads(grad_LNK + at * grad_stride + d, mask, N, K, H, C, K)
        for c in tl.static_range(C):
            store_heads(dqkv_L3NK + (at * 3 + QKV_INDEX) * (N * K) + d, c, grads[c], mask, N, K, H)
        sums = add_chunks(sums, grads)
    store_bias_sums(dbias_3QW, sums, QKV_INDEX * tl.num_programs(0) + tl.program_id(0), d, N, K, H)


@jit_for_packs
def backward_kernel(
    dq_LNK, dk_LNK, dv_LNK, qkv_L3NK, q_weight, k_weight, coords_L3, frequency_P, dqkv_L3NK, dweights_2QW,
    dbias_3QW, dq_stride, dk_stride, dv_stride, stride, qkv_stride, L, PROGRAM_TOKENS, eps,
    NORM: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * PROGRAM_TOKENS
    end = tl.minimum(start + PROGRAM_TOKENS, L)
    if tl.program_id(1) == 0:
        backward_qk(
            dq_LNK, qkv_L3NK, q_weight, coords_L3, frequency_P, dqkv_L3NK, dweights_2QW, dbias_3QW, start, end,
            dq_stride, stride, qkv_stride, eps, 0, NORM, FIRST_H, FIRST_W, N, K, T, H, BLOCK_K, C,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        backward_qk(
            dk_LNK, qkv_L3NK, k_weight, coords_L3, frequency_P, dqkv_L3NK, dweights_2QW, dbias_3QW, start, end,
            dk_stride, stride, qkv_stride, eps, 1, NORM, FIRST_H, FIRST_W, N, K, T, H, BLOCK_K, C,
        )  # fmt: skip
    else:
        copy_v(dv_LNK, dqkv_L3NK, dbias_3QW, start, end, dv_stride, 2, N, K, T, H, BLOCK_K, C)


@torch.library.custom_op("megasora::qk_norm_rope3d", mutates_args=())
def forward_triton(
    qkv_L3NK: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    coords_L3: Tensor | None,
    frequency_P: Tensor | None,
    split: Sequence[int],
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor]:
    qkv_L3NK, q_weight, k_weight = contiguous_heads(qkv_L3NK), unit_stride(q_weight), unit_stride(k_weight)
    q_LNK, k_LNK = empty_forward(qkv_L3NK)
    if q_LNK.numel():
        num_tokens, num_heads, head_dim = q_LNK.shape
        config = launch_config(FORWARD, qkv_L3NK.device)
        tile = tile_shape(config, num_heads, head_dim, FORWARD_CHUNKS)
        forward_kernel[cdiv(num_tokens, tile[0]), 2](
            qkv_L3NK, q_weight, k_weight, coords_L3, frequency_P, q_LNK, k_LNK,
            qkv_L3NK.stride(0), qkv_L3NK.stride(1), num_tokens, eps,
            norm, *first_pairs(split), num_heads, head_dim, *tile, cdiv(num_heads, tile[1]),
            num_warps=config.num_warps(tile[1] * tile[2]),
        )  # fmt: skip
    return q_LNK, k_LNK


@forward_triton.register_fake
def _(qkv_L3NK, q_weight, k_weight, coords_L3, frequency_P, split, eps, norm):
    return empty_forward(qkv_L3NK)


def empty_forward(qkv_L3NK: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, _, num_heads, head_dim = qkv_L3NK.shape
    return tuple(qkv_L3NK.new_empty(num_tokens, num_heads, head_dim) for _ in range(2))


@torch.library.custom_op("megasora::qk_norm_rope3d_backward", mutates_args=())
def backward_triton(
    dq_LNK: Tensor,
    dk_LNK: Tensor,
    dv_LNK: Tensor,
    qkv_L3NK: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    coords_L3: Tensor | None,
    frequency_P: Tensor | None,
    split: Sequence[int],
    eps: float,
    norm: str,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv, and in fp32 dw of q and k [2, W] and db [3, N K], which is empty without a bias."""
    grads = [contiguous_heads(x) for x in (dq_LNK, dk_LNK, dv_LNK)]
    qkv_L3NK, q_weight, k_weight = contiguous_heads(qkv_L3NK), unit_stride(q_weight), unit_stride(k_weight)
    num_tokens, num_heads, head_dim = dq_LNK.shape
    program_tokens = tile_tokens_for(num_tokens)
    num_programs = cdiv(num_tokens, program_tokens)
    dqkv_L3NK, dweights_2QW, dbias_3QW = empty_backward(dq_LNK, norm, num_programs, has_bias)
    strides = [x.stride(0) for x in grads] + ([0, 0] if qkv_L3NK is None else list(qkv_L3NK.stride()[:2]))
    if dqkv_L3NK.numel():
        config = launch_config(BACKWARD, dq_LNK.device)
        tile = tile_shape(config, num_heads, head_dim, BACKWARD_CHUNKS)
        backward_kernel[num_programs, 3](
            *grads, qkv_L3NK, q_weight, k_weight, coords_L3, frequency_P, dqkv_L3NK, dweights_2QW,
            dbias_3QW if has_bias else None, *strides, num_tokens, program_tokens, eps,
            norm, *first_pairs(split), num_heads, head_dim, *tile, cdiv(num_heads, tile[1]),
            num_warps=config.num_warps(tile[1] * tile[2]), maxnreg=BACKWARD_REGISTERS,
        )  # fmt: skip
    return dqkv_L3NK, dweights_2QW.sum(1), dbias_3QW.sum(1)


@backward_triton.register_fake
def _(dq_LNK, dk_LNK, dv_LNK, qkv_L3NK, q_weight, k_weight, coords_L3, frequency_P, split, eps, norm, has_bias):
    dqkv_L3NK, dweights_2QW, dbias_3QW = empty_backward(dq_LNK, norm, 1, has_bias)
    return dqkv_L3NK, dweights_2QW[:, 0], dbias_3QW[:, 0]


def empty_backward(dq_LNK: Tensor, norm: str, num_programs: int, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv, and in fp32 dw of q and k [2, Q, W] and db [3, Q, N K], summed over the tokens of each program; all
    uninitialised."""
    num_tokens, num_heads, head_dim = dq_LNK.shape
    width = {"per_head": head_dim, "across_heads": num_heads * head_dim, "none": 0}[norm]
    dqkv_L3NK = dq_LNK.new_empty(num_tokens, 3, num_heads, head_dim)
    bias_width = num_heads * head_dim if has_bias else 0
    sums = (
        dq_LNK.new_empty(*shape, dtype=torch.float32)
        for shape in ((2, num_programs, width), (3, num_programs, bias_width))
    )
    return dqkv_L3NK, *sums


class QKNormRope3D(Function):
    @staticmethod
    def forward(
        ctx,
        qkv_L3NK: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        rope: Rope | None,
        rotation_L1P: Tensor | None,
        eps: float,
        norm: str,
        backend: str,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if backend == "triton":
            q_LNK, k_LNK = call(forward_triton, qkv_L3NK, q_weight, k_weight, *operator_arguments(rope), eps, norm)
        else:
            q_LNK, k_LNK = forward_torch(qkv_L3NK, q_weight, k_weight, rotation_L1P, eps, norm)
        ctx.save_for_backward(None if norm == "none" else qkv_L3NK, q_weight, k_weight)
        ctx.rope, ctx.rotation_L1P, ctx.eps, ctx.norm, ctx.backend = rope, rotation_L1P, eps, norm, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        return q_LNK.detach(), k_LNK.detach(), qkv_L3NK[:, 2]  # see launch.py

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv_L3NK, *weights = ctx.saved_tensors
        has_bias = ctx.bias_dtype is not None
        if ctx.backend == "triton":
            tensors = *grads, qkv_L3NK, *weights
            dqkv_L3NK, dweights, dbias = call(
                backward_triton, *tensors, *operator_arguments(ctx.rope), ctx.eps, ctx.norm, has_bias
            )
        else:
            dqkv_L3NK, dweights = backward_torch(grads, qkv_L3NK, weights, ctx.rotation_L1P, ctx.eps, ctx.norm)
            dbias = upcast(dqkv_L3NK)[0].sum(0) if has_bias else None
        if ctx.norm == "none":
            dweights = None, None
        else:
            dweights = (dw.to(w.dtype) for dw, w in zip(dweights, weights, strict=True))
        return dqkv_L3NK, *dweights, *[None] * 5, dbias.flatten().to(ctx.bias_dtype) if has_bias else None


def operator_arguments(rope: Rope | None) -> tuple[Tensor | None, Tensor | None, Sequence[int]]:
    """`rope` as the operators take it: coords, frequencies, split."""
    return (None, None, (0, 0, 0)) if rope is None else (rope.coords_L3, rope.frequency_P, rope.split)


def qk_norm_rope3d(
    qkv_L3NK: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Rope | None,
    eps: float,
    norm: str = "per_head",
    backend: str = "auto",
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, normalized, times their weights and rotated by `rope`, and v: each [L, N, K] in the dtype of `qkv_L3NK`.

    Weights are [K] for norm="per_head", [N K] for "across_heads", None for "none"; rope None rotates nothing. v is a
    view of `qkv_L3NK`, which must not be written to afterwards. `backend`: see launch.py. Differentiable once, in qkv
    and the weights. ValueError for arguments that do not match.

    `bias` [3 N K]: a bias that was added to qkv already, without a gradient; it gets its gradient here, except with
    norm="across_heads".
    """
    check(qkv_L3NK, q_weight, k_weight, rope, norm, bias)
    backend = resolve_backend(backend, qkv_L3NK)
    if norm == "none" and rope is None and bias is None:
        return qkv_L3NK.unbind(1)
    rotation_L1P = rope.rotation if rope is not None and backend == "torch" else None
    return QKNormRope3D.apply(qkv_L3NK, q_weight, k_weight, rope, rotation_L1P, eps, norm, backend, bias)


def check(
    qkv_L3NK: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Rope | None,
    norm: str,
    bias: Tensor | None,
) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} must be one of {', '.join(NORMS)}")
    if qkv_L3NK.ndim != 4 or qkv_L3NK.shape[1] != 3 or not qkv_L3NK.is_floating_point():
        raise ValueError(f"qkv {tuple(qkv_L3NK.shape)} of {qkv_L3NK.dtype} must be floating point [L, 3, N, K]")
    num_heads, head_dim = qkv_L3NK.shape[2:]
    expected = {"per_head": (head_dim,), "across_heads": (num_heads * head_dim,), "none": None}[norm]
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        shape = None if weight is None else tuple(weight.shape)
        if shape != expected:
            raise ValueError(f"{name} {shape} must be {expected} for norm={norm!r}, as qkv is {tuple(qkv_L3NK.shape)}")
    if bias is not None and (norm == "across_heads" or bias.shape != (3 * num_heads * head_dim,)):
        raise ValueError(
            f"bias {tuple(bias.shape)} must be ({3 * num_heads * head_dim},), and norm={norm!r} per_head or none"
        )
    if rope is not None:
        rope.check_shapes(qkv=qkv_L3NK)
    coords_L3 = None if rope is None else rope.coords_L3
    check_device(qkv=qkv_L3NK, q_weight=q_weight, k_weight=k_weight, bias=bias, rope=coords_L3)

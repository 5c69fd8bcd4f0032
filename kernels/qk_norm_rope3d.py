"""From the fused projection to attention: qkv [L, 3, N, K] in, q and k normed and turned, and v as it is, [L, N, K] out
(QK-norm, arXiv 2302.05442; 3D rotary embedding: see rope3d.py).

    n = x r,   r = 1 / sqrt(mean x^2 + eps)        x is q or k, the mean over what is normed together
    y = R (n w)                                    R turns every pair by the angle of its token

    norm="per_head": each head's K features, w [K].
    norm="across_heads": all N K features of a token, w [N K] (Wan, arXiv 2503.20314).
    "none": y = R x

    a = R^T dy                                     turned back
    dx = r (a w - n mean(a w n)),  dw = sum over tokens (and heads) of a n

v is a view of qkv. The backward pass writes the gradients of q, k and v side by side as dqkv, so that nothing is put
together afterwards; qkv is all it wants kept, since r follows from x, which it reads anyway. Computed in fp32 at least
and rounded once.

Least traffic in bf16: 4 bytes a number of q and k forward (x, y); backward 6 (x, dy, dx), and 4 of v (dv, its copy).

A program works on whole tokens: it asks memory for all of their heads at once, in a few tiles, and only then computes.
In the forward pass it has a tile of tokens; in the backward pass a run, over which it sums dw in registers. Sums of
runs are added up in a second pass; both have one order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.kernels import rms_norm, rows
from megasora.kernels.launch import Launch, Table, check_device, chosen, dense, launch_for, widened
from megasora.kernels.rope3d import (
    Rope,
    cos_sin,
    first_pairs,
    heads_dense,
    rope3d_reference,
    tile_of,
    turn_pairs,
    turn_torch,
)

FORWARD: Table = {"any": Launch(tile=1024, numbers=8)}
BACKWARD: Table = {"any": Launch(tile=1024, numbers=8)}
FORWARD_CHUNKS = 5  # tiles that hold all heads of a token: 6, 12, 20, 24 and 40 heads leave no gap
BACKWARD_CHUNKS = 3  # fewer, as registers hold their gradients and sums of the weight as well
BACKWARD_REGISTERS = 128  # of a thread, at most: 16 warps share a multiprocessor then, each with 3 KiB on the way
NORMS = ("per_head", "across_heads", "none")


def qk_norm_rope3d_reference(
    qkv_L3NK: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Rope | None,
    eps: float,
    norm: str = "per_head",
) -> tuple[Tensor, Tensor, Tensor]:
    """The maths, differentiable; arguments as of `qk_norm_rope3d`."""
    *qk, v_LNK = qkv_L3NK.unbind(1)
    turned = []
    for x_LNK, weight in zip(qk, (q_weight, k_weight), strict=True):
        y = vectors(x_LNK, norm)
        if norm != "none":
            y = rms_norm.rms_norm_reference(y, weight, eps)
        y = y.view(x_LNK.shape)
        y = y if rope is None else rope3d_reference(y, rope)
        turned.append(y.to(x_LNK.dtype))
    return *turned, v_LNK


def vectors(x_LNK: Tensor, norm: str) -> Tensor:
    """[L, M, W]: the M vectors of a token that are normed, of W numbers, in fp32 at least."""
    (x,) = widened(x_LNK)
    return x.flatten(1)[:, None] if norm == "across_heads" else x


def forward_torch(
    qkv_L3NK: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    turn_L1P: Tensor | None,
    eps: float,
    norm: str,
) -> tuple[Tensor, ...]:
    turned = []
    for part, weight in enumerate((q_weight, k_weight)):
        y = x_LNK = qkv_L3NK[:, part]
        if norm != "none":
            x = vectors(x_LNK, norm)
            y = rms_norm.forward_torch(x, weight, inverses(x, eps)).view(x_LNK.shape)
        y = y if turn_L1P is None else turn_torch(y, turn_L1P)
        turned.append(y.to(x_LNK.dtype))
    return tuple(turned)


def inverses(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(rms_norm.squares_torch(x) / x.shape[-1] + eps)


def backward_torch(
    grads: Sequence[Tensor],
    qkv_L3NK: Tensor | None,
    weights: Sequence[Tensor | None],
    turn_L1P: Tensor | None,
    eps: float,
    norm: str,
) -> tuple[Tensor, list[Tensor | None]]:
    """dqkv, and the gradients of the weights."""
    dq_LNK = grads[0]
    dqkv_L3NK, dweights = dq_LNK.new_empty(len(dq_LNK), 3, *dq_LNK.shape[1:]), []
    for part, (grad_LNK, weight) in enumerate(zip(grads, (*weights, None), strict=True)):
        a, dweight = grad_LNK, None
        if turn_L1P is not None and part < 2:
            a = turn_torch(grad_LNK, turn_L1P.conj())
        if weight is not None:
            x = vectors(qkv_L3NK[:, part], norm)
            dx, dweight = rms_norm.backward_torch(vectors(a, norm), x, weight, inverses(x, eps), x.shape[-1], None)
            a = dx.view(grad_LNK.shape)
        dqkv_L3NK[:, part] = a
        dweights.append(dweight)
    return dqkv_L3NK, dweights[:2]


@triton.jit
def load_heads(x, there, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr):
    """C chunks [T, H, BLOCK_K], all on their way at once; `x` [T, 1, BLOCK_K] points to the first head of tokens."""
    d = tl.arange(0, x.shape[2])[None, None]
    chunks = ()
    for c in tl.static_range(C):
        head = (c * H + tl.arange(0, H))[None, :, None]
        chunks += (tl.load(x + head * STRIDE, mask=there & (head < N) & (d < K), other=0.0),)
    return chunks


@triton.jit
def store_heads(y, c: tl.constexpr, chunk, there, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr):
    head, d = (c * H + tl.arange(0, H))[None, :, None], tl.arange(0, y.shape[2])[None, None]
    tl.store(y + head * K, chunk.to(y.dtype.element_ty), mask=there & (head < N) & (d < K))


@triton.jit
def load_weight(
    weight, there, d, NORM: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, C: tl.constexpr
):
    """Chunks as those of heads, spread over tokens, so that every thread reads what its own numbers want."""
    if NORM == "none":
        chunks = ()
    else:
        chunks = load_heads(weight + d, there, N, K, H, C, K if NORM == "across_heads" else 0)
    return chunks


@triton.jit
def means(xs, ys, ws, NORM: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """For each chunk the mean of x y w over what is normed together, [T, H, 1] or [T, 1, 1]; no `ws`: of x y."""
    products = ()
    for c in tl.static_range(len(xs)):
        product = xs[c].to(tl.float32) * ys[c].to(tl.float32)
        if len(ws) > 0:
            product *= ws[c].to(tl.float32)
        products += (product,)
    found = ()
    if NORM == "per_head":
        for c in tl.static_range(len(xs)):
            found += (tl.sum(products[c], 2, keep_dims=True) / K,)
    else:
        total = products[0]
        for c in tl.static_range(1, len(xs)):
            total += products[c]
        total = tl.sum(tl.sum(total, 2, keep_dims=True), 1, keep_dims=True)
        for _ in tl.static_range(len(xs)):
            found += (total / (N * K),)
    return found


@triton.jit
def forward_part(
    qkv_L3NK, weight, coords_L3, frequency_P, y_LNK, token, L, stride, part_stride, eps,
    PART: tl.constexpr, NORM: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    d, p = tl.arange(0, BLOCK_K)[None, None], tl.arange(0, BLOCK_K // 2)
    at, there = token.to(tl.int64)[:, None, None], (token < L)[:, None, None]
    xs = load_heads(qkv_L3NK + PART * part_stride + at * stride + d, there, N, K, H, C, K)
    ws = load_weight(weight, there, d, NORM, N, K, H, C)
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
            y = turn_pairs(y, cos, sin)
        store_heads(y_LNK + at * (N * K) + d, c, y, there, N, K, H)


@triton.jit
def forward_kernel(
    qkv_L3NK, q_weight, k_weight, coords_L3, frequency_P, q_LNK, k_LNK, stride, part_stride, L, eps,
    NORM: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * T + tl.arange(0, T)
    if tl.program_id(1) == 0:
        forward_part(
            qkv_L3NK, q_weight, coords_L3, frequency_P, q_LNK, token, L, stride, part_stride, eps,
            0, NORM, FIRST_H, FIRST_W, N, K, H, BLOCK_K, C,
        )  # fmt: skip
    else:
        forward_part(
            qkv_L3NK, k_weight, coords_L3, frequency_P, k_LNK, token, L, stride, part_stride, eps,
            1, NORM, FIRST_H, FIRST_W, N, K, H, BLOCK_K, C,
        )  # fmt: skip


@triton.jit
def norm_gradient(xs, gs, ws, sums, eps, NORM: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """dx of all chunks, from x, a and w; and `sums` of a n, by chunk or one of all, with these tokens added."""
    squares, alongs = means(xs, xs, (), NORM, N, K), means(xs, gs, ws, NORM, N, K)
    dxs, added = (), ()
    for c in tl.static_range(len(xs)):
        inverse = tl.rsqrt(squares[c] + eps)
        n = xs[c].to(tl.float32) * inverse
        dxs += (inverse * (gs[c] * ws[c].to(tl.float32) - n * (inverse * alongs[c])),)
        if NORM == "across_heads":
            added += (sums[c] + gs[c] * n,)
        elif c == 0:
            added = (sums[0] + gs[c] * n,)
        else:
            added = (added[0] + gs[c] * n,)
    return dxs, added


@triton.jit
def backward_part(
    grad_LNK, qkv_L3NK, weight, coords_L3, frequency_P, dqkv_L3NK, dweights_2QW, start, end,
    grad_stride, stride, part_stride, eps,
    PART: tl.constexpr, NORM: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, T: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    d, p = tl.arange(0, BLOCK_K)[None, None], tl.arange(0, BLOCK_K // 2)
    if coords_L3 is not None:
        frequency = tl.load(frequency_P + p, mask=p < K // 2, other=0.0)
    sums = ()
    for _ in tl.static_range(C if NORM == "across_heads" else 1):
        sums += (tl.zeros([T, H, BLOCK_K], tl.float32),)
    for first in range(start, end, T):
        token = first + tl.arange(0, T)
        at, there = token.to(tl.int64)[:, None, None], (token < end)[:, None, None]
        grads = load_heads(grad_LNK + at * grad_stride + d, there, N, K, H, C, K)
        if NORM != "none":
            xs = load_heads(qkv_L3NK + PART * part_stride + at * stride + d, there, N, K, H, C, K)
            ws = load_weight(weight, there, d, NORM, N, K, H, C)
        if coords_L3 is not None:
            cos, sin = cos_sin(coords_L3, token, token < end, frequency, FIRST_H, FIRST_W)
        gs = ()
        for c in tl.static_range(C):
            g = grads[c].to(tl.float32)
            if coords_L3 is not None:
                g = turn_pairs(g, cos, -sin)
            gs += (g,)
        if NORM == "none":
            dxs = gs
        else:
            dxs, sums = norm_gradient(xs, gs, ws, sums, eps, NORM, N, K)
        for c in tl.static_range(C):
            store_heads(dqkv_L3NK + (at * 3 + PART) * (N * K) + d, c, dxs[c], there, N, K, H)
    run = PART * tl.num_programs(0) + tl.program_id(0)
    if NORM == "across_heads":
        for c in tl.static_range(C):
            of_run = tl.sum(sums[c], 0, keep_dims=True)
            store_heads(dweights_2QW + run.to(tl.int64) * (N * K) + d, c, of_run, True, N, K, H)
    elif NORM == "per_head":
        of_run = tl.sum(tl.sum(sums[0], 1, keep_dims=True), 0, keep_dims=True)
        tl.store(dweights_2QW + run * K + d, of_run, mask=d < K)


@triton.jit
def copy_part(
    grad_LNK, dqkv_L3NK, start, end, grad_stride, PART: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_K)[None, None]
    for first in range(start, end, T):
        token = first + tl.arange(0, T)
        at, there = token.to(tl.int64)[:, None, None], (token < end)[:, None, None]
        grads = load_heads(grad_LNK + at * grad_stride + d, there, N, K, H, C, K)
        for c in tl.static_range(C):
            store_heads(dqkv_L3NK + (at * 3 + PART) * (N * K) + d, c, grads[c], there, N, K, H)


@triton.jit
def backward_kernel(
    dq_LNK, dk_LNK, dv_LNK, qkv_L3NK, q_weight, k_weight, coords_L3, frequency_P, dqkv_L3NK, dweights_2QW,
    dq_stride, dk_stride, dv_stride, stride, part_stride, L, RUN, eps,
    NORM: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * RUN
    end = tl.minimum(start + RUN, L)
    if tl.program_id(1) == 0:
        backward_part(
            dq_LNK, qkv_L3NK, q_weight, coords_L3, frequency_P, dqkv_L3NK, dweights_2QW, start, end,
            dq_stride, stride, part_stride, eps, 0, NORM, FIRST_H, FIRST_W, N, K, T, H, BLOCK_K, C,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        backward_part(
            dk_LNK, qkv_L3NK, k_weight, coords_L3, frequency_P, dqkv_L3NK, dweights_2QW, start, end,
            dk_stride, stride, part_stride, eps, 1, NORM, FIRST_H, FIRST_W, N, K, T, H, BLOCK_K, C,
        )  # fmt: skip
    else:
        copy_part(dv_LNK, dqkv_L3NK, start, end, dv_stride, 2, N, K, T, H, BLOCK_K, C)


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
    qkv_L3NK, q_weight, k_weight = heads_dense(qkv_L3NK), dense(q_weight), dense(k_weight)
    q_LNK, k_LNK = empty_forward(qkv_L3NK)
    if q_LNK.numel():
        num_tokens, num_heads, head_dim = q_LNK.shape
        launch = launch_for(FORWARD, qkv_L3NK.device)
        tile = tile_of(launch, num_heads, head_dim, FORWARD_CHUNKS)
        forward_kernel[triton.cdiv(num_tokens, tile[0]), 2](
            qkv_L3NK, q_weight, k_weight, coords_L3, frequency_P, q_LNK, k_LNK,
            qkv_L3NK.stride(0), qkv_L3NK.stride(1), num_tokens, eps,
            norm, *first_pairs(split), num_heads, head_dim, *tile, triton.cdiv(num_heads, tile[1]),
            num_warps=launch.warps(tile[1] * tile[2]),
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
) -> tuple[Tensor, Tensor]:
    grads = [heads_dense(x) for x in (dq_LNK, dk_LNK, dv_LNK)]
    qkv_L3NK, q_weight, k_weight = heads_dense(qkv_L3NK), dense(q_weight), dense(k_weight)
    num_tokens, num_heads, head_dim = dq_LNK.shape
    run = rows.run_of(num_tokens)
    num_runs = triton.cdiv(num_tokens, run)
    dqkv_L3NK, dweights_2QW = empty_backward(dq_LNK, norm, num_runs)
    strides = [x.stride(0) for x in grads] + ([0, 0] if qkv_L3NK is None else list(qkv_L3NK.stride()[:2]))
    if dqkv_L3NK.numel():
        launch = launch_for(BACKWARD, dq_LNK.device)
        tile = tile_of(launch, num_heads, head_dim, BACKWARD_CHUNKS)
        backward_kernel[num_runs, 3](
            *grads, qkv_L3NK, q_weight, k_weight, coords_L3, frequency_P, dqkv_L3NK, dweights_2QW,
            *strides, num_tokens, run, eps,
            norm, *first_pairs(split), num_heads, head_dim, *tile, triton.cdiv(num_heads, tile[1]),
            num_warps=launch.warps(tile[1] * tile[2]), maxnreg=BACKWARD_REGISTERS,
        )  # fmt: skip
    return dqkv_L3NK, dweights_2QW.sum(1)


@backward_triton.register_fake
def _(dq_LNK, dk_LNK, dv_LNK, qkv_L3NK, q_weight, k_weight, coords_L3, frequency_P, split, eps, norm):
    dqkv_L3NK, dweights_2QW = empty_backward(dq_LNK, norm, 1)
    return dqkv_L3NK, dweights_2QW[:, 0]


def empty_backward(dq_LNK: Tensor, norm: str, num_runs: int) -> tuple[Tensor, Tensor]:
    """dqkv, and fp32 [2, Q, W] for the weights' gradients of each run."""
    num_tokens, num_heads, head_dim = dq_LNK.shape
    width = {"per_head": head_dim, "across_heads": num_heads * head_dim, "none": 0}[norm]
    dqkv_L3NK = dq_LNK.new_empty(num_tokens, 3, num_heads, head_dim)
    return dqkv_L3NK, dq_LNK.new_empty(2, num_runs, width, dtype=torch.float32)


class QKNormRope3D(Function):
    @staticmethod
    def forward(
        ctx,
        qkv_L3NK: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        rope: Rope | None,
        turn_L1P: Tensor | None,
        eps: float,
        norm: str,
        via: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if via == "triton":
            q_LNK, k_LNK = forward_triton(qkv_L3NK, q_weight, k_weight, *parts_of(rope), eps, norm)
        else:
            q_LNK, k_LNK = forward_torch(qkv_L3NK, q_weight, k_weight, turn_L1P, eps, norm)
        ctx.save_for_backward(None if norm == "none" else qkv_L3NK, q_weight, k_weight)
        ctx.rope, ctx.turn_L1P, ctx.eps, ctx.norm, ctx.via = rope, turn_L1P, eps, norm, via
        return q_LNK, k_LNK, qkv_L3NK[:, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv_L3NK, *weights = ctx.saved_tensors
        if ctx.via == "triton":
            given = *grads, qkv_L3NK, *weights, *parts_of(ctx.rope), ctx.eps, ctx.norm
            dqkv_L3NK, dweights = backward_triton(*given)
        else:
            dqkv_L3NK, dweights = backward_torch(grads, qkv_L3NK, weights, ctx.turn_L1P, ctx.eps, ctx.norm)
        if ctx.norm == "none":
            return dqkv_L3NK, *[None] * 7
        return dqkv_L3NK, *(dw.to(w.dtype) for dw, w in zip(dweights, weights, strict=True)), *[None] * 5


def parts_of(rope: Rope | None) -> tuple[Tensor | None, Tensor | None, Sequence[int]]:
    """As operators take it: coords, frequencies, split."""
    return (None, None, (0, 0, 0)) if rope is None else (rope.coords_L3, rope.frequency_P, rope.split)


def qk_norm_rope3d(
    qkv_L3NK: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Rope | None,
    eps: float,
    norm: str = "per_head",
    via: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, normed, times their weights and turned by `rope`, and v: each [L, N, K] in the dtype of `qkv_L3NK`.

    Weights are [K] for norm="per_head", [N K] for "across_heads", None for "none"; rope None turns nothing. v is a view
    of `qkv_L3NK`, which must not be written to afterwards. `via`: see launch.py. Differentiable once, in qkv and the
    weights. ValueError on what does not fit.
    """
    check(qkv_L3NK, q_weight, k_weight, rope, norm)
    via = chosen(via, qkv_L3NK)
    if norm == "none" and rope is None:
        return qkv_L3NK.unbind(1)
    turn_L1P = rope.turn if rope is not None and via == "torch" else None
    return QKNormRope3D.apply(qkv_L3NK, q_weight, k_weight, rope, turn_L1P, eps, norm, via)


def check(qkv_L3NK: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, rope: Rope | None, norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} must be one of {', '.join(NORMS)}")
    if qkv_L3NK.ndim != 4 or qkv_L3NK.shape[1] != 3 or not qkv_L3NK.is_floating_point():
        raise ValueError(f"qkv {tuple(qkv_L3NK.shape)} of {qkv_L3NK.dtype} must be [L, 3, N, K] of floating point")
    num_heads, head_dim = qkv_L3NK.shape[2:]
    wanted = {"per_head": (head_dim,), "across_heads": (num_heads * head_dim,), "none": None}[norm]
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        found = None if weight is None else tuple(weight.shape)
        if found != wanted:
            raise ValueError(f"{name} {found} must be {wanted} for norm={norm!r}, as qkv is {tuple(qkv_L3NK.shape)}")
    if rope is not None:
        rope.check(qkv=qkv_L3NK)
    check_device(qkv=qkv_L3NK, q_weight=q_weight, k_weight=k_weight, rope=None if rope is None else rope.coords_L3)

"""Every operation of kernels/ with inputs like those of a pack, for tests and benchmarks that cover all of them.

    problem = OPERATIONS["adaln_modulate"](Size(tokens=65_536, width=3072, head_dim=128), torch.bfloat16, "cuda")
    problem.triton(*problem.inputs)
    problem.reference(*problem.inputs)     the maths in plain PyTorch, which torch.compile accepts

The least traffic is that of reading and writing every activation once, in bytes per element of one activation in bf16.
Row vectors, statistics of tokens and partial sums are small in comparison and not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megasora.kernels import (
    adaln,
    adamw,
    gated_add,
    gelu,
    merge_partial_attention,
    qk_norm_rope3d,
    rms_norm,
    rope3d,
)
from megasora.kernels.rope3d import Rope
from megasora.kernels.rows import Rows

EPS = 1e-6
ROPE_BASE = 10_000.0
FRAME_SIDE = 32  # rows and columns of tokens in a latent frame
VECTORS = ("gate_RD", "shift_RD", "scale_RD", "weight_D", "bias_D")  # arguments of gated_residual_adaln


@dataclass(frozen=True)
class Size:
    tokens: int
    width: int
    head_dim: int = 128  # divides the width
    row_tokens: int = 4096  # of each row; the last may be shorter

    @property
    def heads(self) -> int:
        return self.width // self.head_dim


@dataclass(frozen=True)
class Problem:
    inputs: tuple[Tensor, ...]
    triton: Callable[..., Tensor | tuple[Tensor, ...]]  # takes the inputs
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    elements: int  # of one activation
    forward_bytes: float  # least traffic per element
    backward_bytes: float | None  # None: no backward pass
    layout_bytes: float = 0.0  # of the backward pass on top, required by the layout of the gradient

    @property
    def least_bytes(self) -> dict[str, float]:
        """Least traffic of the passes "forward" and, if there is one, "backward"."""
        passes = {"forward": self.forward_bytes * self.elements}
        if self.backward_bytes is not None:
            passes["backward"] = (self.backward_bytes + self.layout_bytes) * self.elements
        return passes


def build_rows(size: Size, device: torch.device | str) -> Rows:
    cu_rows = torch.tensor([*range(0, size.tokens, size.row_tokens), size.tokens])
    return Rows.from_cu_seqlens(cu_rows, size.tokens, device)


class Angles(NamedTuple):
    """The part of a Rope that references read: fp32 [L, 1, K/2]. Without kernels, a model computes it once per pack."""

    cos: Tensor
    sin: Tensor


def build_rope(size: Size, device: torch.device | str) -> tuple[Rope, Angles]:
    index = torch.arange(size.tokens, dtype=torch.int32, device=device)
    coords_L3 = torch.stack((index // FRAME_SIDE**2, index // FRAME_SIDE % FRAME_SIDE, index % FRAME_SIDE), 1)
    rope = Rope.build(coords_L3, size.head_dim, ROPE_BASE, device=device)
    return rope, Angles(rope.cos.contiguous(), rope.sin.contiguous())


def normal(dtype: torch.dtype, device: torch.device | str, *shape: int, needs_grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_(needs_grad)


def build_adaln_modulate(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    draw, rows = partial(normal, dtype, device), build_rows(size, device)
    vectors = (draw(rows.num_rows, size.width) for _ in range(2))
    return Problem(
        (draw(size.tokens, size.width), *vectors),
        lambda *tensors: adaln.adaln_modulate(*tensors, rows, EPS, backend="triton"),
        lambda *tensors: adaln.adaln_modulate_reference(*tensors, rows, EPS),
        size.tokens * size.width,
        forward_bytes=4,  # x, y
        backward_bytes=6,  # x, dy, dx
    )


def build_gated_residual_adaln(
    vectors: tuple[str, ...], backward_bytes: int, size: Size, dtype: torch.dtype, device: torch.device | str
) -> Problem:
    """`vectors`: names of the arguments among VECTORS that are not None."""
    draw, rows = partial(normal, dtype, device), build_rows(size, device)
    shapes = {name: (rows.num_rows, size.width) if name.endswith("_RD") else (size.width,) for name in VECTORS}

    def call(function: Callable, x: Tensor, branch: Tensor, *tensors: Tensor, **options: str) -> tuple[Tensor, Tensor]:
        named = dict.fromkeys(VECTORS) | dict(zip(vectors, tensors, strict=True))
        return function(x, branch, rows=rows, eps=EPS, **named, **options)

    return Problem(
        (draw(size.tokens, size.width), draw(size.tokens, size.width), *(draw(*shapes[name]) for name in vectors)),
        partial(call, adaln.gated_residual_adaln, backend="triton"),
        partial(call, adaln.gated_residual_adaln_reference),
        size.tokens * size.width,
        forward_bytes=8,  # x, branch, y, z
        backward_bytes=backward_bytes,
    )


def build_gated_add(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    draw, rows = partial(normal, dtype, device), build_rows(size, device)
    return Problem(
        (draw(size.tokens, size.width), draw(size.tokens, size.width), draw(rows.num_rows, size.width)),
        lambda *tensors: gated_add.gated_add(*tensors, rows, backend="triton"),
        lambda *tensors: gated_add.gated_add_reference(*tensors, rows),
        size.tokens * size.width,
        forward_bytes=6,  # x, branch, y
        backward_bytes=6,  # dy, branch, dbranch; dx is dy itself
    )


def build_gelu(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    draw = partial(normal, dtype, device)
    return Problem(
        (draw(size.tokens, size.width), draw(size.width)),
        partial(gelu.gelu, backend="triton"),
        gelu.gelu_reference,
        size.tokens * size.width,
        forward_bytes=4,  # x, h
        backward_bytes=8,  # x, dh, dx, and h, which the matrix after it needs
    )


def build_rope3d(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    rope, angles = build_rope(size, device)
    return Problem(
        (normal(dtype, device, size.tokens, size.heads, size.head_dim),),
        lambda x: rope3d.rope3d(x, rope, backend="triton"),
        lambda x: rope3d.rope3d_reference(x, angles),
        size.tokens * size.width,
        forward_bytes=4,  # x, y
        backward_bytes=4,  # dy, dx
    )


def build_qk_norm_rope3d(norm: str, size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    draw, (rope, angles) = partial(normal, dtype, device), build_rope(size, device)
    weight = size.head_dim if norm == "per_head" else size.width
    bias = draw(3 * size.width) if norm == "per_head" else None  # its gradient is computed in the same pass
    return Problem(
        (draw(size.tokens, 3, size.heads, size.head_dim), draw(weight), draw(weight)),
        lambda *tensors: qk_norm_rope3d.qk_norm_rope3d(*tensors, rope, EPS, norm, backend="triton", bias=bias),
        lambda *tensors: qk_norm_rope3d.qk_norm_rope3d_reference(*tensors, angles, EPS, norm),
        2 * size.tokens * size.width,  # of q and k
        forward_bytes=4,  # each, and each rotated; v is a view
        backward_bytes=6,  # each, the gradient of its output, and its own
        layout_bytes=2,  # copies dv next to dq and dk: 4 bytes per element of v
    )


def build_rms_norm(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    draw = partial(normal, dtype, device)
    return Problem(
        (draw(size.tokens, size.width), draw(size.width)),
        lambda *tensors: rms_norm.rms_norm(*tensors, EPS, backend="triton"),
        lambda *tensors: rms_norm.rms_norm_reference(*tensors, EPS),
        size.tokens * size.width,
        forward_bytes=4,  # x, y
        backward_bytes=6,  # x, dy, dx
    )


def build_merge_partial_attention(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    shape = size.tokens, size.heads, size.head_dim
    merged, part = (partial(normal, t, device, needs_grad=False) for t in (torch.float32, dtype))
    return Problem(
        (merged(*shape), merged(*shape[:2]), part(*shape), merged(*shape[:2])),
        partial(merge_partial_attention.merge_partial_attention, backend="triton"),
        merge_partial_attention.merge_partial_attention_reference,
        size.tokens * size.width,
        forward_bytes=10,  # the merged output in fp32, read and written, and a part in bf16
        backward_bytes=None,
    )


def build_adamw_step(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    """A partition of `tokens` x `width` weights with one average; `dtype`: of the model."""
    count = size.tokens * size.width
    w, m, v, grad, average = (torch.rand(count, device=device) for _ in range(5))
    factor, apply = torch.tensor(0.5, device=device), torch.tensor(True, device=device)
    rule = adamw.AdamWRule(lr=1e-4, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01, number=7)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        w, m, v, grad, average, out = tensors
        averages = adamw.Averages([average], [0.01])
        adamw.adamw_(w, m, v, grad, rule, factor, apply, averages, out, backend="triton")
        return w, m, v, average, out

    def reference(*tensors: Tensor) -> tuple[Tensor, ...]:
        w, m, v, grad, average, out = tensors
        return adamw.adamw_reference(w, m, v, grad, rule, factor, adamw.Averages([average], [0.01]), out.dtype)

    inputs = w, m, v, grad, average, torch.empty(count, dtype=dtype, device=device)
    # w, m, v and the average read and written, the gradient read, all in fp32; the weights written in bf16
    return Problem(inputs, step, reference, count, forward_bytes=38, backward_bytes=None)


def build_sum_of_squares(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    count = size.tokens * size.width
    return Problem(
        (torch.rand(count, device=device),),
        partial(adamw.sum_of_squares, backend="triton"),
        lambda x: x.double().square().sum(),
        count,
        forward_bytes=4,  # x, in fp32
        backward_bytes=None,
    )


OPERATIONS: dict[str, Callable[[Size, torch.dtype, torch.device | str], Problem]] = {
    "adaln_modulate": build_adaln_modulate,
    # dy, dz, y, branch, dx, dbranch
    "gated_residual_adaln": partial(build_gated_residual_adaln, ("gate_RD", "shift_RD", "scale_RD"), 12),
    # as after self-attention: the norm has a weight and a bias, and no modulation
    "gated_residual_norm": partial(build_gated_residual_adaln, ("gate_RD", "weight_D", "bias_D"), 12),
    # as after cross-attention, whose branch has no gate: dy, dz, y, and dx, which is also dbranch
    "residual_adaln": partial(build_gated_residual_adaln, ("shift_RD", "scale_RD"), 8),
    "gated_add": build_gated_add,
    "gelu": build_gelu,
    "rope3d": build_rope3d,
    "qk_norm_rope3d, per_head": partial(build_qk_norm_rope3d, "per_head"),
    "qk_norm_rope3d, across_heads": partial(build_qk_norm_rope3d, "across_heads"),
    "rms_norm": build_rms_norm,
    "merge_partial_attention": build_merge_partial_attention,
    "adamw_step": build_adamw_step,
    "sum_of_squares": build_sum_of_squares,
}


def forward(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs = function(*inputs)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def backward(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]] | None:
    """A function that runs the backward pass, once; None if no output requires a gradient.

    Gradients of the outputs are allocated here, not in that function.
    """
    leaves, roots = ([x for x in tensors if x.requires_grad] for tensors in (inputs, outputs))
    grads = [torch.ones_like(y) for y in roots]
    return (lambda: torch.autograd.grad(roots, leaves, grads)) if roots else None

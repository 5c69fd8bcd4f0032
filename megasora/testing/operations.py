"""Every operation of kernels/ on inputs like a pack's: what is counted, compiled and timed without naming each.

    problem = OPERATIONS["adaln_modulate"](Size(tokens=65_536, width=3072, head_dim=128), torch.bfloat16, "cuda")
    problem.ours(*problem.inputs)          by Triton
    problem.reference(*problem.inputs)     the maths in plain PyTorch, which torch.compile may take

Least traffic is what must be moved if every activation is read and written once, in bytes for each number of one
activation in bf16: vectors of rows, statistics of tokens and partial sums are small beside it and do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megasora.kernels import (
    adaln_modulate,
    gated_add,
    gated_residual_adaln,
    merge_partial_attention,
    qk_norm_rope3d,
    rms_norm,
    rope3d,
)
from megasora.kernels.rope3d import Rope
from megasora.kernels.rows import Rows

EPS = 1e-6
ROPE_BASE = 10_000.0
SIDE = 32  # rows and columns of tokens in a latent frame


@dataclass(frozen=True)
class Size:
    tokens: int
    width: int
    head_dim: int = 128  # divides the width
    row: int = 4096  # tokens of a row; the last may be shorter

    @property
    def heads(self) -> int:
        return self.width // self.head_dim


@dataclass(frozen=True)
class Problem:
    inputs: tuple[Tensor, ...]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]  # of the inputs
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    numbers: int  # of one activation
    forward: float  # least bytes for each of them
    backward: float | None  # None: records no gradient
    unavoidable: float = 0.0  # bytes of the backward pass on top, as the layout of the gradient wants them

    @property
    def least_bytes(self) -> dict[str, float]:
        """Of the pass named."""
        passes = {"forward": self.forward * self.numbers}
        if self.backward is not None:
            passes["backward"] = (self.backward + self.unavoidable) * self.numbers
        return passes


def rows_of(size: Size, device: torch.device | str) -> Rows:
    cu_rows = torch.tensor([*range(0, size.tokens, size.row), size.tokens])
    return Rows.from_cu_seqlens(cu_rows, size.tokens, device)


class Angles(NamedTuple):
    """What references read of a Rope, in memory: fp32 [L, 1, K/2]. A model that has no kernel makes it once a pack."""

    cos: Tensor
    sin: Tensor


def rope_of(size: Size, device: torch.device | str) -> tuple[Rope, Angles]:
    place = torch.arange(size.tokens, dtype=torch.int32, device=device)
    coords_L3 = torch.stack((place // SIDE**2, place // SIDE % SIDE, place % SIDE), 1)
    rope = Rope.build(coords_L3, size.head_dim, ROPE_BASE, device=device)
    return rope, Angles(rope.cos.contiguous(), rope.sin.contiguous())


def normal(dtype: torch.dtype, device: torch.device | str, *shape: int, needs_grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_(needs_grad)


def build_adaln_modulate(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    draw, rows = partial(normal, dtype, device), rows_of(size, device)
    vectors = (draw(rows.num_rows, size.width) for _ in range(2))
    return Problem(
        (draw(size.tokens, size.width), *vectors),
        lambda *given: adaln_modulate.adaln_modulate(*given, rows, EPS, via="triton"),
        lambda *given: adaln_modulate.adaln_modulate_reference(*given, rows, EPS),
        size.tokens * size.width,
        forward=4,  # x, y
        backward=6,  # x, dy, dx
    )


def build_gated_residual_adaln(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    draw, rows = partial(normal, dtype, device), rows_of(size, device)
    vectors = (draw(rows.num_rows, size.width) for _ in range(3))
    return Problem(
        (draw(size.tokens, size.width), draw(size.tokens, size.width), *vectors),
        lambda *given: gated_residual_adaln.gated_residual_adaln(*given, rows, EPS, via="triton"),
        lambda *given: gated_residual_adaln.gated_residual_adaln_reference(*given, rows, EPS),
        size.tokens * size.width,
        forward=8,  # x, branch, y, z
        backward=12,  # dy, dz, y, branch, dx, dbranch
    )


def build_gated_residual_norm(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    """As behind self-attention: the norm has a weight and a bias of its own, and no row vectors."""
    draw, rows = partial(normal, dtype, device), rows_of(size, device)
    inputs = (draw(size.tokens, size.width), draw(size.tokens, size.width), draw(rows.num_rows, size.width))

    def call(function: Callable, x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, **way: str):
        return function(x, branch, gate, None, None, rows, EPS, weight, bias, **way)

    return Problem(
        (*inputs, draw(size.width), draw(size.width)),
        partial(call, gated_residual_adaln.gated_residual_adaln, via="triton"),
        partial(call, gated_residual_adaln.gated_residual_adaln_reference),
        size.tokens * size.width,
        forward=8,  # x, branch, y, z
        backward=12,  # dy, dz, y, branch, dx, dbranch
    )


def build_residual_adaln(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    """As behind the cross-attention, whose branch has no gate."""
    draw, rows = partial(normal, dtype, device), rows_of(size, device)
    vectors = (draw(rows.num_rows, size.width) for _ in range(2))

    def call(function: Callable, x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, **way: str):
        return function(x, branch, None, shift, scale, rows, EPS, **way)

    return Problem(
        (draw(size.tokens, size.width), draw(size.tokens, size.width), *vectors),
        partial(call, gated_residual_adaln.gated_residual_adaln, via="triton"),
        partial(call, gated_residual_adaln.gated_residual_adaln_reference),
        size.tokens * size.width,
        forward=8,  # x, branch, y, z
        backward=8,  # dy, dz, y, dx, which is dbranch
    )


def build_gated_add(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    draw, rows = partial(normal, dtype, device), rows_of(size, device)
    return Problem(
        (draw(size.tokens, size.width), draw(size.tokens, size.width), draw(rows.num_rows, size.width)),
        lambda *given: gated_add.gated_add(*given, rows, via="triton"),
        lambda *given: gated_add.gated_add_reference(*given, rows),
        size.tokens * size.width,
        forward=6,  # x, branch, y
        backward=6,  # dy, branch, dbranch; dx is dy itself
    )


def build_rope3d(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    rope, angles = rope_of(size, device)
    return Problem(
        (normal(dtype, device, size.tokens, size.heads, size.head_dim),),
        lambda x: rope3d.rope3d(x, rope, via="triton"),
        lambda x: rope3d.rope3d_reference(x, angles),
        size.tokens * size.width,
        forward=4,  # x, y
        backward=4,  # dy, dx
    )


def build_qk_norm_rope3d(norm: str, size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    draw, (rope, angles) = partial(normal, dtype, device), rope_of(size, device)
    weight = size.head_dim if norm == "per_head" else size.width
    return Problem(
        (draw(size.tokens, 3, size.heads, size.head_dim), draw(weight), draw(weight)),
        lambda *given: qk_norm_rope3d.qk_norm_rope3d(*given, rope, EPS, norm, via="triton"),
        lambda *given: qk_norm_rope3d.qk_norm_rope3d_reference(*given, angles, EPS, norm),
        2 * size.tokens * size.width,  # of q and k
        forward=4,  # each, and each turned; v stays where it is
        backward=6,  # each, its gradient, and the gradient before
        unavoidable=2,  # v's gradient is put beside those of q and k: 4 bytes for a number of v
    )


def build_rms_norm(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    draw = partial(normal, dtype, device)
    return Problem(
        (draw(size.tokens, size.width), draw(size.width)),
        lambda *given: rms_norm.rms_norm(*given, EPS, via="triton"),
        lambda *given: rms_norm.rms_norm_reference(*given, EPS),
        size.tokens * size.width,
        forward=4,  # x, y
        backward=6,  # x, dy, dx
    )


def build_merge_partial_attention(size: Size, dtype: torch.dtype, device: torch.device | str) -> Problem:
    shape = size.tokens, size.heads, size.head_dim
    so_far, part = (partial(normal, t, device, needs_grad=False) for t in (torch.float32, dtype))
    return Problem(
        (so_far(*shape), so_far(*shape[:2]), part(*shape), so_far(*shape[:2])),
        partial(merge_partial_attention.merge_partial_attention, via="triton"),
        merge_partial_attention.merge_partial_attention_reference,
        size.tokens * size.width,
        forward=10,  # what was merged so far in fp32, twice, and a part in bf16
        backward=None,
    )


OPERATIONS: dict[str, Callable[[Size, torch.dtype, torch.device | str], Problem]] = {
    "adaln_modulate": build_adaln_modulate,
    "gated_residual_adaln": build_gated_residual_adaln,
    "gated_residual_norm": build_gated_residual_norm,
    "residual_adaln": build_residual_adaln,
    "gated_add": build_gated_add,
    "rope3d": build_rope3d,
    "qk_norm_rope3d, per_head": partial(build_qk_norm_rope3d, "per_head"),
    "qk_norm_rope3d, across_heads": partial(build_qk_norm_rope3d, "across_heads"),
    "rms_norm": build_rms_norm,
    "merge_partial_attention": build_merge_partial_attention,
}


def forward(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs = function(*inputs)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def backward(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]] | None:
    """The backward pass, to be called once; None where nothing wants a gradient. Gradients of outputs are made here."""
    leaves, wanted = ([x for x in given if x.requires_grad] for given in (inputs, outputs))
    grads = [torch.ones_like(y) for y in wanted]
    return (lambda: torch.autograd.grad(wanted, leaves, grads)) if wanted else None

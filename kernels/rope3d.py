"""3D rotary embedding: rotates the heads x [L, N, K] of tokens at coords (t, h, w) (RoFormer, arXiv 2104.09864; the
split of the head dim over t, h and w is that of Wan, arXiv 2503.20314).

    y[2p] = x[2p] cos a - x[2p+1] sin a,   y[2p+1] = x[2p] sin a + x[2p+1] cos a        a = coord[i] frequency[p]

The angle of pair p of token i is linear in one coordinate, so that q . k depends on differences of coords only. Coords
are integer or fractional positions; coords and angles are fp32. An axis with d of the K elements has d / 2 pairs; the
frequency of its pair j is

    base^(-2j/d) s^(-2j/(d-2))        d = 2: 1 / s

in radians per position. s is the NTK factor of the axis (1: standard RoPE): the size of the clips divided by the size
of the clips trained on. The fastest pair keeps its frequency, the slowest is slowed down by s, as if the base of the
axis were multiplied by s^(d/(d-2)). In sampling, `rope_scaling.py` changes the frequencies further.

The gradient is dy rotated by the negative angles; nothing is saved for it. The kernel computes cos and sin from the
three coords of a token; loaded from memory, the two in fp32 would cost as much as two heads in bf16. It reduces angles
to quarter turns: with n the integer nearest to a / (pi/2), a - n pi/2 is in [-pi/4, pi/4], where short polynomials are
accurate to fp32, and n mod 4 gives the swap of cos and sin and their signs.

Least traffic in bf16, bytes per element: 4 forward (x, y), 4 backward (dy, dx).

Letters: `P` pairs of a head, K / 2. In kernels: `T` tokens of a program, `H` heads of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.kernels.launch import (
    LaunchConfig,
    LaunchTable,
    call,
    cdiv,
    check_device,
    jit_for_packs,
    launch_config,
    resolve_backend,
    upcast,
)
from megasora.kernels.rope_scaling import RopeScaling

ROTATE: LaunchTable = {"any": LaunchConfig(tile_elements=1024, elements_per_thread=8)}
MAX_CHUNKS = 5  # of the heads of a token, which share cos and sin; 6, 12, 20, 24 and 40 heads need no padding heads


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Elements of the head dim rotated by t, by h and by w; all even."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_frequency(
    split: Sequence[int], base: float, scale: Sequence[float], scaling: RopeScaling | None = None
) -> Tensor:
    """fp32 [K/2]: radians per position of each pair. `scale`: NTK factor of each axis, times that of `scaling`."""
    if scaling is not None:
        scale = [s * factor for s, factor in zip(scale, scaling.ntk_factors(), strict=True)]
    frequencies = []
    for size, s in zip(split, scale, strict=True):
        j = torch.arange(size // 2, dtype=torch.float64)
        slowed = s ** (2 * j / (size - 2)) if size > 2 else torch.full_like(j, s)
        frequencies.append(base ** (-2 * j / max(size, 1)) / slowed)
    if scaling is not None:
        frequencies[0] = scaling.scale_time(frequencies[0])
    return torch.cat(frequencies).float()


@dataclass(frozen=True)
class Rope:
    """Coords of the tokens of a pack and frequencies of their rotation. Build one per pack, use it in every layer."""

    coords_L3: Tensor  # int32 or fp32, contiguous
    frequency_P: Tensor  # fp32 [K/2]: radians per position of each pair
    split: tuple[int, int, int]  # elements of the head dim rotated by t, h, w
    cached_rotation: Tensor | None = field(default=None, init=False, repr=False)  # set on first use of `rotation`

    @classmethod
    def build(
        cls,
        coords_L3: Tensor,
        head_dim: int,
        base: float,
        split: Sequence[int] | None = None,
        scale: Sequence[float] = (1.0, 1.0, 1.0),
        device: torch.device | str | None = None,
        scaling: RopeScaling | None = None,
    ) -> Rope:
        """`coords_L3`: integers or floats. `device` None: the device of the coords. `split` None:
        `rope_split(head_dim)`.

        `scale`: NTK factors of t, h, w, each the size of the clips divided by the size trained on. `scaling`: for clips
        larger than those. ValueError for arguments that do not match.
        """
        if coords_L3.ndim != 2 or coords_L3.shape[1] != 3 or coords_L3.is_complex():
            raise ValueError(f"coords {tuple(coords_L3.shape)} of {coords_L3.dtype} must be real, [L, 3]")
        split = rope_split(head_dim) if split is None else tuple(split)
        if len(split) != 3 or sum(split) != head_dim or any(size < 0 or size % 2 for size in split):
            raise ValueError(f"split={split} must be three even numbers that add up to head_dim={head_dim}")
        if not base > 0:
            raise ValueError(f"base={base} must be above 0")
        if len(scale) != 3 or not all(s > 0 for s in scale):
            raise ValueError(f"scale={tuple(scale)} must be three numbers above 0, for t, h and w")
        device = coords_L3.device if device is None else device
        dtype = torch.float32 if coords_L3.is_floating_point() else torch.int32
        frequency_P = rope_frequency(split, base, scale, scaling).to(device)
        return cls(coords_L3.to(device, dtype).contiguous(), frequency_P, split)

    @property
    def rotation(self) -> Tensor:
        """complex64 [L, 1, K/2]: cos a + i sin a, the factor of x[2p] + i x[2p+1]."""
        if self.cached_rotation is None:
            coords = self.coords_L3.float().split(1, 1)
            frequencies = self.frequency_P.split([size // 2 for size in self.split])
            angle = torch.cat([c * f for c, f in zip(coords, frequencies, strict=True)], 1)[:, None]
            # not a functools.cached_property: torch.compile refuses its lock of Python 3.11
            object.__setattr__(self, "cached_rotation", torch.complex(angle.cos(), angle.sin()))
        return self.cached_rotation

    @property
    def cos(self) -> Tensor:
        """fp32 [L, 1, K/2]"""
        return self.rotation.real

    @property
    def sin(self) -> Tensor:
        return self.rotation.imag

    def check_shapes(self, **heads: Tensor) -> None:
        """Raises ValueError unless each of `heads` is [L, ..., K] with the L of the coords and K = sum(split)."""
        tokens, head_dim = len(self.coords_L3), sum(self.split)
        for name, x in heads.items():
            if x.shape[0] != tokens or x.shape[-1] != head_dim:
                raise ValueError(
                    f"{name} {tuple(x.shape)} must have the {tokens} tokens of coords {tuple(self.coords_L3.shape)} "
                    f"and head dim {head_dim} = {' + '.join(map(str, self.split))}"
                )


def rope3d_reference(x_LNK: Tensor, rope: Rope) -> Tensor:
    """Reference implementation, differentiable; arguments as of `rope3d`."""
    even, odd = upcast(*x_LNK.unflatten(-1, (-1, 2)).unbind(-1))
    rotated = torch.stack((even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos), -1)
    return rotated.flatten(-2).to(x_LNK.dtype)


def rotate_torch(x_LNK: Tensor, rotation_L1P: Tensor) -> Tensor:
    """x rotated, in fp32 at least: a product of complex numbers takes fewer passes over memory than one of pairs."""
    even, odd = upcast(*x_LNK.unflatten(-1, (-1, 2)).unbind(-1))
    return torch.view_as_real(torch.complex(even, odd).mul_(rotation_L1P)).flatten(-2)


@triton.jit
def cos_sin(coords_L3, token, mask, frequency, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr):
    """fp32 [T, P] for tokens [T] and pairs [P]; pairs from FIRST_H on are rotated by h, from FIRST_W on by w."""
    at = coords_L3 + token * 3
    t = tl.load(at, mask=mask, other=0).to(tl.float32)[:, None]
    h = tl.load(at + 1, mask=mask, other=0).to(tl.float32)[:, None]
    w = tl.load(at + 2, mask=mask, other=0).to(tl.float32)[:, None]
    p = tl.arange(0, frequency.shape[0])[None]
    angle = tl.where(p < FIRST_H, t, tl.where(p < FIRST_W, h, w)) * frequency[None]
    # adding 1.5 * 2^23 rounds to the nearest integer, which is then in the low bits of the sum
    quarters = angle * 0.6366197723675814 + 12582912.0
    n = quarters - 12582912.0
    # pi/2 as a sum of three: of 8 bits, of 11 bits, and the rest; the first two products are exact up to 12,000 radians
    rest = angle - n * 1.5703125 - n * 0.00048375129699707031 - n * 7.5497901e-8
    square = rest * rest
    sin = rest + rest * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cos = 1.0 + square * (-0.5 + square * (4.166664568e-2 + square * (-1.388731625e-3 + square * 2.443315711e-5)))
    quarter = quarters.to(tl.int32, bitcast=True)
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((quarter + 1) & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)


@triton.jit
def rotate_pairs(x, cos, sin):
    """x [T, H, K] with the heads of each token rotated by its cos and sin [T, K/2]."""
    cos, sin = cos[:, None], sin[:, None]
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)


@jit_for_packs
def rotate_kernel(
    x_LNK, coords_L3, frequency_P, y_LNK, x_stride, L, N,
    BACK: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token, d, p = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 2)
    frequency = tl.load(frequency_P + p, mask=p < K // 2, other=0.0)
    cos, sin = cos_sin(coords_L3, token, token < L, frequency, FIRST_H, FIRST_W)
    if BACK:
        sin = -sin
    mask, at = (token < L)[:, None, None] & (d < K)[None, None], token.to(tl.int64)[:, None, None]
    x_LNK += at * x_stride + d[None, None]
    y_LNK += at * (N * K) + d[None, None]
    for first in range(0, N, H):
        head = (first + tl.arange(0, H))[None, :, None]
        inside = mask & (head < N)
        x = tl.load(x_LNK + head * K, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_LNK + head * K, rotate_pairs(x, cos, sin).to(y_LNK.dtype.element_ty), mask=inside)


@functools.cache
def tile_shape(config: LaunchConfig, num_heads: int, head_dim: int, max_chunks: int) -> tuple[int, int, int]:
    """(T, H, BLOCK_K), powers of two: tokens, heads and elements of a head per chunk; at most `max_chunks` a token."""
    block = triton.next_power_of_2(head_dim)
    heads = triton.next_power_of_2(cdiv(num_heads, max_chunks))
    return config.vectors_per_tile(heads * block), heads, block


def contiguous_heads(x: Tensor | None) -> Tensor | None:
    """[..., N, K] with contiguous heads within each token, as kernels read it; a copy only if needed."""
    return x if x is None or (x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]) else x.contiguous()


def first_pairs(split: Sequence[int]) -> tuple[int, int]:
    """Index of the first pair that is rotated by h, and by w."""
    return split[0] // 2, (split[0] + split[1]) // 2


@torch.library.custom_op("megasora::rope3d", mutates_args=())
def rotate_triton(x_LNK: Tensor, coords_L3: Tensor, frequency_P: Tensor, split: Sequence[int], back: bool) -> Tensor:
    x_LNK = contiguous_heads(x_LNK)
    y_LNK, (num_tokens, num_heads, head_dim) = x_LNK.new_empty(x_LNK.shape), x_LNK.shape
    if y_LNK.numel():
        config = launch_config(ROTATE, x_LNK.device)
        tile = tile_shape(config, num_heads, head_dim, MAX_CHUNKS)
        rotate_kernel[(cdiv(num_tokens, tile[0]),)](
            x_LNK, coords_L3, frequency_P, y_LNK, x_LNK.stride(0), num_tokens, num_heads,
            back, *first_pairs(split), head_dim, *tile, num_warps=config.num_warps(tile[1] * tile[2]),
        )  # fmt: skip
    return y_LNK


@rotate_triton.register_fake
def _(x_LNK, coords_L3, frequency_P, split, back):
    return x_LNK.new_empty(x_LNK.shape)


def rotate(x_LNK: Tensor, rope: Rope, rotation_L1P: Tensor | None, back: bool) -> Tensor:
    """x rotated by the angles, by their negatives if `back`; by Triton if `rotation_L1P` is None."""
    if rotation_L1P is None:
        return call(rotate_triton, x_LNK, rope.coords_L3, rope.frequency_P, rope.split, back)
    return rotate_torch(x_LNK, rotation_L1P.conj() if back else rotation_L1P).to(x_LNK.dtype)


class Rope3D(Function):
    @staticmethod
    def forward(ctx, x_LNK: Tensor, rope: Rope, rotation_L1P: Tensor | None) -> Tensor:
        ctx.rope, ctx.rotation_L1P = rope, rotation_L1P
        return rotate(x_LNK, rope, rotation_L1P, back=False).detach()  # see launch.py

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LNK: Tensor) -> tuple[Tensor | None, ...]:
        return rotate(grad_LNK, ctx.rope, ctx.rotation_L1P, back=True), None, None


def rope3d(x_LNK: Tensor, rope: Rope, backend: str = "auto") -> Tensor:
    """Heads rotated by the angles of their token: [L, N, K] in the dtype of `x_LNK`. `backend`: see launch.py.

    Differentiable once. ValueError for shapes that do not match.
    """
    if x_LNK.ndim != 3 or not x_LNK.is_floating_point():
        raise ValueError(f"x {tuple(x_LNK.shape)} of {x_LNK.dtype} must be floating point [L, N, K]")
    rope.check_shapes(x=x_LNK)
    check_device(x=x_LNK, rope=rope.coords_L3)
    return Rope3D.apply(x_LNK, rope, rope.rotation if resolve_backend(backend, x_LNK) == "torch" else None)

"""3D rotary embedding: heads x [L, N, K] of tokens at (t, h, w) in, the same turned out (RoFormer, arXiv 2104.09864;
the split of the head dim over t, h and w is Wan's, arXiv 2503.20314).

    y[2p] = x[2p] cos a - x[2p+1] sin a,   y[2p+1] = x[2p] sin a + x[2p+1] cos a        a = coord[i] frequency[p]

Pair p of token i turns by an angle that is linear in one coordinate, so that q . k depends on the difference of coords
alone. Coords are integers or any positions between, in fp32, as is the angle. An axis with d of the K numbers has d / 2
pairs, and its pair j the frequency

    base^(-2j/d) s^(-2j/(d-2))        d = 2: 1 / s

in radians a step: with s = 1 the plain one. For clips that are s times as long, high or wide as those trained on, it
leaves the fastest pair as it was and slows the slowest down by s (NTK-aware scaling: the axis' base grows by
s^(d/(d-2))).

The gradient is dy turned back by the same angles: nothing is kept for it. The kernel computes cos and sin from the
three coords of a token: read from memory, the two in fp32 would cost as much as two heads in bf16. It counts quarter
turns: with n the integer next to a / (pi/2), a - n pi/2 lies in [-pi/4, pi/4], where short polynomials are exact to
fp32, and n mod 4 says which of the two is cos, and the signs.

Least traffic in bf16: 4 bytes a number forward (x, y), 4 backward (dy, dx).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasora.kernels.launch import Launch, Table, check_device, chosen, launch_for, widened

TURN: Table = {"any": Launch(tile=1024, numbers=8)}
CHUNKS = 5  # of heads, of which every one takes the same cos and sin; 6, 12, 20, 24 and 40 heads leave no gap


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Numbers of the head dim that turn with t, h, w; all even."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_frequency(split: Sequence[int], base: float, scale: Sequence[float]) -> Tensor:
    """fp32 [K/2]: radians a step of each pair."""
    frequencies = []
    for numbers, s in zip(split, scale, strict=True):
        j = torch.arange(numbers // 2, dtype=torch.float64)
        slowed = s ** (2 * j / (numbers - 2)) if numbers > 2 else torch.full_like(j, s)
        frequencies.append(base ** (-2 * j / max(numbers, 1)) / slowed)
    return torch.cat(frequencies).float()


@dataclass(frozen=True)
class Rope:
    """Where tokens are and how their heads turn. Build one per pack and use it in every layer."""

    coords_L3: Tensor  # int32 or fp32, contiguous
    frequency_P: Tensor  # fp32 [K/2]: radians a step of each pair
    split: tuple[int, int, int]  # numbers of the head dim that turn with t, h, w
    kept_turn: Tensor | None = field(default=None, init=False, repr=False)  # computed where `turn` is first asked for

    @classmethod
    def build(
        cls,
        coords_L3: Tensor,
        head_dim: int,
        base: float,
        split: Sequence[int] | None = None,
        scale: Sequence[float] = (1.0, 1.0, 1.0),
        device: torch.device | str | None = None,
    ) -> Rope:
        """`coords_L3`: integers or floats; `device`: theirs where None. `split`: see `rope_split`, also for None.

        `scale`: how many times as long, high and wide as those trained on clips are. ValueError for what does not fit.
        """
        if coords_L3.ndim != 2 or coords_L3.shape[1] != 3 or coords_L3.is_complex():
            raise ValueError(f"coords {tuple(coords_L3.shape)} of {coords_L3.dtype} must be numbers [L, 3]")
        split = rope_split(head_dim) if split is None else tuple(split)
        if len(split) != 3 or sum(split) != head_dim or any(numbers < 0 or numbers % 2 for numbers in split):
            raise ValueError(f"split={split} must be three even numbers that add up to head_dim={head_dim}")
        if not base > 0:
            raise ValueError(f"base={base} must be above 0")
        if len(scale) != 3 or not all(s > 0 for s in scale):
            raise ValueError(f"scale={tuple(scale)} must be three numbers above 0, for t, h and w")
        device = coords_L3.device if device is None else device
        dtype = torch.float32 if coords_L3.is_floating_point() else torch.int32
        return cls(coords_L3.to(device, dtype).contiguous(), rope_frequency(split, base, scale).to(device), split)

    @property
    def turn(self) -> Tensor:
        """complex64 [L, 1, K/2]: cos a + i sin a, which the number x[2p] + i x[2p+1] is multiplied by."""
        if self.kept_turn is None:
            coords = self.coords_L3.float().split(1, 1)
            frequencies = self.frequency_P.split([numbers // 2 for numbers in self.split])
            angle = torch.cat([c * f for c, f in zip(coords, frequencies, strict=True)], 1)[:, None]
            # functools.cached_property would do, but for its lock in Python 3.11, which torch.compile refuses
            object.__setattr__(self, "kept_turn", torch.complex(angle.cos(), angle.sin()))
        return self.kept_turn

    @property
    def cos(self) -> Tensor:
        """fp32 [L, 1, K/2]"""
        return self.turn.real

    @property
    def sin(self) -> Tensor:
        return self.turn.imag

    def check(self, **heads: Tensor) -> None:
        """ValueError unless each of `heads` is [L, ..., K] with the tokens and the head dim of these angles."""
        tokens, head_dim = len(self.coords_L3), sum(self.split)
        for name, x in heads.items():
            if x.shape[0] != tokens or x.shape[-1] != head_dim:
                raise ValueError(
                    f"{name} {tuple(x.shape)} must have the {tokens} tokens of coords {tuple(self.coords_L3.shape)} "
                    f"and head dim {head_dim} = {' + '.join(map(str, self.split))}"
                )


def rope3d_reference(x_LNK: Tensor, rope: Rope) -> Tensor:
    """The maths, differentiable; arguments as of `rope3d`."""
    even, odd = widened(*x_LNK.unflatten(-1, (-1, 2)).unbind(-1))
    turned = torch.stack((even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos), -1)
    return turned.flatten(-2).to(x_LNK.dtype)


def turn_torch(x_LNK: Tensor, turn_L1P: Tensor) -> Tensor:
    """Turned by a complex [L, 1, K/2], in fp32 at least: pairs as complex numbers take few passes over memory."""
    even, odd = widened(*x_LNK.unflatten(-1, (-1, 2)).unbind(-1))
    return torch.view_as_real(torch.complex(even, odd).mul_(turn_L1P)).flatten(-2)


@triton.jit
def cos_sin(coords_L3, token, there, frequency, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr):
    """fp32 [T, P] of the angles of tokens [T] and pairs [P]; pairs from FIRST_H turn with h, from FIRST_W with w."""
    at = coords_L3 + token * 3
    t = tl.load(at, mask=there, other=0).to(tl.float32)[:, None]
    h = tl.load(at + 1, mask=there, other=0).to(tl.float32)[:, None]
    w = tl.load(at + 2, mask=there, other=0).to(tl.float32)[:, None]
    p = tl.arange(0, frequency.shape[0])[None]
    angle = tl.where(p < FIRST_H, t, tl.where(p < FIRST_W, h, w)) * frequency[None]
    # 1.5 * 2^23 pushes the fraction out: what is left of the sum is the next integer, in its last bits and as a number
    quarters = angle * 0.6366197723675814 + 12582912.0
    n = quarters - 12582912.0
    # pi/2 in three parts, of 8 and 11 bits and the rest: the first two products are exact to 12,000 radians
    rest = angle - n * 1.5703125 - n * 0.00048375129699707031 - n * 7.5497901e-8
    square = rest * rest
    sin = rest + rest * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cos = 1.0 + square * (-0.5 + square * (4.166664568e-2 + square * (-1.388731625e-3 + square * 2.443315711e-5)))
    quarter = quarters.to(tl.int32, bitcast=True)
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((quarter + 1) & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)


@triton.jit
def turn_pairs(x, cos, sin):
    """x [T, H, K], each of the H heads of a token turned by its cos and sin [T, K/2]."""
    cos, sin = cos[:, None], sin[:, None]
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)


@triton.jit
def turn_kernel(
    x_LNK, coords_L3, frequency_P, y_LNK, x_stride, L, N,
    BACK: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token, d, p = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 2)
    frequency = tl.load(frequency_P + p, mask=p < K // 2, other=0.0)
    cos, sin = cos_sin(coords_L3, token, token < L, frequency, FIRST_H, FIRST_W)
    if BACK:
        sin = -sin
    there, at = (token < L)[:, None, None] & (d < K)[None, None], token.to(tl.int64)[:, None, None]
    x_LNK += at * x_stride + d[None, None]
    y_LNK += at * (N * K) + d[None, None]
    for first in range(0, N, H):
        head = (first + tl.arange(0, H))[None, :, None]
        inside = there & (head < N)
        x = tl.load(x_LNK + head * K, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_LNK + head * K, turn_pairs(x, cos, sin).to(y_LNK.dtype.element_ty), mask=inside)


def tile_of(launch: Launch, num_heads: int, head_dim: int, chunks: int) -> tuple[int, int, int]:
    """Tokens, heads and numbers of a head in a tile, powers of two; a token's heads take `chunks` tiles at most."""
    block = triton.next_power_of_2(head_dim)
    heads = triton.next_power_of_2(triton.cdiv(num_heads, chunks))
    return launch.vectors(heads * block), heads, block


def heads_dense(x: Tensor | None) -> Tensor | None:
    """[..., N, K] with the heads of a token side by side, as kernels read them; tokens may lie apart."""
    return x if x is None or (x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]) else x.contiguous()


def first_pairs(split: Sequence[int]) -> tuple[int, int]:
    """The first pair that turns with h, and with w."""
    return split[0] // 2, (split[0] + split[1]) // 2


@torch.library.custom_op("megasora::rope3d", mutates_args=())
def turn_triton(x_LNK: Tensor, coords_L3: Tensor, frequency_P: Tensor, split: Sequence[int], back: bool) -> Tensor:
    x_LNK = heads_dense(x_LNK)
    y_LNK, (num_tokens, num_heads, head_dim) = x_LNK.new_empty(x_LNK.shape), x_LNK.shape
    if y_LNK.numel():
        launch = launch_for(TURN, x_LNK.device)
        tile = tile_of(launch, num_heads, head_dim, CHUNKS)
        turn_kernel[(triton.cdiv(num_tokens, tile[0]),)](
            x_LNK, coords_L3, frequency_P, y_LNK, x_LNK.stride(0), num_tokens, num_heads,
            back, *first_pairs(split), head_dim, *tile, num_warps=launch.warps(tile[1] * tile[2]),
        )  # fmt: skip
    return y_LNK


@turn_triton.register_fake
def _(x_LNK, coords_L3, frequency_P, split, back):
    return x_LNK.new_empty(x_LNK.shape)


def turned(x_LNK: Tensor, rope: Rope, turn_L1P: Tensor | None, back: bool) -> Tensor:
    """By Triton where there is no `turn_L1P`."""
    if turn_L1P is None:
        return turn_triton(x_LNK, rope.coords_L3, rope.frequency_P, rope.split, back)
    return turn_torch(x_LNK, turn_L1P.conj() if back else turn_L1P).to(x_LNK.dtype)


class Rope3D(Function):
    @staticmethod
    def forward(ctx, x_LNK: Tensor, rope: Rope, turn_L1P: Tensor | None) -> Tensor:
        ctx.rope, ctx.turn_L1P = rope, turn_L1P
        return turned(x_LNK, rope, turn_L1P, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LNK: Tensor) -> tuple[Tensor | None, ...]:
        return turned(grad_LNK, ctx.rope, ctx.turn_L1P, back=True), None, None


def rope3d(x_LNK: Tensor, rope: Rope, via: str = "auto") -> Tensor:
    """Heads turned by the angles of their token, [L, N, K] in the dtype of `x_LNK`. `via`: see launch.py.

    Differentiable once. ValueError on shapes that do not fit.
    """
    if x_LNK.ndim != 3 or not x_LNK.is_floating_point():
        raise ValueError(f"x {tuple(x_LNK.shape)} of {x_LNK.dtype} must be [L, N, K] of floating point")
    rope.check(x=x_LNK)
    check_device(x=x_LNK, rope=rope.coords_L3)
    return Rope3D.apply(x_LNK, rope, rope.turn if chosen(via, x_LNK) == "torch" else None)

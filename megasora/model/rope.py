"""3D rotary position embedding: a token at (t, h, w) has each pair of its head's numbers turned by an angle that is
linear in one coordinate, so that q . k depends on the difference of coords alone (RoFormer, arXiv 2104.09864; the
split of the head dim over the axes is Wan's: K - 4 floor(K/6), 2 floor(K/6), 2 floor(K/6)).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Numbers of the head dim that turn with t, h, w; all even."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_angles(coords_L3: Tensor, head_dim: int, base: float) -> Tensor:
    """fp32 [L, K/2]: the angle of each pair; base^(-2i/d) radians a step for pair i of an axis with d numbers."""
    angles = []
    for axis, dim in enumerate(rope_split(head_dim)):
        frequency = base ** -(torch.arange(0, dim, 2, device=coords_L3.device, dtype=torch.float32) / dim)
        angles.append(coords_L3[:, axis, None].float() * frequency)
    return torch.cat(angles, dim=-1)


def apply_rope(x_LNK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[2i], x[2i+1]); `cos`, `sin` fp32 [L, 1, K/2], which make the products fp32."""
    even, odd = x_LNK.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x_LNK)

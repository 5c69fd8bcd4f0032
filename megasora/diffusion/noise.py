"""Random numbers as a pure function of (seed, step, sample id, element): the same on every rank, layout and device.

A counter-based generator: the key of a clip at a step and the index of an element go through the SplitMix64 finaliser
(Steele et al., OOPSLA 2014), so any slice of a clip's noise can be drawn without the rest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64: products wrap around
MIX_A = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_B = 0x94D049BB133111EB - (1 << 64)


def mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64; masks after right shifts remove the copies of the sign bit."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * MIX_A
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * MIX_B
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def clip_keys(seed: int, step: int, sample_ids_G: Tensor, stream: int) -> Tensor:
    """int64 [G]: a key per clip at this step; each use (noise, timestep, ...) has its own `stream`."""
    key = torch.zeros(1, dtype=torch.int64)
    for part in (torch.tensor([stream]), torch.tensor([seed]), torch.tensor([step]), sample_ids_G):
        key = mix(key + (part + 1) * GOLDEN)
    return key


def uniform(keys: Tensor) -> Tensor:
    """float64 in (0, 1), one per key."""
    return (((mix(keys) >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53


def normal(keys_L: Tensor, first_L: Tensor, dim: int) -> Tensor:
    """fp32 [L, dim] standard normals: row i is elements first[i] .. first[i] + dim - 1 of the stream of keys[i].

    Box-Muller on the two halves of 64 random bits: element 2j is the cosine, 2j + 1 the sine. `first` must be even.
    """
    counters = first_L[:, None] // 2 + torch.arange((dim + 1) // 2, device=keys_L.device)
    bits = mix(keys_L[:, None] + (counters + 1) * GOLDEN)
    low = (bits & 0xFFFFFFFF).float()
    high = ((bits >> 32) & 0xFFFFFFFF).float()
    radius = torch.sqrt(-2.0 * torch.log((low + 0.5).clamp_max(2.0**32 - 256) * 2.0**-32))
    angle = high * (2.0 * math.pi * 2.0**-32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-2)[:, :dim]

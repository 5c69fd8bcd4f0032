"""Keys of the random numbers of a clip: (seed, step, sample id), the same on every rank, layout and device.

The numbers themselves are those of megasora/random_numbers.py, so any slice of a clip's noise can be drawn alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasora.random_numbers import GOLDEN, mix


def clip_keys(seed: int, step: int, sample_ids_G: Tensor, stream: int) -> Tensor:
    """int64 [G]: a key per clip at this step; each use (noise, timestep, ...) has its own `stream`."""
    key = torch.zeros(1, dtype=torch.int64)
    for part in (torch.tensor([stream]), torch.tensor([seed]), torch.tensor([step]), sample_ids_G):
        key = mix(key + (part + 1) * GOLDEN)
    return key

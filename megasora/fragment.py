"""What one rank owns of a parameter: checkpoints are made of fragments, and the EMA is computed on them.

full tensor --Placement.local--> local tensor of a tensor rank --ZeRO over data x context--> fragment
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.placement import Placement


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of one flattened local tensor, with their fp32 master weights and moments."""

    name: str  # of the parameter
    shape: torch.Size  # of the full tensor
    placement: Placement
    tensor_rank: int  # the rank and size of the tensor axis that the local tensor belongs to
    tensor_size: int
    start: int  # of the first element in the flattened local tensor
    values: dict[str, Tensor]  # kind ("weights", "exp_avg", ...): fp32 [count], live views

    @property
    def count(self) -> int:
        return len(next(iter(self.values.values())))

"""Statistics of tensors, which add up: those of a module are the sum of those of its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Of the finite elements, in fp64. `max`: of the absolute values."""

    count: int = 0  # elements, also those that are not finite
    non_finite: int = 0
    total: float = 0.0  # sum of the elements
    squares: float = 0.0  # sum of their squares
    max: float = 0.0

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.count + other.count,
            self.non_finite + other.non_finite,
            self.total + other.total,
            self.squares + other.squares,
            max(self.max, other.max),
        )

    @property
    def norm(self) -> float:
        return math.sqrt(self.squares)

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count - self.non_finite)

    @property
    def std(self) -> float:
        return math.sqrt(max(0.0, self.squares / max(1, self.count - self.non_finite) - self.mean**2))


@torch.no_grad()
def statistics_of(values: Tensor) -> Statistics:
    """Of a tensor of any shape and dtype; without a copy in fp64 if it is finite."""
    flat = values.reshape(-1)
    count = flat.numel()
    finite = flat.isfinite()
    if not bool(finite.all()):
        flat = flat[finite]
    if not flat.numel():
        return Statistics(count, count)
    norm = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
    low, high = flat.aminmax()
    total = float(flat.sum(dtype=torch.float64))
    return Statistics(count, count - flat.numel(), total, norm**2, max(abs(float(low)), abs(float(high))))

"""Initial weights: each element is a pure function of the seed, the name of its parameter and its place in it.

So a rank draws the elements that it holds and no others, and all layouts start from the same weights. Linear layers are
Xavier uniform; modulation and the output layers of branches are zero, so that each block starts as the identity
(adaLN-Zero, arXiv 2212.09748).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor

from megasora.placement import WHOLE, Placement
from megasora.random_numbers import fill_normal, fill_uniform, text_key

# The first pattern that matches a name applies. 1-D tensors called weight belong to norms.
RULES: list[tuple[str, float | str]] = [
    ("*.bias", 0.0),
    ("*modulation.proj.weight", 0.0),
    ("shared_modulation.weight", 0.0),
    ("*modulation.table", 0.0),
    ("blocks.*.cross.out.weight", 0.0),
    ("patch_out.weight", 0.0),
    ("null_text", "normal 0.02"),
    ("first_frame", "normal 0.02"),
    ("timestep.*.weight", "normal 0.02"),
    ("native.*.weight", "normal 0.02"),
    ("text.byte.weight", "normal 0.1"),
    ("text.place.weight", "normal 0.02"),
    ("*.weight", "xavier"),
]


@dataclass(frozen=True)
class DrawnWeights:
    """A `megasora.placement.WeightSource` of the weights at step 0. Raises KeyError for a name that no rule matches."""

    seed: int

    @torch.no_grad()
    def fill(self, out: Tensor, name: str, placement: Placement = WHOLE, rank: int = 0, size: int = 1) -> None:
        rule = next((rule for pattern, rule in RULES if fnmatch(name, pattern)), None)
        if rule is None:
            raise KeyError(f"no rule initialises parameter '{name}'")
        shape = placement.full_shape(out.shape, size)
        if rule == 0.0 or (rule == "xavier" and len(shape) == 1):
            out.fill_(float(rule != 0.0))
            return
        runs = placement.runs(shape, rank, size)
        out_RN, key = out.view(runs.count, runs.length), text_key(f"{self.seed} {name}")
        if rule == "xavier":
            fill_uniform(out_RN, key, runs.first, runs.stride, xavier_bound(shape))
        else:
            fill_normal(out_RN, key, runs.first, runs.stride, std=float(rule.split()[1]))


def xavier_bound(shape: torch.Size) -> float:
    """Of the uniform distribution, for a full linear layer [out, in] or convolution [out, in, ...]."""
    return math.sqrt(6 / ((shape[0] + shape[1]) * shape[2:].numel()))

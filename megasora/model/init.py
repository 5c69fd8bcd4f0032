"""What every weight is at step 0: a pure function of its name, its full shape and the seed.

So a rank that holds a part of the model makes its part alone, one full tensor at a time, and every layout starts from
the same weights. Linear maps are Xavier uniform; modulation and outputs of branches start at zero, so that each block
is the identity at first (adaLN-Zero, arXiv 2212.09748).
"""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

# the first pattern that fits a name decides; vectors called weight belong to norms
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


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """fp32, on the CPU. KeyError for a name that no rule knows."""
    rule = next((rule for pattern, rule in RULES if fnmatch(name, pattern)), None)
    if rule is None:
        raise KeyError(f"no rule gives parameter '{name}' its first value")
    if rule == 0.0:
        return torch.zeros(shape)
    if rule == "xavier" and len(shape) == 1:
        return torch.ones(shape)
    value, generator = torch.empty(shape), torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) >> 1)
    if rule == "xavier":
        return nn.init.xavier_uniform_(value, generator=generator)
    return nn.init.normal_(value, std=float(rule.split()[1]), generator=generator)

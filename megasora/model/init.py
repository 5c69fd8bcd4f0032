"""Initial weights: each is a pure function of its name, its full shape and the seed.

So a rank draws only the full tensors of its own parameters, one at a time, and all layouts
start from the same weights. Linear layers are Xavier uniform; modulation and the output layers of branches are zero, so
that each block starts as the identity (adaLN-Zero, arXiv 2212.09748).
"""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

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


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The weight at step 0, full, fp32, on the CPU. Raises KeyError for a name that no rule matches."""
    rule = next((rule for pattern, rule in RULES if fnmatch(name, pattern)), None)
    if rule is None:
        raise KeyError(f"no rule initialises parameter '{name}'")
    if rule == 0.0:
        return torch.zeros(shape)
    if rule == "xavier" and len(shape) == 1:
        return torch.ones(shape)
    value, generator = torch.empty(shape), keyed_generator(name, seed)
    if rule == "xavier":
        return nn.init.xavier_uniform_(value, generator=generator)
    return nn.init.normal_(value, std=float(rule.split()[1]), generator=generator)


def keyed_generator(name: str, seed: int) -> torch.Generator:
    """Random numbers on the CPU that depend on the seed and the name only."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) >> 1)

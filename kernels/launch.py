"""Who computes an operation, and with how many warps: what the files of this folder share.

Every operation takes `via`: "triton", "torch" (the same maths in PyTorch, on any device), or "auto", which is Triton on
a CUDA device and PyTorch elsewhere and for float64. On a CPU, Triton's kernels run in its interpreter, which Triton
turns on where TRITON_INTERPRET=1 stands in the environment before it is imported.

How a kernel is cut is a table of its file, read by chip, never the outcome of a race between timings: ranks that race
may choose differently, and then sum differently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # read where Triton reads it, once
VIAS = ("auto", "triton", "torch")


class Launch(NamedTuple):
    """How a kernel is cut: a program works on a tile at a time, of whole vectors of `count` x `block` numbers each."""

    tile: int = 2048  # numbers of a tile, if one vector is not longer
    numbers: int = 16  # that a thread holds of a tile; sets the warps
    stages: int = 3  # tiles in a loop that are on their way from memory at once

    def vectors(self, *size: int) -> int:
        """In a tile; a power of two. `size`: numbers of a vector, as factors."""
        return power_of_two(self.tile // math.prod(size))

    def warps(self, *size: int) -> int:
        return min(16, power_of_two(self.vectors(*size) * math.prod(size) // (32 * self.numbers)))


def power_of_two(n: int) -> int:
    """The largest that is not above `n`; 1 at least."""
    return 1 << max(1, n).bit_length() - 1


Table = Mapping[str, Launch]  # chip, or "any": a chip without an entry is cut as "any"


def chip_of(device: torch.device) -> str:
    """sm80 for an A100, sm90 for an H100 or H200, sm100 for a B200; cpu for the interpreter."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def launch_for(table: Table, device: torch.device) -> Launch:
    return table.get(chip_of(device), table["any"])


def chosen(via: str, x: Tensor) -> str:
    """`via` without "auto". ValueError for a word that is none of them, or Triton where it cannot run."""
    if via not in VIAS:
        raise ValueError(f"via={via!r} must be one of {', '.join(VIAS)}")
    if via == "auto":
        return "triton" if x.device.type in ("cuda", "meta") and x.dtype != torch.float64 else "torch"
    if via == "triton" and x.dtype == torch.float64:
        raise ValueError("via='triton' computes in fp32 and takes no float64; use via='torch'")
    if via == "triton" and x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            f"via='triton' on {x.device}: Triton runs on a GPU, or on a CPU where TRITON_INTERPRET=1 is set"
        )
    return via


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In fp32, or in float64 where they are: what is computed in."""
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def check_device(**tensors: Tensor | None) -> None:
    """ValueError unless all lie on one device, naming those that do not."""
    given = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(given.values())) > 1:
        raise ValueError("all must be on one device: " + ", ".join(f"{name} on {d}" for name, d in given.items()))


def dense(x: Tensor | None) -> Tensor | None:
    """With the numbers of a vector side by side, as kernels read them; vectors may lie apart."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def row_stride(x_RD: Tensor | None) -> int:
    return 0 if x_RD is None else x_RD.stride(0)

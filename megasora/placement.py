"""Where each parameter lies on the mesh: the one description that initialisation, gradient sums, the gradient's norm,
checkpoints and the debug guard read.

Over data and context every parameter is the same and its gradient is summed by ZeRO; a placement says what is special
on the tensor and the pipeline axis. A fragment is what ZeRO leaves to one rank of its part of a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    cut: int | None = None  # dim that is cut over the tensor axis; None: every tensor rank has it whole
    runs: int = 1  # equal runs of that dim, each cut by itself: 3 for queries, keys and values in one matrix
    summed: tuple[str, ...] = ()  # axes over which a rank's gradient is a part only, and must be summed

    def local(self, full: Tensor, rank: int, size: int) -> Tensor:
        """Rank `rank`'s part of a full tensor; a view where it is whole."""
        if self.cut is None or size == 1:
            return full
        runs = full.unflatten(self.cut, (self.runs, -1))
        return runs.chunk(size, self.cut + 1)[rank].flatten(self.cut, self.cut + 1)

    def full(self, parts: list[Tensor]) -> Tensor:
        """The inverse: the parts of all tensor ranks, in their order, to the full tensor."""
        if self.cut is None or len(parts) == 1:
            return parts[0]
        runs = [part.unflatten(self.cut, (self.runs, -1)) for part in parts]
        return torch.cat(runs, self.cut + 1).flatten(self.cut, self.cut + 1)

    def full_shape(self, local: torch.Size, size: int) -> torch.Size:
        if self.cut is None:
            return local
        return torch.Size(n * size if dim == self.cut else n for dim, n in enumerate(local))

    def local_shape(self, full: torch.Size, size: int) -> torch.Size:
        if self.cut is None:
            return full
        return torch.Size(n // size if dim == self.cut else n for dim, n in enumerate(full))


@dataclass(frozen=True)
class Fragment:
    """A run of consecutive numbers of one tensor rank's flattened part of a parameter, and what a rank keeps of it."""

    name: str
    shape: torch.Size  # of the full parameter
    placement: Placement
    tensor_rank: int  # whose part it is
    tensor_size: int
    start: int  # in the flattened part
    values: dict[str, Tensor]  # what: fp32 [n], live; of all kinds equally many

    @property
    def count(self) -> int:
        return len(next(iter(self.values.values())))

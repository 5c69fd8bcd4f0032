"""Where each parameter lies on the mesh: the one description that initialisation, gradient sums, the gradient's norm,
checkpoints and the debug guard read.

Over data and context every parameter is the same and its gradient is summed by ZeRO; a placement says what is special
on the tensor and the pipeline axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.parallel.mesh import Mesh


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

    def counts_here(self, mesh: Mesh) -> bool:
        """Whether this rank's copy is the one that counts in a norm and is written to a checkpoint."""
        first_tensor = self.cut is not None or mesh.tensor.rank == 0
        return first_tensor and ("pipeline" not in self.summed or mesh.pipeline.rank == 0)

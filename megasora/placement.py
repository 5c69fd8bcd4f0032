"""Placement of parameters on the mesh: whether each is sharded over the tensor axis, and over which axes its gradient
is partial. Initialisation, gradient sums, the gradient norm, checkpoints and the replica check all read it.

Over data and context every parameter is replicated and ZeRO sums its gradient, so a placement describes the tensor and
pipeline axes only. In DTensor's terms: Shard(shard_dim) or Replicate for the parameter, Partial for its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Placement of one parameter. The local tensor is what one tensor rank holds of it."""

    shard_dim: int | None = None  # dim that is sharded over the tensor axis; None: replicated on all tensor ranks
    num_chunks: int = 1  # equal chunks of that dim, each sharded by itself: 3 for q, k and v in one matrix
    partial_axes: tuple[str, ...] = ()  # axes over which the ranks' gradients must still be summed

    def is_primary_replica(self, pipeline_rank: int, tensor_rank: int) -> bool:
        """Whether these ranks hold the one replica that the gradient norm counts and a checkpoint saves."""
        is_primary_tensor_rank = self.shard_dim is not None or tensor_rank == 0
        return is_primary_tensor_rank and ("pipeline" not in self.partial_axes or pipeline_rank == 0)

    def local(self, full: Tensor, rank: int, size: int) -> Tensor:
        """The local tensor of tensor rank `rank` of `size`; a view of `full` where it is replicated."""
        if self.shard_dim is None or size == 1:
            return full
        chunks = full.unflatten(self.shard_dim, (self.num_chunks, -1))
        return chunks.chunk(size, self.shard_dim + 1)[rank].flatten(self.shard_dim, self.shard_dim + 1)

    def full(self, local_tensors: list[Tensor]) -> Tensor:
        """The full tensor, from the local tensors of all tensor ranks in their order; the inverse of `local`."""
        if self.shard_dim is None or len(local_tensors) == 1:
            return local_tensors[0]
        chunks = [local.unflatten(self.shard_dim, (self.num_chunks, -1)) for local in local_tensors]
        return torch.cat(chunks, self.shard_dim + 1).flatten(self.shard_dim, self.shard_dim + 1)

    def full_shape(self, local: torch.Size, size: int) -> torch.Size:
        """The shape of the full tensor, from a local tensor's and the number of tensor ranks."""
        if self.shard_dim is None:
            return local
        return torch.Size(n * size if dim == self.shard_dim else n for dim, n in enumerate(local))

    def local_shape(self, full: torch.Size, size: int) -> torch.Size:
        """The shape of a local tensor, from the full tensor's and the number of tensor ranks."""
        if self.shard_dim is None:
            return full
        return torch.Size(n // size if dim == self.shard_dim else n for dim, n in enumerate(full))

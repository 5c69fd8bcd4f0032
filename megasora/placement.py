"""Placement of parameters on the mesh: whether each is sharded over the tensor axis, and over which axes its gradient
is partial. Initialisation, gradient sums, the gradient norm, checkpoints and the replica check all read it.

Over data and context every parameter is replicated and ZeRO sums its gradient, so a placement describes the tensor and
pipeline axes only. In DTensor's terms: Shard(shard_dim) or Replicate for the parameter, Partial for its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Runs(NamedTuple):
    """Where the elements of a flattened local tensor are in the flattened full one: consecutive elements, again and
    again."""

    count: int
    length: int  # elements of each run
    first: int  # element of the full tensor that the first run begins with
    stride: int  # from the beginning of a run to that of the next


@dataclass(frozen=True)
class Placement:
    """Placement of one parameter. The local tensor is what one tensor rank holds of it."""

    shard_dim: int | None = None  # dim that is sharded over the tensor axis; None: replicated on all tensor ranks
    num_chunks: int = 1  # equal chunks of that dim, each sharded by itself: 3 for q, k and v in one matrix
    partial_axes: tuple[str, ...] = ()  # axes over which the ranks' gradients must still be summed

    def is_primary_replica(self, pipeline_rank: int, tensor_rank: int) -> bool:
        """Whether these ranks hold the one replica that the gradient norm counts."""
        is_primary_tensor_rank = self.shard_dim is not None or tensor_rank == 0
        return is_primary_tensor_rank and ("pipeline" not in self.partial_axes or pipeline_rank == 0)

    def replica(self, pipeline_rank: int, pipeline_size: int, tensor_rank: int, tensor_size: int) -> tuple[int, int]:
        """(index, number) of this rank among the replicas of the parameter on the pipeline and tensor axes."""
        tensor_replicas = tensor_size if self.shard_dim is None else 1
        pipeline_replicas = pipeline_size if "pipeline" in self.partial_axes else 1
        index = (pipeline_rank % pipeline_replicas) * tensor_replicas + tensor_rank % tensor_replicas
        return index, pipeline_replicas * tensor_replicas

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

    def runs(self, full: torch.Size, rank: int, size: int) -> Runs:
        """Where the local tensor of tensor rank `rank` of `size` is in the full tensor of this shape."""
        if self.shard_dim is None or size == 1:
            return Runs(1, full.numel(), 0, full.numel())
        count = full[: self.shard_dim].numel() * self.num_chunks
        stride = full.numel() // max(1, count)
        return Runs(count, stride // size, rank * (stride // size), stride)

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


WHOLE = Placement()  # of a parameter that every rank has


class WeightSource(Protocol):
    """Where the weights of a model come from: drawn, or read from a file or a checkpoint."""

    def fill(self, out: Tensor, name: str, placement: Placement = WHOLE, rank: int = 0, size: int = 1) -> None:
        """Makes `out`, fp32 and contiguous, on any device, the local tensor of tensor rank `rank` of `size`; the full
        tensor is neither drawn nor read. Raises MegaSoraError where there is no such weight."""
        ...

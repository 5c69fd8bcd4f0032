"""Weights that several ranks of a machine need are read by one of them, which sends them to the others.

Headers are read by the first process of a machine, and weights by one of the ranks that need the same ones. These are
the ranks of the data and context axes: they hold the same local tensors, and the ranks of the tensor and pipeline axes
other ones. So each machine reads the local tensors that its ranks hold, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.errors import MegaSoraError
from megasora.parallel.mesh import Axis
from megasora.parallel.world import World
from megasora.placement import WHOLE, Placement, WeightSource


@dataclass(frozen=True)
class SharedReads:
    """A `megasora.placement.WeightSource` for several ranks; all must call `fill` with the same weights in the same
    order."""

    weights: WeightSource
    group: dist.ProcessGroup
    reader: int  # global rank of the one that reads
    device: torch.device

    @torch.no_grad()
    def fill(self, out: Tensor, name: str, placement: Placement = WHOLE, rank: int = 0, size: int = 1) -> None:
        """Raises the MegaSoraError of the rank that reads on all ranks."""
        problem = [""]
        if dist.get_rank() == self.reader:
            try:
                self.weights.fill(out, name, placement, rank, size)
            except MegaSoraError as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem, self.reader, self.group, device=self.device)
        if problem[0]:
            raise MegaSoraError(problem[0])
        dist.broadcast(out, self.reader, self.group)


def open_on_node(open_weights: Callable[[], WeightSource], world: World) -> WeightSource:
    """What `open_weights()` gives on the first process of each machine, which reads the headers for the others.

    All processes must call it. Raises its MegaSoraError on all processes of the machine."""

    def attempt() -> tuple[WeightSource | None, str]:
        try:
            return open_weights(), ""
        except MegaSoraError as error:
            return None, str(error)

    weights, problem = world.share_on_node(attempt)
    if weights is None:
        raise MegaSoraError(problem)
    return weights


@contextmanager
def shared_reads(weights: WeightSource, world: World, axis: Axis) -> Iterator[WeightSource]:
    """`weights`, read by one of the ranks of `axis` on each machine. All ranks of the axis must call it; the process
    groups that this needs exist until exit."""
    nodes: list[int] = [0] * axis.size
    dist.all_gather_object(nodes, world.node, axis.group)
    members = [axis.global_rank(i) for i, node in enumerate(nodes) if node == world.node]
    if len(members) == 1:
        yield weights
    elif len(members) == axis.size:
        yield SharedReads(weights, axis.group, members[0], world.device)
    else:
        group = dist.new_group(members, use_local_synchronization=True)  # other ranks need not take part
        yield SharedReads(weights, group, members[0], world.device)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)  # the last broadcast
        dist.destroy_process_group(group)

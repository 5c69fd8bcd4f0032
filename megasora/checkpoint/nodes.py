"""The machines of a launch, and which process sends a copy of its file to which one of the next machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from megasora.checkpoint.ranks import Ranks

T = TypeVar("T")


class NodeRanks(Ranks, Protocol):
    """The collectives over the processes of a node. `megasora.parallel.world.World` has them.

    `node`: rank of its first process. `gather_on_node` returns the values there, by rank, and None on the others.
    """

    size: int
    node: int
    local_rank: int
    local_size: int

    def gather_on_node(self, value: T) -> list[T] | None: ...


@dataclass(frozen=True)
class Nodes:
    """`firsts`: the rank of the first process of each node, in order; the processes of a node have successive ranks."""

    firsts: tuple[int, ...]
    size: int  # processes

    def __len__(self) -> int:
        return len(self.firsts)

    def ranks(self, number: int) -> range:
        """Of the processes of a node."""
        stop = self.firsts[number + 1] if number + 1 < len(self) else self.size
        return range(self.firsts[number], stop)

    def number_of(self, rank: int) -> int:
        """The number of its node."""
        return next(k for k in range(len(self)) if rank in self.ranks(k))

    def copies_from(self, number: int) -> list[tuple[int, int]]:
        """(sender, receiver) of each process of a node; the receivers are those of the next node, in turn."""
        senders, receivers = self.ranks(number), self.ranks((number + 1) % len(self))
        return [(sender, receivers[i % len(receivers)]) for i, sender in enumerate(senders)]

    def pairs_of(self, rank: int) -> list[tuple[int, int]]:
        """The pairs of `copies_from` that `rank` is in, in an order in which all ranks can open them without waiting
        for each other in a circle: nodes 0, 2, 4 ... to the next, then 1, 3, 5 ...; of an odd number the last alone."""
        count, own = len(self), self.number_of(rank)
        edges = {own, (own - 1) % count}
        in_order = sorted(edges, key=lambda k: (2 if count % 2 and k == count - 1 else k % 2, k))
        return [pair for k in in_order for pair in self.copies_from(k) if rank in pair]


def find_nodes(ranks: NodeRanks) -> Nodes:
    """Of this launch; all ranks must call it."""
    by_rank = ranks.gather_objects(ranks.node)
    return Nodes(ranks.broadcast_object(tuple(sorted(set(by_rank or ())))), ranks.size)

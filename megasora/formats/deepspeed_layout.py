"""Which elements of a parameter are where in the files of a ZeRO checkpoint.

    stages 1, 2   the parameters of a group, one after the other, and padding up to a multiple of 2 W: one flat tensor,
                  of which each of W ranks has a W-th
    stage 3       each parameter, padded to a multiple of W, of which each rank has a W-th; the parts of consecutive
                  parameters, one after the other, are the flat tensor of a sub-group

Groups are those of the optimizer. In stage 3 a group is divided into sub-groups, which end as soon as a rank's part of
one has `sub_group_size` elements.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

SUB_GROUP_SIZE = 1_000_000_000  # zero_optimization.sub_group_size of DeepSpeed, by default
ALIGNMENT = 2  # a flat tensor of stages 1 and 2 is a multiple of this times the ranks

Group = Mapping[str, torch.Size]  # shapes of the parameters of an optimizer's group or sub-group, in its order


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a flattened parameter, in the flat tensor of one group on one rank."""

    rank: int
    group: int  # in stage 3 the sub-group
    offset: int  # of the first element in that flat tensor
    start: int  # of the first element in the flattened parameter
    count: int


@dataclass(frozen=True)
class ZeroLayout:
    """`partition_sizes`: elements of a rank's flat tensor of each group, with padding; `used[rank][group]`: of them,
    those before the padding at the end."""

    processes: int
    groups: Sequence[Group]  # in stage 3 sub-groups
    partition_sizes: list[int]
    used: list[list[int]]
    pieces: dict[str, list[Piece]]  # of each parameter, in the order of its elements

    @cached_property
    def by_rank(self) -> list[list[dict[str, Piece]]]:
        """By rank and group: the piece of each parameter that has one there."""
        found: list[list[dict[str, Piece]]] = [[{} for _ in self.groups] for _ in range(self.processes)]
        for name, pieces in self.pieces.items():
            for piece in pieces:
                found[piece.rank][piece.group][name] = piece
        return found


def partition_groups(
    groups: Sequence[Group], processes: int, paddings: Sequence[Sequence[int]] | None = None
) -> ZeroLayout:
    """The layout of stages 1 and 2. `paddings`: elements after each parameter of each group; None: none."""
    paddings = paddings or [[0] * len(group) for group in groups]
    sizes, pieces = [], {}
    used: list[list[int]] = [[] for _ in range(processes)]
    for index, (group, after) in enumerate(zip(groups, paddings, strict=True)):
        lengths = [shape.numel() + padding for shape, padding in zip(group.values(), after, strict=True)]
        starts = [0, *itertools.accumulate(lengths)]
        size = -(-starts[-1] // (ALIGNMENT * processes)) * ALIGNMENT
        for (name, shape), start in zip(group.items(), starts, strict=False):
            pieces[name] = cut(start, shape.numel(), size, index)
        for rank in range(processes):
            used[rank].append(min(max(starts[-1] - rank * size, 0), size))
        sizes.append(size)
    return ZeroLayout(processes, groups, sizes, used, pieces)


def cut(start: int, count: int, size: int, group: int) -> list[Piece]:
    """The pieces of elements `start .. start + count - 1` of a flat tensor that is cut into partitions of `size`."""
    pieces = []
    for rank in range(start // size, (start + count - 1) // size + 1) if count else ():
        first, stop = max(start, rank * size), min(start + count, (rank + 1) * size)
        pieces.append(Piece(rank, group, first - rank * size, first - start, stop - first))
    return pieces


def partition_parameters(sub_groups: Sequence[Group], processes: int) -> ZeroLayout:
    """The layout of stage 3."""
    sizes, pieces = [], {}
    for index, group in enumerate(sub_groups):
        offset = 0
        for name, shape in group.items():
            size = part_size(shape, processes)
            whole = cut(0, shape.numel(), size, index)
            pieces[name] = [Piece(p.rank, index, offset, p.start, p.count) for p in whole]
            offset += size
        sizes.append(offset)
    return ZeroLayout(processes, sub_groups, sizes, [list(sizes) for _ in range(processes)], pieces)


def split_sub_groups(groups: Sequence[Group], processes: int, size: int = SUB_GROUP_SIZE) -> list[list[Group]]:
    """The sub-groups of each group."""
    divided = []
    for group in groups:
        parts: list[dict[str, torch.Size]] = [{}]
        length = 0
        for name, shape in group.items():
            if length >= size:
                parts.append({})
                length = 0
            parts[-1][name] = shape
            length += part_size(shape, processes)
        divided.append(parts)
    return divided


def part_size(shape: torch.Size, processes: int) -> int:
    """Elements of a parameter that each rank has in stage 3, with padding."""
    return -(-shape.numel() // processes)

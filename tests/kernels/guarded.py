"""Do kernels write where they must not? What operators allocate is put between walls, which must stand afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

WALL = 4096  # numbers before and behind
BRICK = -77.0


@contextmanager
def walls() -> Iterator[None]:
    """Around `Tensor.new_empty` of contiguous tensors; fails at the end where a wall is broken."""
    built, plain = [], Tensor.new_empty

    def between_walls(self, *size, dtype=None, device=None):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        ground = plain(self, shape.numel() + 2 * WALL, dtype=dtype, device=device).fill_(BRICK)
        built.append(ground)
        return ground[WALL : WALL + shape.numel()].view(shape)

    with patch.object(Tensor, "new_empty", between_walls):
        yield
    assert built, "nothing was allocated"
    for ground in built:
        assert (ground[:WALL] == BRICK).all() and (ground[-WALL:] == BRICK).all(), "a kernel wrote outside its tensor"
        assert (ground[WALL:-WALL] != BRICK).all(), "a kernel left numbers unwritten"

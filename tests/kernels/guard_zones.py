"""Detects kernels that write outside of their outputs, by guard zones around all tensors that operators allocate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

GUARD = 4096  # elements before and after each tensor
SENTINEL = -77.0


@contextmanager
def guard_zones() -> Iterator[None]:
    """Patches `Tensor.new_empty`; fails at the end if a guard zone was written to, or an element was not written."""
    buffers, new_empty = [], Tensor.new_empty

    def guarded_new_empty(self, *size, dtype=None, device=None):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        buffer = new_empty(self, shape.numel() + 2 * GUARD, dtype=dtype, device=device).fill_(SENTINEL)
        buffers.append(buffer)
        return buffer[GUARD : GUARD + shape.numel()].view(shape)

    with patch.object(Tensor, "new_empty", guarded_new_empty):
        yield
    assert buffers, "nothing was allocated"
    for buffer in buffers:
        assert (buffer[:GUARD] == SENTINEL).all() and (buffer[-GUARD:] == SENTINEL).all(), (
            "a kernel wrote outside of its output"
        )
        assert (buffer[GUARD:-GUARD] != SENTINEL).all(), "a kernel left elements unwritten"

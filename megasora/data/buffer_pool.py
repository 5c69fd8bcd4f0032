"""A pool of equal buffers for packs. A buffer is reused as soon as no tensor of its pack exists any more.

Fresh memory costs a page fault per 4 KiB, half as much again as reading the bytes from the page cache. `acquire`
returns an array on a buffer. Tensors made of it, and all their views, keep that array alive; when the last of them is
freed, the buffer returns to the pool. A reused buffer is not cleared.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np


class BufferPool:
    """Buffers of `size` bytes, of which at most `max_idle` are kept unused. Thread-safe."""

    def __init__(self, size: int, max_idle: int):
        self.size = size
        self.idle: deque[memoryview] = deque(maxlen=max_idle)  # drops the oldest if there are more

    def acquire(self) -> np.ndarray:
        """uint8 [size], with undefined content."""
        try:
            buffer = self.idle.pop()
        except IndexError:
            buffer = memoryview(np.empty(self.size, np.uint8))
        # made of a memoryview: an array made of an array would keep alive the memory's owner, not that array
        array = np.frombuffer(buffer, np.uint8)
        weakref.finalize(array, self.idle.append, buffer).atexit = False
        return array

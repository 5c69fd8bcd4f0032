"""Memory for packs, used again as soon as nobody holds a tensor of the pack that lay in it.

Fresh memory costs a page fault for each 4 KiB, half as much again as reading them from the page cache. A slab is handed
out as an array. Tensors made of it and all their views keep that array alive; with the last of them it goes, and the
slab is free for another pack. What lies in it then is left over from the one before.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np


class Slabs:
    def __init__(self, size: int, keep: int):
        """Slabs of `size` bytes, of which at most `keep` lie idle."""
        self.size = size
        self.idle: deque[memoryview] = deque(maxlen=keep)  # the oldest leaves where there are more

    def take(self) -> np.ndarray:
        """uint8 [size]. May be called by several threads."""
        try:
            slab = self.idle.pop()
        except IndexError:
            slab = memoryview(np.empty(self.size, np.uint8))
        # of a memoryview: arrays made of arrays keep only the memory's owner alive, not what they were made of
        array = np.frombuffer(slab, np.uint8)
        weakref.finalize(array, self.idle.append, slab).atexit = False
        return array

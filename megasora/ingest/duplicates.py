"""Clips that look like one before them.

A frame's hash is 64 bits: of 8 x 9 grey cells, whether each is brighter than its right neighbour (dHash). It hardly
changes with size, compression, brightness and small overlays. Two clips are alike where the hashes of their first
frames differ in at most `bits` bits, and those of their middle frames too.

Two hashes that differ in at most d bits are equal in one of d + 1 pieces, so pieces are looked up, not all pairs.
"""

from __future__ import annotations

import numpy as np

GREY = np.array([0.299, 0.587, 0.114], np.float32)


def frame_hash(cells: np.ndarray) -> int:
    """64 bits of a frame's `scenes.grid`."""
    grey = cells @ GREY
    columns = np.linspace(0, grey.shape[1], 10).round().astype(int)
    rows = grey.reshape(8, -1, grey.shape[1]).mean(1)
    wide = np.stack([rows[:, a:b].mean(1) for a, b in zip(columns, columns[1:], strict=False)], 1)  # [8, 9]
    return int.from_bytes(np.packbits(wide[:, :-1] > wide[:, 1:]).tobytes(), "big")


class Seen:
    """Pairs of hashes in order; `like` finds the first before that is alike."""

    def __init__(self, bits: int):
        self.bits = bits
        edges = np.linspace(0, 64, bits + 2).round().astype(int).tolist()
        self.pieces = list(zip(edges, edges[1:], strict=False))
        self.tables: list[dict[int, list[int]]] = [{} for _ in self.pieces]
        self.hashes: list[tuple[int, int]] = []

    def like(self, pair: tuple[int, int]) -> int | None:
        """The number of the first pair kept before that is alike; None, and this one is kept, where there is none."""
        keys = [pair[0] >> low & ((1 << high - low) - 1) for low, high in self.pieces]
        found = {n for table, key in zip(self.tables, keys, strict=True) for n in table.get(key, ())}
        for number in sorted(found):
            if all((a ^ b).bit_count() <= self.bits for a, b in zip(pair, self.hashes[number], strict=True)):
                return number
        for table, key in zip(self.tables, keys, strict=True):
            table.setdefault(key, []).append(len(self.hashes))
        self.hashes.append(pair)
        return None

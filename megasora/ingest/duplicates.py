"""Detection of clips that look like an earlier one.

The hash of a frame has 64 bits: for 8 x 9 grey cells, whether each is brighter than its right neighbour (dHash). It
hardly changes with size, compression, brightness and small overlays. Two clips are near-duplicates if the hashes of
their first frames differ in at most `bits` bits, and those of their middle frames too.

If two hashes differ in at most d bits, at least one of d + 1 disjoint bit ranges is equal in both. So candidates are
looked up by range, instead of comparing all pairs.
"""

from __future__ import annotations

import numpy as np

from megasora.ingest.filters import LUMA_WEIGHTS


def frame_hash(cells: np.ndarray) -> int:
    """64-bit hash of the `scenes.color_cells` of a frame."""
    luma = cells @ LUMA_WEIGHTS
    columns = np.linspace(0, luma.shape[1], 10).round().astype(int)
    rows = luma.reshape(8, -1, luma.shape[1]).mean(1)
    wide = np.stack([rows[:, a:b].mean(1) for a, b in zip(columns, columns[1:], strict=False)], 1)  # [8, 9]
    return int.from_bytes(np.packbits(wide[:, :-1] > wide[:, 1:]).tobytes(), "big")


class DuplicateIndex:
    """The hash pairs of distinct clips (first frame, middle frame), in the order they were added."""

    def __init__(self, bits: int):
        """`bits`: largest number of bits in which near-duplicates differ, 0 to 63."""
        self.bits = bits
        edges = np.linspace(0, 64, bits + 2).round().astype(int).tolist()
        self.ranges = list(zip(edges, edges[1:], strict=False))
        self.tables: list[dict[int, list[int]]] = [{} for _ in self.ranges]  # per range: its bits -> indices of pairs
        self.pairs: list[tuple[int, int]] = []

    def find_or_add(self, pair: tuple[int, int]) -> int | None:
        """The index of the first near-duplicate of `pair`; if there is none, adds `pair` and returns None."""
        keys = [pair[0] >> low & ((1 << high - low) - 1) for low, high in self.ranges]
        candidates = {n for table, key in zip(self.tables, keys, strict=True) for n in table.get(key, ())}
        for index in sorted(candidates):
            if all((a ^ b).bit_count() <= self.bits for a, b in zip(pair, self.pairs[index], strict=True)):
                return index
        for table, key in zip(self.tables, keys, strict=True):
            table.setdefault(key, []).append(len(self.pairs))
        self.pairs.append(pair)
        return None

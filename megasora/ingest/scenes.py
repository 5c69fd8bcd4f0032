"""Where a video changes from one scene to the next.

    frames --grid--> colours of 16 x 16 cells --Scenes--> frame numbers at which a scene begins

The change between two frames is the mean absolute difference of their cells, in levels of 255. A cut is a change of at
least `threshold` that also stands out from the changes just before it: fast motion changes many frames in a row, a cut
one. Fades and dissolves are not found.
"""

from __future__ import annotations

from collections import deque

import numpy as np

SIDE = 16  # cells a side
SAMPLES = 4  # pixels along a side of a cell that are looked at
BEFORE = 8  # changes that a cut is compared with
OUTSTANDING = 3.0  # times their median


def grid(frame_HWC: np.ndarray) -> np.ndarray:
    """float32 [16, 16, 3]: mean colours of cells, from 4 x 4 pixels each."""
    rows, columns = (
        ((np.arange(SIDE * SAMPLES) + 0.5) * n / (SIDE * SAMPLES)).astype(int) for n in frame_HWC.shape[:2]
    )
    samples = frame_HWC[rows[:, None], columns].astype(np.float32)
    return samples.reshape(SIDE, SAMPLES, SIDE, SAMPLES, 3).mean((1, 3))


class Scenes:
    """Frames one after the other. A scene has at least `least` frames: a cut within is taken for a flash."""

    def __init__(self, threshold: float, least: int):
        self.threshold, self.least = threshold, max(1, least)
        self.starts: list[int] = [0]
        self.count = 0
        self.last: np.ndarray | None = None
        self.changes: deque[float] = deque(maxlen=BEFORE)

    def add(self, cells: np.ndarray) -> None:
        if self.last is not None:
            change = float(np.abs(cells - self.last).mean())
            usual = float(np.median(self.changes)) if self.changes else 0.0
            is_cut = change >= self.threshold and change >= OUTSTANDING * usual
            if is_cut and self.count - self.starts[-1] >= self.least:
                self.starts.append(self.count)
                self.changes.clear()
            else:
                self.changes.append(change)
        self.last = cells
        self.count += 1

    def spans(self) -> list[tuple[int, int]]:
        """[first frame, one past the last) of each scene. A last one that is too short stays with the one before."""
        starts = self.starts
        if len(starts) > 1 and self.count - starts[-1] < self.least:
            starts = starts[:-1]
        return list(zip(starts, [*starts[1:], self.count], strict=True))

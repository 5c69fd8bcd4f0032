"""Scene detection: the frames at which a video cuts from one scene to the next.

    frames --color_cells--> colours of 16 x 16 cells --SceneDetector--> (first frame, end) of each scene

The change between two frames is the mean absolute difference of their cells, in levels of 255. A cut is a change of at
least `threshold` that is also three times the median of the eight changes before it: fast motion changes many frames in
a row, a cut one. Fades and dissolves are not detected.
"""

from __future__ import annotations

from collections import deque

import numpy as np

CELLS = 16  # per side
SAMPLES = 4  # pixels that are read along each side of a cell
HISTORY = 8  # changes that a cut is compared with
MIN_RATIO = 3.0  # of a cut to their median


def color_cells(frame_HWC: np.ndarray) -> np.ndarray:
    """Mean colours of the cells of a frame, float32 [16, 16, 3] in 0 to 255, from 4 x 4 pixels each."""
    rows, columns = (
        ((np.arange(CELLS * SAMPLES) + 0.5) * n / (CELLS * SAMPLES)).astype(int) for n in frame_HWC.shape[:2]
    )
    samples = frame_HWC[rows[:, None], columns].astype(np.float32)
    return samples.reshape(CELLS, SAMPLES, CELLS, SAMPLES, 3).mean((1, 3))


class SceneDetector:
    """Takes the cells of frames in order. A scene has at least `min_frames` frames; a shorter one counts as a flash."""

    def __init__(self, threshold: float, min_frames: int):
        """`threshold`: smallest change of a cut, levels of 255."""
        self.threshold, self.min_frames = threshold, max(1, min_frames)
        self.starts: list[int] = [0]
        self.num_frames = 0
        self.previous: np.ndarray | None = None
        self.changes: deque[float] = deque(maxlen=HISTORY)

    def add_frame(self, cells: np.ndarray) -> None:
        if self.previous is not None:
            change = float(np.abs(cells - self.previous).mean())
            median = float(np.median(self.changes)) if self.changes else 0.0
            is_cut = change >= self.threshold and change >= MIN_RATIO * median
            if is_cut and self.num_frames - self.starts[-1] >= self.min_frames:
                self.starts.append(self.num_frames)
                self.changes.clear()
            else:
                self.changes.append(change)
        self.previous = cells
        self.num_frames += 1

    def scenes(self) -> list[tuple[int, int]]:
        """[first frame, one past the last) of each scene. A last scene that is too short is joined to the previous."""
        starts = self.starts
        if len(starts) > 1 and self.num_frames - starts[-1] < self.min_frames:
            starts = starts[:-1]
        return list(zip(starts, [*starts[1:], self.num_frames], strict=True))

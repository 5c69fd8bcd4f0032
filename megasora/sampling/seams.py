"""Measures of a result: how large the step is where given frames meet new ones, and what the codec keeps of given ones.

A step is the mean difference of consecutive frames, in grey levels. The ratio of a seam is its step divided by the
median of the steps around it: 1 where motion goes on as before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

NEIGHBOURS = 8  # steps on each side of a seam that it is compared with
STILL = 0.25  # grey levels: the smallest step that a seam is divided by


class Steps:
    """The steps of frames that are given one by one; memory for two frames."""

    def __init__(self) -> None:
        self.first: np.ndarray | None = None
        self.last: np.ndarray | None = None
        self.sizes: list[float] = []  # of the steps from frame i to i + 1

    def add(self, frame_HWC: np.ndarray) -> None:
        if self.last is None:
            self.first = np.array(frame_HWC)
        else:
            self.sizes.append(step(self.last, frame_HWC))
        self.last = np.array(frame_HWC)

    def seams(self, frames: Sequence[int]) -> list[dict[str, Any]]:
        """{"frame", "step", "ratio"} of each seam; `frames`: the first frame after it; 0: of a loop, after the last."""
        return [{"frame": frame, **self.seam(frame, set(frames))} for frame in frames] if self.sizes else []

    def seam(self, frame: int, seams: set[int]) -> dict[str, float]:
        sizes, count = self.sizes, len(self.sizes) + 1
        size = step(self.last, self.first) if frame == 0 else sizes[frame - 1]
        # the step into frame i is sizes[i - 1]; of a loop the steps around are those at its end and its start
        around = [(frame + i) % count for i in range(-NEIGHBOURS, NEIGHBOURS + 1) if i]
        if frame:
            around = [i for i in range(frame - NEIGHBOURS, frame + NEIGHBOURS + 1) if 0 < i < count and i != frame]
        usual = [sizes[i - 1] for i in around if i not in seams and i > 0]
        ratio = size / max(float(np.median(usual)), STILL) if usual else math.nan
        return {"step": round(size, 3), "ratio": round(ratio, 3) if usual else None}


def step(a_HWC: np.ndarray, b_HWC: np.ndarray) -> float:
    """Mean absolute difference, grey levels."""
    return float(np.abs(a_HWC.astype(np.int16) - b_HWC).mean())


def psnr(frame_HWC: np.ndarray, reference_HWC: np.ndarray) -> float:
    """PSNR, dB; 99 for equal frames."""
    error = float(np.square(frame_HWC.astype(np.float32) - reference_HWC).mean())
    return 99.0 if error == 0 else min(99.0, 10 * math.log10(255**2 / error))

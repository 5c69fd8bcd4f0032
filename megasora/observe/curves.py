"""Curves of a run prepared for drawing: running means, and fewer points."""

from __future__ import annotations

import numpy as np

MAX_POINTS = 1200


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` steps, fewer at the ends; NaN is skipped."""
    finite = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    index = np.arange(len(values))
    start, stop = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    count = counts[stop] - counts[start]
    return np.where(count > 0, (sums[stop] - sums[start]) / np.maximum(count, 1), np.nan)


def smoothing_window(values: np.ndarray) -> int:
    """Steps of the running mean: a fortieth of the run, odd."""
    return max(1, len(values) // 40) | 1


def describe_smoothing(values: np.ndarray) -> str:
    """The text for a legend."""
    window = smoothing_window(values)
    return f"mean of {window} steps" if window > 1 else "every step"


def decimate(x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `max_points` finite points of a curve: the minimum and maximum of each interval, so spikes remain."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= max_points:
        return x, y
    intervals = np.array_split(np.arange(len(x)), max_points // 2)
    extremes = np.unique(np.concatenate([i[[int(y[i].argmin()), int(y[i].argmax())]] for i in intervals]))
    return x[extremes], y[extremes]

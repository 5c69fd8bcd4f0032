"""Measures of sampled clips against rendered ones: error of a path on the torus, jumps, what an edit keeps, a table.

    uint8 frames --detector--> path [F, 2];  paths --> px, ratios;  values of many clips --Figure--> one line of a table

A path is the centroid (x, y) of the shape in each frame, px, NaN where the shape is missing. A canvas is its (width,
height) in px.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_PSNR = 99.0  # dB, of equal frames


@dataclass(frozen=True)
class Figure:
    """One measured number: its name, the value with its standard error, from how many clips, and what is asked of it.

    `target` is (">=" or "<=", number), or None where nothing is asked.
    """

    name: str
    value: float
    error: float
    count: int
    unit: str = ""
    target: tuple[str, float] | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the value is as asked; None where nothing is asked."""
        if self.target is None:
            return None
        relation, bound = self.target
        return self.value >= bound if relation == ">=" else self.value <= bound

    def row(self) -> dict[str, object]:
        """The figure for a JSON file."""
        asked = f"{self.target[0]} {self.target[1]:g}" if self.target else None
        return dataclasses.asdict(self) | {"target": asked, "met": self.is_met}


def share(name: str, correct: Sequence[bool], at_least: float | None = None) -> Figure:
    """The share of the clips that are as asked, with the standard error of a binomial."""
    p, n = float(np.mean(correct)), len(correct)
    return Figure(name, p, math.sqrt(p * (1 - p) / n), n, target=None if at_least is None else (">=", at_least))


def mean(name: str, values: Sequence[float], unit: str = "", target: tuple[str, float] | None = None) -> Figure:
    """The mean of one number a clip, with its standard error."""
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Figure(name, float(np.mean(values)), error, n, unit, target)


def median(name: str, values: Sequence[float], unit: str = "", target: tuple[str, float] | None = None) -> Figure:
    """The median of one number a clip; its standard error from the middle 68 % of the ranks that it may have."""
    ordered, n = np.sort(np.asarray(values, dtype=float)), len(values)
    half = math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half) - 1)
    return Figure(name, float(np.median(ordered)), float(ordered[high] - ordered[low]) / 2, n, unit, target)


def ratio(name: str, above: Sequence[float], below: Sequence[float], target: tuple[str, float] | None = None) -> Figure:
    """The mean of `above` over the mean of `below`, paired by clip; its standard error by leaving out one clip each."""
    a, b = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    n, value = len(a), float(a.sum() / b.sum())
    with np.errstate(divide="ignore", invalid="ignore"):  # one clip, or all but one of `below` are 0
        without = (a.sum() - a) / (b.sum() - b)
    error = float(np.sqrt((n - 1) * np.var(without))) if np.isfinite(without).all() else math.nan
    return Figure(name, value, error, n, target=target)


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table of figures."""
    lines = ["| figure | value | clips | asked | met |", "|---|---|---|---|---|"]
    for figure in figures:
        row = figure.row()
        met = {True: "yes", False: "**no**", None: ""}[figure.is_met]
        value = f"{figure.value:.3g} ± {figure.error:.2g} {figure.unit}".rstrip()
        lines.append(f"| {figure.name} | {value} | {figure.count} | {row['target'] or ''} | {met} |")
    return "\n".join(lines)


def torus_offset(a_F2: np.ndarray, b_F2: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """The shortest way from `b` to `a` on the torus, (x, y) px, of each frame."""
    size = np.array(canvas, dtype=float)
    return (a_F2 - b_F2 + size / 2) % size - size / 2


def path_error(path_F2: np.ndarray, truth_F2: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Distance to the true centroid of each frame, px; of a missing shape the largest that the torus has."""
    distance = np.linalg.norm(torus_offset(path_F2, truth_F2, canvas), axis=-1)
    return np.where(np.isnan(distance), math.hypot(*canvas) / 2, distance)


def step_lengths(path_F2: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Distance from each frame to the next, px, [F - 1]; infinite beside a missing shape."""
    lengths = np.linalg.norm(torus_offset(path_F2[1:], path_F2[:-1], canvas), axis=-1)
    return np.where(np.isnan(lengths), math.inf, lengths)


def largest_jump(path_F2: np.ndarray, canvas: tuple[int, int]) -> float:
    """The longest step over the median step; 1 for uniform motion."""
    lengths = step_lengths(path_F2, canvas)
    return float(lengths.max() / max(np.median(lengths), 1e-6)) if np.isfinite(lengths).all() else math.inf


def path_correlation(path_F2: np.ndarray, other_F2: np.ndarray, canvas: tuple[int, int]) -> float:
    """Pearson correlation of two paths, x and y together, unrolled from the torus; 0 if a shape is missing or still.

    It says whether the motion is the same; not where it starts, which `path_error` says.
    """
    if np.isnan(path_F2).any() or np.isnan(other_F2).any():
        return 0.0
    unrolled = [np.cumsum(torus_offset(p[1:], p[:-1], canvas), axis=0) for p in (path_F2, other_F2)]
    a, b = (np.ravel(p - p.mean(0)) for p in unrolled)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 1e-9 else 0.0


def psnr(frames: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal to noise ratio of uint8 frames, dB."""
    error = float(np.square(frames.astype(float) - reference).mean())
    return MAX_PSNR if error == 0 else min(MAX_PSNR, 10 * math.log10(255**2 / error))

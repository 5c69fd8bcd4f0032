"""Reads color, shape, direction and background of a procedural clip back from its frames; grades generated clips.

It is not learned: backgrounds are grey and shapes saturated, so the chroma of a pixel gives its coverage by the shape;
the centroid on the torus gives the motion, and matched filters give the shape. What cannot be decided is None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megasora.errors import MegaSoraError
from megasora.testing.clips import COLORS, SHAPES, TEXTURE_CONTRAST, TEXTURE_PERIOD, coverage


@dataclass(frozen=True)
class Reading:
    """The result of `detect`. A word that could not be decided is None.

    positions: [F, 2] of (x, y) px on the canvas, the centroid of the shape; NaN in frames without it.
    presence: fraction of the frames that show the shape, 0 to 1.
    """

    color: str | None
    shape: str | None
    direction: str | None
    background: str | None
    positions: np.ndarray
    presence: float


_WINDOW = 23  # px; larger than every shape, smaller than every canvas
_MIN_AREA = 20.0  # px^2; the smallest shape covers 58
_MIN_MATCH = 0.75  # correlation of a shape with its template; rendered shapes reach 0.97 after H.264
_MIN_MARGIN = 0.003  # of the best over the second shape; rendered shapes reach 0.01 after H.264


@lru_cache(maxsize=16)
def _shape_bank(height: int, width: int) -> np.ndarray:
    """Unit, zero-mean templates [shapes, variants, height * width] over diameters and sub-pixel offsets."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    shifts = (-0.5, 0.0, 0.5)
    banks = []
    for shape in SHAPES:
        variants = [
            coverage(shape, diameter, x - (width // 2) - sx, y - (height // 2) - sy, edge=1.75).ravel()
            for diameter in np.arange(8.0, 17.5, 0.75)
            for sx in shifts
            for sy in shifts
        ]
        bank = np.array(variants)
        bank -= bank.mean(axis=1, keepdims=True)
        banks.append(bank / np.linalg.norm(bank, axis=1, keepdims=True))
    return np.array(banks, dtype=np.float32)


def _torus_window(alpha_FHW: np.ndarray, centres_F2: np.ndarray, height: int, width: int) -> np.ndarray:
    """Windows [F, height, width] around the centres (x, y), wrapped around the edges of the canvas."""
    frames, canvas_h, canvas_w = alpha_FHW.shape
    corner = np.floor(centres_F2).astype(int) - np.array([width // 2, height // 2])
    rows = (corner[:, 1, None] + np.arange(height)) % canvas_h
    columns = (corner[:, 0, None] + np.arange(width)) % canvas_w
    return alpha_FHW[np.arange(frames)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _color_and_alpha(pixels_FHW3: np.ndarray) -> tuple[str | None, np.ndarray]:
    """The dominant palette colour, or None, and the fraction of each pixel that it covers, [F, H, W]."""
    chroma = pixels_FHW3 - pixels_FHW3.mean(axis=-1, keepdims=True)
    chroma -= np.median(chroma, axis=(1, 2), keepdims=True)  # removes a tint of the background
    palette = np.array(list(COLORS.values()), dtype=np.float64)
    palette -= palette.mean(axis=-1, keepdims=True)
    strength = np.linalg.norm(palette, axis=-1)
    for axis in (1, 2):  # smooths over 3 x 3 pixels (1 2 1), so that grain does not count as hue
        chroma = (np.roll(chroma, 1, axis) + 2 * chroma + np.roll(chroma, -1, axis)) / 4
    projection = chroma @ (palette / strength[:, None]).T  # [F, H, W, colors], grey levels
    fraction = projection / strength
    norm = np.linalg.norm(chroma, axis=-1)[..., None]
    # Over grey, a pixel of which the shape covers a fraction has that fraction of the shape's chroma, at the same hue.
    votes = np.where((projection > 0.8 * norm) & (fraction > 0.3), fraction, 0.0).sum(axis=(0, 1, 2))
    best = int(votes.argmax())
    if votes[best] < 0.6 * votes.sum() or votes[best] <= 0.0:
        return None, np.zeros(pixels_FHW3.shape[:-1])
    hue_fits = projection[..., best] > 0.7 * norm[..., 0]
    return list(COLORS)[best], np.where(hue_fits, np.clip(fraction[..., best], 0.0, 1.0), 0.0)


def _locate(alpha_FHW: np.ndarray, height: int, width: int) -> np.ndarray:
    """Centroids [F, 2] of (x, y) px on the torus; NaN where less than `_MIN_AREA` is covered."""
    _, canvas_h, canvas_w = alpha_FHW.shape
    # Correlation with a disc on the torus finds the shape, whatever specks there are elsewhere.
    dy = (np.arange(canvas_h) + canvas_h / 2) % canvas_h - canvas_h / 2
    dx = (np.arange(canvas_w) + canvas_w / 2) % canvas_w - canvas_w / 2
    disc = coverage("circle", 12.0, dx[None, :], dy[:, None])
    spectrum = np.fft.rfft2(alpha_FHW) * np.conj(np.fft.rfft2(disc))
    score = np.fft.irfft2(spectrum, s=(canvas_h, canvas_w)).reshape(len(alpha_FHW), -1)
    row, column = np.divmod(score.argmax(axis=1), canvas_w)
    centres = np.stack([column, row], axis=1) + 0.5
    solid = np.where(alpha_FHW > 0.15, alpha_FHW, 0.0)
    offset_y = np.arange(height) - height // 2
    offset_x = np.arange(width) - width // 2
    for _ in range(2):  # the second pass centres the window on the first centroid
        window = _torus_window(solid, centres, height, width)
        area = window.sum(axis=(1, 2))
        safe = np.maximum(area, 1e-9)
        shift_x = (window.sum(axis=1) @ offset_x) / safe
        shift_y = (window.sum(axis=2) @ offset_y) / safe
        centres = np.floor(centres) + 0.5 + np.stack([shift_x, shift_y], axis=1)
    centres %= np.array([canvas_w, canvas_h])
    centres[area < _MIN_AREA] = np.nan
    return centres


def _match_shape(windows_FHW: np.ndarray) -> str | None:
    """The shape whose templates correlate best with the coverage in the windows, as a mean over frames, or None."""
    height, width = windows_FHW.shape[1:]
    windows = windows_FHW.reshape(len(windows_FHW), -1)
    windows = windows - windows.mean(axis=1, keepdims=True)
    windows /= np.maximum(np.linalg.norm(windows, axis=1, keepdims=True), 1e-9)
    match = (_shape_bank(height, width) @ windows.T.astype(np.float32)).max(axis=1).mean(axis=1)  # [shapes]
    second, first = np.sort(match)[-2:]
    return SHAPES[int(match.argmax())] if first >= _MIN_MATCH and first - second >= _MIN_MARGIN else None


def _first_direction(centres_F2: np.ndarray, canvas_wh: np.ndarray) -> str | None:
    """Direction of the first movement on the torus: the axis along which the shape first moves 3 px."""
    seen = np.flatnonzero(~np.isnan(centres_F2[:, 0]))
    if len(seen) < 2:
        return None
    steps = np.diff(centres_F2[seen], axis=0)
    steps = (steps + canvas_wh / 2) % canvas_wh - canvas_wh / 2
    travelled = np.cumsum(steps, axis=0)
    minimum = 3.0 if len(centres_F2) > 2 else 1.5  # 3 px: more than a jitter of one pixel in both directions
    for x, y in travelled:
        along, across = max(abs(x), abs(y)), min(abs(x), abs(y))
        if along >= minimum and along >= 1.5 * across:
            if abs(x) > abs(y):
                return "right" if x > 0 else "left"
            return "down" if y > 0 else "up"
    return None


def _read_background(pixels_FHW3: np.ndarray, alpha_FHW: np.ndarray) -> str | None:
    """plain, striped or checkered, by the energy outside of the shape at the frequencies of the textures, or None."""
    luma = pixels_FHW3.mean(axis=-1)
    free = (alpha_FHW < 0.1).astype(np.float64)
    count = free.sum(axis=0)
    if (count > 0).mean() < 0.5:
        return None
    still = np.where(count > 0, (luma * free).sum(axis=0) / np.maximum(count, 1.0), 0.0)
    weight = (count > 0).astype(np.float64)
    still = (still - (still * weight).sum() / weight.sum()) * weight
    height, width = still.shape
    wave_y = np.exp(2j * np.pi * np.arange(height) / TEXTURE_PERIOD)[:, None]
    wave_x = np.exp(2j * np.pi * np.arange(width) / TEXTURE_PERIOD)[None, :]
    # A square wave of amplitude a has a fundamental of 4a/pi; a checkerboard has two, diagonal, of (4/pi)^2 a together.
    # Both values below are scaled to a, in grey levels.
    stripes = 2 * abs((still * wave_x).sum()) / weight.sum() * np.pi / 4
    checks = math.hypot(abs((still * wave_y * wave_x).sum()), abs((still * wave_y.conj() * wave_x).sum()))
    checks *= 2 * math.sqrt(2) / weight.sum() * (np.pi / 4) ** 2
    if max(stripes, checks) < 0.35 * TEXTURE_CONTRAST:
        # Neither texture: plain if it is flat, otherwise unknown.
        return "plain" if np.sqrt((still**2).sum() / weight.sum()) < 0.5 * TEXTURE_CONTRAST else None
    return "striped" if stripes > checks else "checkered"


def detect(frames_FHWC: np.ndarray) -> Reading:
    """Reads color, shape, direction, background and the path of the shape from a clip, uint8 [F, H, W, 3].

    Chroma gives the coverage by the shape, its centroid on the torus the path, and the best template over shapes and
    diameters the shape. A word that is missing, mixed, tied, or fits no template is None. About 0.3 ms per frame.
    Raises MegaSoraError for frames of another shape.
    """
    if frames_FHWC.ndim != 4 or frames_FHWC.shape[-1] != 3 or 0 in frames_FHWC.shape:
        raise MegaSoraError(f"frames have shape {tuple(frames_FHWC.shape)}; give RGB frames [frames, height, width, 3]")
    pixels = frames_FHWC.astype(np.float64)
    frames, canvas_h, canvas_w, _ = pixels.shape
    color, alpha = _color_and_alpha(pixels)
    background = _read_background(pixels, alpha)
    no_positions = np.full((frames, 2), np.nan)
    if color is None:
        return Reading(None, None, None, background, no_positions, 0.0)
    height, width = min(_WINDOW, canvas_h), min(_WINDOW, canvas_w)
    centres = _locate(alpha, height, width)
    seen = ~np.isnan(centres[:, 0])
    presence = float(seen.mean())
    if presence < 0.5:  # too few frames with a shape
        return Reading(None, None, None, background, centres, presence)

    shape = _match_shape(_torus_window(alpha[seen], centres[seen], height, width))
    direction = _first_direction(centres, np.array([canvas_w, canvas_h], dtype=np.float64))
    return Reading(color, shape, direction, background, centres, presence)

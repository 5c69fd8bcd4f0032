"""The invisible watermark of sampled frames.

    frame [H, W, 3] --apply_watermark--> frame [H, W, 3];   frames of a clip --detect_watermark--> WatermarkReading

A pattern that says "made with MegaSora" is added to all three channels, so to the luma alone. It repeats every 24
pixels and does not change over time. It is made of 3 x 3 blocks of 8 x 8 pixels, each one function of the DCT with a
sign: an encoder that transforms 4 x 4 or 8 x 8 pixels keeps few large coefficients and drops many small ones, and an
encoder that predicts frames from earlier ones keeps what does not change. Which function and which sign a block has is
the key. The key is public: the watermark carries no secret, and who knows it can remove it.

The detector needs only pixels. From each frame it removes what repeats every 8 pixels (textures, borders of transform
blocks) and the local median, ignores what remains of edges, averages over time, and limits frequencies that stand out.
It correlates the residual with the pattern at each of the 24 x 24 shifts, since a crop moves it, and does the same with
patterns of other keys. How far the largest correlation stands above those of the other keys decides.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

BLOCK = 8  # pixels: the transform of H.264 is of 8 x 8 or 4 x 4
BLOCKS = 3  # blocks of the pattern, each way
PERIOD = BLOCK * BLOCKS
FUNCTIONS = ((1, 1), (0, 2), (2, 0), (2, 2))  # (rows, columns) of the DCT: those that are even about the centre survive
KEY = "MegaSora watermark 9"

MAX_RMS, SMALL_AREA = (
    2.8,
    24 * 24,
)  # grey levels; reached in frames of so many pixels and fewer, and where detail hides it
MIN_RMS = 1.25  # grey levels, in frames of 14,500 pixels and more where they are smooth; 45 dB
DETAIL = 4.0  # mean difference from the local mean, grey levels, from which on the pattern is stronger

MIN_SIDE = 16  # pixels; smaller frames hold too little of the pattern
OTHER_KEYS = 200
MIN_SCORE = 4.5  # standard deviations above the other keys
REACH = 4  # pixels, of medians and means
MIN_EDGE = 6.0  # grey levels: what differs by more from the local median is an edge, and more
EDGE = 3.0  # medians of these differences in its frame
MAX_LINE = 4.0  # medians of all frequencies: what one frequency counts at most
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green, blue
MAX_SIDE = 640  # pixels of a frame that the detector reads, around its centre
MAX_PIXELS = 4_000_000  # of all frames that it reads


@dataclass(frozen=True)
class WatermarkReading:
    """`score`: standard deviations of the largest correlation above those of other keys. `confidence`: one less the
    probability of such a score without the watermark, 0 to 1."""

    found: bool
    score: float
    confidence: float


def pattern(key: str) -> np.ndarray:
    """[PERIOD, PERIOD] of mean 0 and variance 1; the same on every machine and version of numpy."""
    count = BLOCKS * BLOCKS
    functions, signs = shuffled(f"{key}/functions", count), shuffled(f"{key}/signs", count)
    centres = (np.arange(BLOCK) + 0.5) * np.pi / BLOCK
    blocks = []
    for function, sign in zip(functions, signs, strict=True):
        rows, columns = FUNCTIONS[function % len(FUNCTIONS)]
        block = np.outer(np.cos(rows * centres), np.cos(columns * centres))
        blocks.append((1 - 2 * (sign % 2)) * block / block.std())
    tile = np.array(blocks).reshape(BLOCKS, BLOCKS, BLOCK, BLOCK).swapaxes(1, 2).reshape(PERIOD, PERIOD)
    tile -= tile.mean()
    return tile / tile.std()


def shuffled(text: str, count: int) -> list[int]:
    """0 to count - 1, in an order that depends on the text."""
    return sorted(range(count), key=lambda i: hashlib.sha256(f"{text}/{i}".encode()).digest())


@cache
def marked_pattern() -> np.ndarray:
    return pattern(KEY)


@cache
def spectra() -> np.ndarray:
    """Conjugate spectra [1 + OTHER_KEYS, PERIOD, PERIOD] of the pattern and of those of other keys."""
    others = [pattern(f"{KEY}, other key {i}") for i in range(OTHER_KEYS)]
    return np.conj(np.fft.fft2(np.array([marked_pattern(), *others])))


# ---------------------------------------------------------------- adding it


def strength(height: int, width: int) -> float:
    """The root mean square of the change in smooth frames, grey levels: small ones hold less of the pattern and need
    more."""
    return min(MAX_RMS, max(MIN_RMS, MAX_RMS * (SMALL_AREA / (height * width)) ** 0.25))


def apply_watermark(frame_HW3: np.ndarray) -> np.ndarray:
    """A copy of a uint8 frame [H, W, 3] with the watermark. Frames are independent: a clip may be marked one by one."""
    height, width = frame_HW3.shape[:2]
    luma_HW = frame_HW3.astype(np.float32) @ LUMA
    detail_HW = box_mean(np.abs(luma_HW - box_mean(luma_HW)))
    strength_HW = np.minimum(MAX_RMS, strength(height, width) * np.maximum(1, detail_HW / DETAIL))
    repeats = (-(-height // PERIOD), -(-width // PERIOD))
    change_HW = np.tile(marked_pattern(), repeats)[:height, :width] * strength_HW
    return np.clip(np.rint(frame_HW3 + change_HW[..., None]), 0, 255).astype(np.uint8)


def box_mean(x_HW: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbours up to REACH rows and columns away."""
    for _ in range(2):
        sums = np.cumsum(np.pad(x_HW, [(0, 0), (REACH + 1, REACH)], mode="edge"), axis=1, dtype=np.float64)
        side = 2 * REACH + 1
        x_HW = ((sums[:, side:] - sums[:, :-side]) / side).T
    return x_HW


# ---------------------------------------------------------------- finding it


def frames_to_read(count: int, height: int, width: int) -> list[int]:
    """Indices of the frames of a clip that the detector needs: all, or as many as it can read, evenly spaced."""
    pixels = min(height, MAX_SIDE) * min(width, MAX_SIDE)
    most = max(1, min(count, MAX_PIXELS // max(pixels, 1)))
    return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()


def detect_watermark(frames: Sequence[np.ndarray]) -> WatermarkReading:
    """Looks for the watermark in uint8 frames [H, W, 3] of one clip: those of `frames_to_read`, at least one.

    Frames with a side below MIN_SIDE give a score of 0.
    """
    luma_FHW = np.stack([centre(frame).astype(np.float32) @ LUMA for frame in frames])
    if min(luma_FHW.shape[1:]) < MIN_SIDE:
        return WatermarkReading(False, 0.0, 0.0)
    own, *others = largest_correlations(residual(luma_FHW))
    mean, deviation = float(np.mean(others)), float(np.std(others))
    score = (float(own) - mean) / deviation if deviation > 1e-9 else 0.0
    return WatermarkReading(score >= MIN_SCORE, score, 1 - chance(score))


def centre(frame_HW3: np.ndarray) -> np.ndarray:
    """The part around the centre that is at most MAX_SIDE wide and high."""
    top, left = (max(0, side - MAX_SIDE) // 2 for side in frame_HW3.shape[:2])
    return frame_HW3[top : top + MAX_SIDE, left : left + MAX_SIDE]


def chance(score: float) -> float:
    """The probability that a largest correlation has this score or more: the tail of a Gumbel distribution."""
    return -math.expm1(-math.exp(min(700.0, -(score * math.pi / math.sqrt(6) + np.euler_gamma))))


def residual(luma_FHW: np.ndarray) -> np.ndarray:
    """[H, W]: what is left of a clip without its content, averaged over the frames in which it is not an edge."""
    frames, height, width = luma_FHW.shape
    total_HW, weight_HW = np.zeros((height, width)), np.full((height, width), 0.5)
    periodic_HW = repeating(luma_FHW)
    for luma_HW in luma_FHW:
        flat_HW = luma_HW - periodic_HW
        flat_HW -= median(median(flat_HW).T).T
        is_flat_HW = np.abs(flat_HW) < max(MIN_EDGE, EDGE * float(np.median(np.abs(flat_HW))))
        total_HW += np.where(is_flat_HW, flat_HW, 0)
        weight_HW += is_flat_HW
    return total_HW / weight_HW


def repeating(luma_FHW: np.ndarray) -> np.ndarray:
    """[H, W]: the median over all pixels of the clip whose positions are equal modulo BLOCK."""
    height, width = luma_FHW.shape[1:]
    cell = np.array([[np.median(luma_FHW[:, y::BLOCK, x::BLOCK]) for x in range(BLOCK)] for y in range(BLOCK)])
    return np.tile(cell, (-(-height // BLOCK), -(-width // BLOCK)))[:height, :width].astype(np.float32)


def median(x_HW: np.ndarray) -> np.ndarray:
    """The median of each value and its REACH neighbours to the left and to the right."""
    padded = np.pad(x_HW, [(0, 0), (REACH, REACH)], mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * REACH + 1, axis=1), axis=-1)


def largest_correlations(residual_HW: np.ndarray) -> np.ndarray:
    """[1 + OTHER_KEYS]: the largest correlation over all shifts with the pattern, then with those of other keys."""
    height, width = residual_HW.shape
    folded = np.pad(residual_HW, [(0, -height % PERIOD), (0, -width % PERIOD)])
    folded = folded.reshape(-1, PERIOD, folded.shape[1] // PERIOD, PERIOD).sum((0, 2))
    spectrum = np.fft.fft2(folded)
    size = np.abs(spectrum)
    spectrum = spectrum / np.maximum(1, size / max(MAX_LINE * float(np.median(size)), 1e-9))
    return np.fft.ifft2(spectrum * spectra()).real.max((1, 2))

"""Which frames of a clip are returned, and how often, from the times at which they are shown.

    FrameTimes --build_schedule--> FrameSchedule: fps, how often each frame is returned

Constant rate: every frame is less than a quarter of a period from its place on a regular grid. Each frame is returned
once, or at most once if `max_fps` is lower. Otherwise frames are repeated and skipped: for each period of a regular
grid the frame is returned that a player shows at its start, or half a usual frame later, because time stamps waver.
Rates that headers declare are used only if the time stamps agree with them. Letters: `N` frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megasora.data.media import Media, RejectedClip

MAX_HOLD_SECONDS = 10.0  # a clip of variable rate that shows one frame for longer is rejected
MAX_FRAMES = 10_000_000  # that a clip of variable rate may become; more than ingest.max_frames is rejected later
ROUNDING = 1.1  # ticks between the earliest and the latest frame, compared with a regular grid: stamps are rounded
COARSE_PERIOD = 3.0  # ticks; stamps of shorter periods are exact
HELD_LAST_FRAME = 1.5  # periods; a last frame that is shown for longer is held
NTSC_RATES = [Fraction(1000 * n, 1001) for n in (24, 30, 48, 60, 120, 240)]
TIME_TOLERANCE = 5e-4  # seconds; a frame this close to the start of an excerpt belongs to it


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of a clip are shown."""

    ticks_N: np.ndarray  # int64, ascending
    tick: Fraction  # seconds
    last_duration: int = 0  # ticks that the last frame is shown; 0: as long as a usual one
    declared_fps: Fraction | None = None


@dataclass(frozen=True)
class FrameSchedule:
    """How often each frame is returned, and when."""

    fps: float  # of the returned frames; 0 for a single frame
    repeats_N: np.ndarray  # int64
    seconds: np.ndarray  # float64, of each returned frame, on the scale of the ticks


def build_schedule(
    times: FrameTimes, media: Media, max_fps: float = 0.0, start: float = -math.inf, end: float = math.inf
) -> FrameSchedule:
    """The schedule of the frames shown in the seconds [start, end), at most `max_fps` per second if that is set.

    Raises RejectedClip for times that cannot be made regular.
    """
    seconds_N = times.ticks_N * float(times.tick)
    inside_N = (seconds_N >= start - TIME_TOLERANCE) & (seconds_N < end - TIME_TOLERANCE)
    ticks = times.ticks_N[inside_N]
    if len(ticks) < 2:
        return FrameSchedule(0.0, inside_N.astype(np.int64), seconds_N[inside_N])
    last_duration = times.last_duration
    if not inside_N[-1]:
        next_tick = int(times.ticks_N[np.flatnonzero(inside_N)[-1] + 1])
        last_duration = min(round(end / float(times.tick)), next_tick) - int(ticks[-1])
    period = constant_period(ticks, times.tick, last_duration, times.declared_fps)
    if period is not None:
        return keep_evenly(seconds_N, inside_N, float(1 / (period * times.tick)), max_fps)
    period = usual_period(ticks, times.tick)
    check_gaps(ticks, times.tick, period, last_duration, media)
    rate = float(1 / (period * times.tick))
    first = seconds_N[inside_N][0] if start == -math.inf else max(start, seconds_N[0])
    end = min(end, seconds_N[-1] + max(last_duration, float(period)) * float(times.tick))
    fps = max_fps if 0 < max_fps < rate else rate
    if (end - first) * fps > MAX_FRAMES:
        message = f"{media} would have {(end - first) * fps:.3g} frames at a constant rate of {fps:g} per second"
        raise RejectedClip("variable rate", message)
    return resample(seconds_N, fps, first, end, 0.5 / rate)


def keep_evenly(seconds_N: np.ndarray, inside_N: np.ndarray, rate: float, max_fps: float) -> FrameSchedule:
    """The frames that are inside, which have a constant rate; evenly spaced ones of them if `max_fps` is lower."""
    keep_ratio = max_fps / rate if 0 < max_fps < rate else 1.0
    repeats_N = inside_N.astype(np.int64)
    repeats_N[inside_N] = np.diff(np.floor(np.arange(inside_N.sum()) * keep_ratio), prepend=-1) > 0
    return FrameSchedule(max_fps if keep_ratio < 1 else rate, repeats_N, seconds_N[repeats_N > 0])


def constant_period(
    ticks: np.ndarray, tick: Fraction, last_duration: int, declared_fps: Fraction | None
) -> Fraction | None:
    """The period of frames of constant rate, in ticks; None if the rate is variable or the last frame is held."""
    steps = len(ticks) - 1
    mean = Fraction(int(ticks[-1] - ticks[0]), steps)
    if not mean or last_duration > HELD_LAST_FRAME * mean:
        return None
    rates = standard_rates(1 / (mean * tick))
    for rate in [declared_fps, *rates] if declared_fps else rates:
        period = 1 / (rate * tick)
        tolerance = ROUNDING if period >= COARSE_PERIOD else 1e-6
        if abs(period - mean) * steps <= ROUNDING and deviation(ticks, period) <= tolerance:
            return period
    periods = [1 / (rate * tick) for rate in rates]
    fitting = (
        period for period in [*periods, mean] if period >= COARSE_PERIOD and deviation(ticks, period) < period / 2
    )
    return next(fitting, None)


def standard_rates(rate: Fraction) -> list[Fraction]:
    """Frames per second that a measured rate may stand for, the nearest first."""
    whole = [Fraction(round(rate))] if round(rate) else []
    return sorted([*NTSC_RATES, *whole], key=lambda candidate: abs(candidate - rate))


def deviation(ticks: np.ndarray, period: Fraction) -> float:
    """Ticks between the frame that is earliest and the one that is latest, compared with a regular grid."""
    late = (ticks - ticks[0]) - np.arange(len(ticks)) * float(period)
    return float(late.max() - late.min())


def usual_period(ticks: np.ndarray, tick: Fraction) -> Fraction:
    """The time from frame to frame, in ticks, without gaps; that of a standard rate if it is within rounding; may be 0.

    It is the mean of the steps that are within a half of their median.
    """
    steps = np.diff(ticks)
    median = float(np.median(steps))
    mean = Fraction(float(steps[np.abs(steps - median) <= median / 2].mean())).limit_denominator(1000)
    for rate in standard_rates(1 / (mean * tick)) if mean >= COARSE_PERIOD else ():
        if abs(1 / (rate * tick) - mean) <= 1:
            return 1 / (rate * tick)
    return mean


def check_gaps(ticks: np.ndarray, tick: Fraction, period: Fraction, last_duration: int, media: Media) -> None:
    """Raises RejectedClip if most frames are shown for no time, or one for too long."""
    if period <= 0:
        raise RejectedClip("variable rate", f"{media}: most frames have the time stamp of the frame before")
    longest = float(max(int(np.diff(ticks).max()), last_duration) * tick)
    if longest > MAX_HOLD_SECONDS:
        message = f"{media} shows one frame for {longest:.1f} s and others for {float(period * tick):.3g} s"
        raise RejectedClip("variable rate", f"{message}; at most {MAX_HOLD_SECONDS:g} s can be made regular")


def resample(seconds_N: np.ndarray, fps: float, first: float, stop: float, delay: float) -> FrameSchedule:
    """The frames that a player shows `delay` after the start of each period of 1 / fps, from `first` to `stop`.

    All in seconds. A frame is stamped with its own time where it is returned first.
    """
    starts = first + np.arange(max(1, round((stop - first) * fps))) / fps
    shown = np.maximum(np.searchsorted(seconds_N, starts + delay + TIME_TOLERANCE / 100, side="right") - 1, 0)
    own = np.maximum(seconds_N[shown], first)
    stamps = np.where(np.diff(shown, prepend=-1) == 0, np.maximum(own, starts), own)
    return FrameSchedule(fps, np.bincount(shown, minlength=len(seconds_N)), stamps)

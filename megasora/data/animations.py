"""Animations to clips: their frames at a constant rate.

Animation: delays, frames --animation_clip--> OpenClip
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megasora.config import IngestConfig
from megasora.data.frame_schedule import FrameTimes, build_schedule
from megasora.data.media import Media, OpenClip, RejectedClip, check_size

SHORTEST_DELAY, USUAL_DELAY = Fraction(1, 100), Fraction(1, 10)  # seconds; browsers replace delays up to the first
MAX_TICKS_PER_SECOND = 90_000


@dataclass(frozen=True)
class Animation:
    """A file of one or more pictures; one is no animation."""

    height: int  # pixels, as shown
    width: int
    delays: list[Fraction]  # seconds that each picture is shown, as the file says
    pictures: Iterator[np.ndarray]  # uint8 [H, W, 3]; raises RejectedClip if one is damaged


def animation_clip(animation: Animation, media: Media, limits: IngestConfig, scale) -> OpenClip:
    """The frames of an animation of at least two pictures, scaled by the function `scale`. Raises RejectedClip."""
    size = animation.height, animation.width
    check_size(media, *size, 1 if media.is_excerpt else len(animation.delays), limits)
    end = math.inf if media.end is None else media.end
    schedule = build_schedule(times_of(animation), media, limits.max_fps, media.start or -math.inf, end)
    num_frames = int(schedule.repeats_N.sum())
    if not num_frames:
        raise RejectedClip("no frames", f"{media} has no frame")
    check_size(media, *size, num_frames, limits)
    timestamps: list[float] = []

    def frames() -> Iterator[np.ndarray]:
        for pixels_HW3, repeats in zip(animation.pictures, schedule.repeats_N, strict=True):
            if repeats:
                frame = scale(pixels_HW3)
            for _ in range(repeats):
                timestamps.append(float(schedule.seconds[len(timestamps)]))
                yield frame
            if len(timestamps) == num_frames and media.end is not None:
                return

    return OpenClip(schedule.fps, frames(), timestamps, num_frames)


def times_of(animation: Animation) -> FrameTimes:
    """When the pictures of an animation are shown, from 0."""
    delays = [delay if delay > SHORTEST_DELAY else USUAL_DELAY for delay in animation.delays]
    tick = Fraction(1, min(MAX_TICKS_PER_SECOND, common_denominator(delays)))
    starts = [Fraction(0)]
    for delay in delays:
        starts.append(starts[-1] + delay)
    ticks_N = np.array([round(start / tick) for start in starts], np.int64)
    return FrameTimes(ticks_N[:-1], tick, int(ticks_N[-1] - ticks_N[-2]), len(delays) / starts[-1])


def common_denominator(delays: list[Fraction]) -> int:
    """The ticks per second in which all delays are whole numbers, or more than the maximum; at least 100."""
    ticks = 100
    for delay in set(delays):
        ticks = math.lcm(ticks, delay.denominator)
        if ticks > MAX_TICKS_PER_SECOND:
            break
    return ticks

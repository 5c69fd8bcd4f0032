"""What a clip passes between the decoder and the codec: generators over its frames, each off unless a setting asks.

    frames --within_length--> --Meter--> motion, contrast, brightness --> --Thumbnails--> scores

They look, count and refuse; they never change a frame. Frames arrive already at the rate and size that `ingest.fps` and
`ingest.fit_height` ask for. A score is a function, named `module:function` in `ingest.scores`:

    function(frames_FHWC, fps) -> a number, or None to leave the clip out; uint8 [F, H, W, 3], about one frame a second

It is called in a process that decodes, once a clip.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator

import numpy as np

from megasora.config import IngestConfig
from megasora.data.video import RejectedClip
from megasora.errors import MegaSoraError

CELL = 4  # samples a side that a cell of the Meter is the mean of
CELLS = 32  # along the shorter side
GREY = np.array([0.299, 0.587, 0.114], np.float32)
THUMBNAIL = 256  # pixels, longer side
MOST_THUMBNAILS = 64


def within_length(frames: Iterator[np.ndarray], fps: float, name: str, limits: IngestConfig) -> Iterator[np.ndarray]:
    count = 0
    for count, frame in enumerate(frames, 1):
        if limits.max_seconds and fps and count > 1 and count / fps > limits.max_seconds + 1e-6:
            raise RejectedClip(
                "too many seconds", f"{name} is longer than ingest.max_seconds={limits.max_seconds}", "length"
            )
        yield frame
    seconds = count / fps if fps else 0.0
    if count > 1 and seconds < limits.min_seconds - 1e-6:
        raise RejectedClip(
            "too few seconds", f"{name} has {seconds:.2f} s; ingest.min_seconds={limits.min_seconds}", "length"
        )


class Meter:
    """Numbers of a clip, in grey levels of 255, from means over about 32 cells a side.

    motion: mean absolute change of a cell between frames; contrast: standard deviation over the cells of a frame, mean
    over frames; brightness: mean.
    """

    def __init__(self, name: str, limits: IngestConfig):
        self.name, self.limits = name, limits
        self.count, self.change, self.spread, self.light = 0, 0.0, 0.0, 0.0

    def watch(self, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        before = None
        for frame in frames:
            cells = cells_of(frame)
            self.count += 1
            self.spread += float(cells.std())
            self.light += float(cells.mean())
            if before is not None:
                self.change += float(np.abs(cells - before).mean())
            before = cells
            yield frame
        self.judge()

    def judge(self) -> None:
        found = self.values()
        for key, reason in (("motion", "static"), ("contrast", "blank")):
            least = getattr(self.limits, f"min_{key}")
            if found[key] < least and not (key == "motion" and self.count == 1):
                raise RejectedClip(
                    reason, f"{self.name} has {key} {found[key]:.3g}; ingest.min_{key}={least:g}", "motion and contrast"
                )

    def values(self) -> dict[str, float]:
        numbers = {
            "motion": self.change / max(1, self.count - 1),
            "contrast": self.spread / max(1, self.count),
            "brightness": self.light / max(1, self.count),
        }
        return {key: round(value, 4) for key, value in numbers.items()}


def cells_of(frame_HWC: np.ndarray) -> np.ndarray:
    """float32 [h, w]: grey, the mean of CELL x CELL samples a cell."""
    step = max(1, min(frame_HWC.shape[:2]) // (CELL * CELLS))
    samples = frame_HWC[::step, ::step]
    h, w = (max(1, n // CELL) for n in samples.shape[:2])
    samples = samples[: h * CELL, : w * CELL].astype(np.float32) @ GREY
    if min(samples.shape) < CELL:
        return samples
    return samples.reshape(h, CELL, w, CELL).mean((1, 3))


class Thumbnails:
    """About one small frame a second, at most 64: with more, every second one is let go and half as many are taken."""

    def __init__(self, fps: float):
        self.fps, self.every, self.kept = fps, max(1, round(fps)), []

    def watch(self, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        from PIL import Image

        for number, frame in enumerate(frames):
            if number % self.every == 0:
                if len(self.kept) == MOST_THUMBNAILS:
                    self.kept, self.every = self.kept[::2], 2 * self.every
                if number % self.every == 0:
                    factor = math.ceil(max(frame.shape[:2]) / THUMBNAIL)
                    self.kept.append(np.array(Image.fromarray(frame).reduce(factor)))
            yield frame

    def scores(self, name: str, functions: dict[str, Callable]) -> dict[str, float]:
        found = {}
        for key, function in functions.items():
            value = function(np.stack(self.kept), self.fps)
            if value is None:
                raise RejectedClip(f"score {key}", f"{name} was left out by {key}", "scores")
            found[key] = float(value)
            if not math.isfinite(found[key]):
                raise RejectedClip(f"score {key}", f"{name}: {key} gave {value}", "scores")
        return found


def load_scores(names: list[str]) -> dict[str, Callable]:
    """Function name -> function. Raises MegaSoraError that names what is missing."""
    found: dict[str, Callable] = {}
    for name in names:
        module, _, function = name.partition(":")
        try:
            found[function] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise MegaSoraError(f"ingest.scores: {name}: {error}") from None
    return found

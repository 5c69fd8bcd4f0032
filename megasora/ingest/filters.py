"""Filters between the decoder and the codec: generators that pass frames on unchanged and reject clips.

    frames --check_duration--> --FrameStats--> motion, contrast, brightness --> --Thumbnails--> scores

Each is off unless a setting needs it. Frames arrive at the rate and size that `ingest.max_fps` and `ingest.fit_height`
ask for. A score is a function, named `module:function` in `ingest.scores`:

    function(frames_FHWC, fps) -> a number, or None to reject the clip; uint8 [F, H, W, 3], about one frame per second

It is called once per clip, in the worker process.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator

import numpy as np

from megasora.config import IngestConfig
from megasora.data.media import RejectedClip
from megasora.errors import MegaSoraError

SAMPLES_PER_CELL = 4  # along each side of a cell of FrameStats
CELLS = 32  # along the shorter side of a frame, about
LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # of R, G, B (ITU-R BT.601)
THUMBNAIL_PIXELS = 256  # longer side, at most
MAX_THUMBNAILS = 64


def check_duration(frames: Iterator[np.ndarray], fps: float, name: str, limits: IngestConfig) -> Iterator[np.ndarray]:
    """Passes frames on; raises RejectedClip for a video outside `ingest.min_seconds` to `ingest.max_seconds`."""
    count = 0
    for count, frame in enumerate(frames, 1):
        if limits.max_seconds and fps and count > 1 and count / fps > limits.max_seconds + 1e-6:
            message = f"{name} is longer than ingest.max_seconds={limits.max_seconds}"
            raise RejectedClip("too many seconds", message, "duration")
        yield frame
    seconds = count / fps if fps else 0.0
    if count > 1 and seconds < limits.min_seconds - 1e-6:
        message = f"{name} has {seconds:.2f} s; ingest.min_seconds={limits.min_seconds}"
        raise RejectedClip("too few seconds", message, "duration")


class FrameStats:
    """Motion, contrast and brightness of a clip in grey levels of 255, from cells, about 32 along the shorter side.

    motion: mean absolute change of a cell from frame to frame; contrast: standard deviation over the cells of a frame,
    mean over frames; brightness: mean.
    """

    def __init__(self, name: str, limits: IngestConfig):
        """`name`: of the clip, for messages."""
        self.name, self.limits = name, limits
        self.num_frames, self.change_sum, self.deviation_sum, self.mean_sum = 0, 0.0, 0.0, 0.0

    def observe(self, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Passes frames on; after the last, raises RejectedClip for a clip that is static or blank."""
        previous = None
        for frame in frames:
            cells = cell_means(frame)
            self.num_frames += 1
            self.deviation_sum += float(cells.std())
            self.mean_sum += float(cells.mean())
            if previous is not None:
                self.change_sum += float(np.abs(cells - previous).mean())
            previous = cells
            yield frame
        self.check_limits()

    def check_limits(self) -> None:
        values = self.values()
        for key, reason in (("motion", "static"), ("contrast", "blank")):
            minimum = getattr(self.limits, f"min_{key}")
            if values[key] < minimum and not (key == "motion" and self.num_frames == 1):
                message = f"{self.name} has {key} {values[key]:.3g}; ingest.min_{key}={minimum:g}"
                raise RejectedClip(reason, message, "motion and contrast")

    def values(self) -> dict[str, float]:
        means = {
            "motion": self.change_sum / max(1, self.num_frames - 1),
            "contrast": self.deviation_sum / max(1, self.num_frames),
            "brightness": self.mean_sum / max(1, self.num_frames),
        }
        return {key: round(value, 4) for key, value in means.items()}


def cell_means(frame_HWC: np.ndarray) -> np.ndarray:
    """Luma of a frame as float32 [h, w], means of 4 x 4 samples; in very small frames the samples themselves."""
    stride = max(1, min(frame_HWC.shape[:2]) // (SAMPLES_PER_CELL * CELLS))
    samples = frame_HWC[::stride, ::stride]
    h, w = (max(1, n // SAMPLES_PER_CELL) for n in samples.shape[:2])
    samples = samples[: h * SAMPLES_PER_CELL, : w * SAMPLES_PER_CELL].astype(np.float32) @ LUMA_WEIGHTS
    if min(samples.shape) < SAMPLES_PER_CELL:
        return samples
    return samples.reshape(h, SAMPLES_PER_CELL, w, SAMPLES_PER_CELL).mean((1, 3))


class Thumbnails:
    """Small copies of about one frame per second, at most 64: when full, every second one is dropped and the interval
    doubles."""

    def __init__(self, fps: float):
        self.fps, self.interval, self.frames = fps, max(1, round(fps)), []

    def observe(self, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Passes frames on."""
        from PIL import Image

        for index, frame in enumerate(frames):
            if index % self.interval == 0:
                if len(self.frames) == MAX_THUMBNAILS:
                    self.frames, self.interval = self.frames[::2], 2 * self.interval
                if index % self.interval == 0:
                    factor = math.ceil(max(frame.shape[:2]) / THUMBNAIL_PIXELS)
                    self.frames.append(np.array(Image.fromarray(frame).reduce(factor)))
            yield frame

    def scores(self, name: str, functions: dict[str, Callable]) -> dict[str, float]:
        """The value of each function. Raises RejectedClip where one returns None or a value that is not finite."""
        scores = {}
        for key, function in functions.items():
            value = function(np.stack(self.frames), self.fps)
            if value is None:
                raise RejectedClip(f"score {key}", f"{name} was rejected by {key}", "scores")
            scores[key] = float(value)
            if not math.isfinite(scores[key]):
                raise RejectedClip(f"score {key}", f"{name}: {key} returned {value}", "scores")
        return scores


def load_score_functions(names: list[str]) -> dict[str, Callable]:
    """Function name -> function, for names `module:function`. Raises MegaSoraError for one that cannot be imported."""
    functions: dict[str, Callable] = {}
    for name in names:
        module, _, function = name.partition(":")
        try:
            functions[function] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise MegaSoraError(f"ingest.scores: {name}: {error}") from None
    return functions

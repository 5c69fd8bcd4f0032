"""What the experiments of `benchmarks.prompts` share: rendered clips that no training has seen, and a sampler.

    Bench (a sampler, a number of clips) --experiment--> Result: figures, and rows of a contact sheet

A quarter of the clips have a combination of colour, shape and direction that is held out of training. On the torus
their motion is known at every time, before and after what is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megasora.config import SampleConfig
from megasora.sampling.sampler import Sampler
from megasora.sampling.timeline import Timeline
from megasora.testing.clips import ClipSpec, clip_at, describe, positions, render
from megasora.testing.detector import Reading, detect
from megasora.testing.prompt_figures import Figure, path_error, share

UNSEEN_SEED = 20_000  # of the clips that are measured; tools/make_clips.py draws the training's with 0
SEEN_SIZES = {(24, 24): 1.0, (24, 32): 1.0, (32, 24): 1.0, (32, 32): 1.0}  # height, width: weight


@dataclass(frozen=True)
class Result:
    """Figures of one experiment and clips to look at, each with its caption."""

    figures: list[Figure]
    rows: list[tuple[str, np.ndarray]] = field(default_factory=list)


@dataclass(frozen=True)
class Clip:
    """A rendered clip, its caption with all words, and its frames."""

    spec: ClipSpec
    frames: np.ndarray

    @property
    def canvas(self) -> tuple[int, int]:
        return self.spec.width, self.spec.height

    @property
    def path(self) -> np.ndarray:
        """The true centroid in each frame, [F, 2], px."""
        return positions(self.spec)

    def error(self, path_F2: np.ndarray, frames: slice = slice(None)) -> float:
        """Mean distance of a path from the true one, px."""
        return float(path_error(path_F2, self.path, self.canvas)[frames].mean())

    def freezing_error(self, frames: slice, nearest: int | np.ndarray) -> float:
        """The same if the shape stayed where it is in frame `nearest`."""
        return float(path_error(self.path[frames], self.path[nearest], self.canvas).mean())

    def caption(self, **changes: str) -> str:
        """The caption with all words; `changes`: of colour, direction ..."""
        s = dataclasses.replace(self.spec, **changes)
        return describe(s.color, s.shape, s.direction, size=s.size, speed=s.speed, background=s.background)


@dataclass(frozen=True)
class Bench:
    """A sampler, and how many clips each experiment takes. `settings`: of the section `sample`, for all of them."""

    sampler: Sampler
    count: int
    settings: dict

    def clips(self, frames: int, count: int | None = None, **choices) -> list[Clip]:
        """Rendered clips of so many frames, of sizes and words of the training."""
        chosen = {"native_sizes": SEEN_SIZES, **choices, "lengths": {frames: 1.0}}
        specs = [clip_at(UNSEEN_SEED, "val", i, **chosen)[0] for i in range(count or self.count)]
        return [Clip(spec, render(spec)) for spec in specs]

    def timeline(self, clip: Clip, index: int, frames: int, **changes: str) -> Timeline:
        """A free clip of the size and rate of a rendered one, with its caption."""
        size = (clip.spec.height, clip.spec.width)
        return self.sampler.timeline(clip.caption(**changes), size, frames, clip.spec.fps, sample_id=index)

    def round_trip(self, frames_FHWC: np.ndarray) -> np.ndarray:
        """What the codec makes of frames."""
        coder, (frames, height, width) = self.sampler.coder, frames_FHWC.shape[:3]
        return coder.decode(coder.encode(frames_FHWC), coder.grid(frames, height, width), (height, width))[:frames]

    def sample(self, timelines: Sequence[Timeline], **settings) -> list[np.ndarray]:
        """uint8 [F, H, W, 3] of each timeline, with the settings of the run except `settings`."""
        return [s.frames_FHWC for s in self.sampler.sample(timelines, self.settings_with(**settings))]

    def settings_with(self, **settings) -> SampleConfig:
        return self.sampler.override_settings(**{**self.settings, **settings})


def follow(name: str, readings: Sequence[Reading], clips: Sequence[Clip], at_least: float | None = None) -> Figure:
    """The share of the videos with the colour and direction of their clip."""
    pairs = zip(readings, clips, strict=True)
    return share(name, [(r.color, r.direction) == (c.spec.color, c.spec.direction) for r, c in pairs], at_least)


def word(
    name: str, readings: Sequence[Reading], expected: Sequence[str], of: str, at_least: float | None = None
) -> Figure:
    """The share of the videos whose word `of` (color, direction ...) is as expected."""
    return share(name, [getattr(r, of) == e for r, e in zip(readings, expected, strict=True)], at_least)


def detect_all(videos: Sequence[np.ndarray]) -> list[Reading]:
    return [detect(video) for video in videos]


def captioned(clips: Sequence[Clip], videos: Sequence[np.ndarray], count: int = 12) -> list[tuple[str, np.ndarray]]:
    """Rows of a contact sheet."""
    return [(clip.caption(), video) for clip, video in zip(clips[:count], videos, strict=False)]

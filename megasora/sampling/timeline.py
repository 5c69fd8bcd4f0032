"""Timeline: what is given of a clip to sample. Every kind of prompt is one.

    text       nothing is given
    image      the first frame, or the last, or both
    keyframes  single frames
    extend     the last frames of a video, then free frames
    prepend    free frames, then the first frames of a video
    connect    the last frames of a video, free frames, the first frames of another
    loop       connect, of a video with itself
    edit       all frames, from a level below 1

A frame has a start level in [0, 1], the timestep from which it is sampled: 0: given, 1: free, between: the given frame
is noised to this level and sampled from there [SDEdit, arXiv 2108.01073].
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from megasora.errors import MegaSoraError


@dataclass(frozen=True)
class Given:
    """Consecutive given frames of a timeline."""

    first: int  # frame of the timeline
    frames_FHWC: np.ndarray  # uint8 [F, H, W, 3]
    level: float = 0.0  # start level: 0: they stay; above 0: sampling starts from them
    is_returned: bool = False  # the result has these frames themselves; else what the codec reconstructs of them

    @property
    def end(self) -> int:
        """One past the last frame."""
        return self.first + len(self.frames_FHWC)


@dataclass(frozen=True)
class Timeline:
    """A clip to sample: `frames` frames of `height` x `width` pixels, and what is given of them."""

    prompt: str
    height: int
    width: int
    frames: int
    fps: float
    given: tuple[Given, ...] = ()  # in order, without overlap
    mask_FHW: np.ndarray | None = None  # bool: pixels that change; the others stay as given. None: all
    negative_prompt: str | None = None  # None: that of the settings
    seed: int = 0
    sample_id: int = 0  # with the seed the key of the noise

    @property
    def new_frames(self) -> list[tuple[int, int]]:
        """(first, one past the last) of each range of frames that the result does not take from the given ones."""
        ranges, at = [], 0
        for block in (*(g for g in self.given if g.is_returned), None):
            first, end = (block.first, block.end) if block else (self.frames, self.frames)
            if first > at:
                ranges.append((at, first))
            at = max(at, end)
        return ranges

    @property
    def is_backward(self) -> bool:
        """Whether its last frames are given, and its first ones are not: windows then go from the end to the start."""
        starts_given = any(g.first == 0 for g in self.given)
        return not starts_given and any(g.end == self.frames and g.level == 0 for g in self.given)

    def levels(self) -> np.ndarray:
        """float32 [F]: the start level of each frame."""
        levels = np.ones(self.frames, np.float32)
        for block in self.given:
            levels[block.first : block.end] = block.level
        return levels


# ---------------------------------------------------------------- kinds of prompts


def as_frames(x: np.ndarray, what: str, dims: int) -> np.ndarray:
    """`x`, a video (`dims` = 4) or an image (3). Raises MegaSoraError unless it is uint8 with three colours."""
    shape = "[F, H, W, 3]" if dims == 4 else "[H, W, 3]"
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != dims or x.shape[-1] != 3 or 0 in x.shape:
        found = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
        raise MegaSoraError(f"{what} is {found}; give a numpy array, uint8 {shape}, RGB from 0 to 255")
    return x


def keyframes(timeline: Timeline, images: dict[int, np.ndarray]) -> Timeline:
    """Single frames are given. `images`: uint8 [H, W, 3] by frame number. Raises MegaSoraError."""
    for i, image in images.items():
        as_frames(image, f"the image of frame {i}", 3)
    outside = [i for i in images if not 0 <= i < timeline.frames]
    if outside:
        raise MegaSoraError(
            f"a given image is frame {outside[0]}, but the clip has frames 0 to {timeline.frames - 1}; give more "
            "--frames, or another frame number"
        )
    return with_given(timeline, *(Given(i, image[None]) for i, image in sorted(images.items())))


def extend(timeline: Timeline, context_FHWC: np.ndarray) -> Timeline:
    """The timeline after given frames, which come first and are not counted in its `frames`."""
    context = len(context_FHWC)
    longer = dataclasses.replace(timeline, frames=context + timeline.frames)
    return with_given(longer, Given(0, context_FHWC, is_returned=True))


def prepend(timeline: Timeline, context_FHWC: np.ndarray) -> Timeline:
    """The timeline before given frames."""
    longer = dataclasses.replace(timeline, frames=timeline.frames + len(context_FHWC))
    return with_given(longer, Given(timeline.frames, context_FHWC, is_returned=True))


def connect(timeline: Timeline, before_FHWC: np.ndarray, after_FHWC: np.ndarray) -> Timeline:
    """The timeline between the given frames of two videos."""
    gap, head = timeline.frames, len(before_FHWC)
    longer = dataclasses.replace(timeline, frames=head + gap + len(after_FHWC))
    return with_given(longer, Given(0, before_FHWC, is_returned=True), Given(head + gap, after_FHWC, is_returned=True))


def edit(timeline: Timeline, frames_FHWC: np.ndarray, strength: float, mask_FHW: np.ndarray | None = None) -> Timeline:
    """Sampling starts from all frames of a video, noised to the level `strength`; 1 keeps nothing of them.

    `mask_FHW`: True, or not 0, where pixels may change; [F, H, W], or for all frames [1, H, W] or [H, W]. Raises
    MegaSoraError.
    """
    if not 0 < strength <= 1:
        raise MegaSoraError(f"--edit {strength:g} must be above 0 (nothing changes) and at most 1 (nothing is kept)")
    shape = frames_FHWC.shape[:3]
    if mask_FHW is not None:
        mask_FHW = np.asarray(mask_FHW) != 0
        if mask_FHW.shape in (shape[1:], (1, *shape[1:])):
            mask_FHW = np.broadcast_to(mask_FHW, shape)
    if mask_FHW is not None and mask_FHW.shape != shape:
        raise MegaSoraError(
            f"--mask has the shape {list(mask_FHW.shape)}, --video {list(shape)}: frames, rows, columns; give a mask "
            "of that size, with one frame or as many"
        )
    timeline = dataclasses.replace(timeline, frames=len(frames_FHWC), mask_FHW=mask_FHW)
    return with_given(timeline, Given(0, frames_FHWC, level=strength))


def with_given(timeline: Timeline, *given: Given) -> Timeline:
    """The timeline with these frames given. Raises MegaSoraError if their size is not that of the timeline."""
    for block in given:
        height, width = block.frames_FHWC.shape[1:3]
        if (height, width) != (timeline.height, timeline.width):
            raise MegaSoraError(
                f"a given image or video has {height}x{width} pixels, the clip {timeline.height}x{timeline.width}; "
                "leave --size out, or give an image or video of that size"
            )
    return dataclasses.replace(timeline, given=given)

"""FrameStore: the frames of a timeline that exist so far, in memory or in a file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from megasora.files import errors_naming
from megasora.sampling.latents import WindowFrames
from megasora.sampling.timeline import Timeline
from megasora.sampling.windows import Window


class FrameStore:
    """`frames_FHWC` [F, H, W, 3] uint8 and which of them are complete; given frames that are returned are so at once.

    path: of a file that holds the frames, so that memory does not grow with their number; None: memory.
    """

    def __init__(self, timeline: Timeline, path: Path | None = None):
        shape = (timeline.frames, timeline.height, timeline.width, 3)
        if path is None:
            self.frames_FHWC = np.zeros(shape, np.uint8)
        else:
            self.frames_FHWC = frames_in_file(path, shape)
        self.timeline, self.is_done_F = timeline, np.zeros(timeline.frames, bool)
        for block in timeline.given:
            if block.is_returned:
                self.put(block.first, block.frames_FHWC)

    def put(self, first: int, frames_FHWC: np.ndarray) -> None:
        self.frames_FHWC[first : first + len(frames_FHWC)] = frames_FHWC
        self.is_done_F[first : first + len(frames_FHWC)] = True

    def window(self, window: Window) -> WindowFrames:
        """What is known of the frames of a window: complete frames are given ones."""
        timeline, size = self.timeline, self.frames_FHWC.shape[1:]
        frames = np.zeros((window.frames, *size), np.uint8)
        levels, is_known = np.ones(window.frames, np.float32), np.zeros(window.frames, bool)
        for block in timeline.given:
            start, end = max(window.first, block.first), min(window.end, block.end)
            if end > start:
                here = slice(start - window.first, end - window.first)
                frames[here] = block.frames_FHWC[start - block.first : end - block.first]
                levels[here], is_known[here] = block.level, True
        first, end = max(window.first, 0), min(window.end, timeline.frames)
        inside = slice(first - window.first, end - window.first)
        done = self.is_done_F[first:end]
        frames[inside][done] = self.frames_FHWC[first:end][done]
        levels[inside][done], is_known[inside][done] = 0, True
        mask = None
        if timeline.mask_FHW is not None:
            mask = np.zeros((window.frames, *size[:2]), bool)
            mask[inside] = timeline.mask_FHW[first:end]
        return WindowFrames(frames, levels, is_known, mask)

    def complete(self, window: Window, sampled_FHWC: np.ndarray) -> None:
        """Takes the sampled frames of a window that are not complete yet; pixels outside of a mask stay as given."""
        for i in range(max(window.first, 0), min(window.end, self.timeline.frames)):
            if not self.is_done_F[i]:
                frame = sampled_FHWC[i - window.first]
                if self.timeline.mask_FHW is not None:
                    given = self.given_frame(i)
                    frame = np.where(self.timeline.mask_FHW[i][..., None], frame, given)
                self.put(i, frame[None])

    def given_frame(self, index: int) -> np.ndarray:
        block = next(g for g in self.timeline.given if g.first <= index < g.end)
        return block.frames_FHWC[index - block.first]


def frames_in_file(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A new file as an uint8 array. Its space is taken now: on a full disk, writing to the array ends the process.

    Raises OSError where there is too little space.
    """
    with errors_naming(path):
        frames_FHWC = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return frames_FHWC

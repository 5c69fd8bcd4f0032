"""Excerpts of clips: a clip and a choice of frames in; the frames out, decoded or from memory.

A decoded clip is kept if it fits beside those kept before it; none is dropped for another. Of a longer video only the
chosen frames are decoded, from the key frame before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np

from megasora.config import IngestConfig
from megasora.data.clip_reader import open_clip
from megasora.data.media import Media, RejectedClip
from megasora.data.reader_lock import ReaderLock
from megasora.errors import DataError

# number of frames of a clip -> (first frame, number of frames)
ChooseFrames = Callable[[int], tuple[int, int]]


@dataclass(frozen=True)
class ClipTimes:
    """When the frames of a video are shown."""

    num_frames: int
    fps: float
    start: float  # seconds, of the first frame


class DecodedClips:
    """The clips of a run, by index, as uint8 frames. `limits`: as in an ingest. `cache_mib`: memory of decoded clips.

    Threads may share it. They decode one clip each at the same time, everything else under `reader_lock`.
    """

    def __init__(self, clips: Sequence[Media], limits: IngestConfig, cache_mib: int):
        self.clips, self.limits, self.free_bytes = clips, limits, cache_mib << 20
        self.reader_lock = ReaderLock()
        self.frames: dict[int, np.ndarray] = {}  # of clips that are kept
        self.times: dict[int, ClipTimes] = {}  # of videos that are not

    def read(self, index: int, choose: ChooseFrames) -> np.ndarray:
        """uint8 [T, H, W, 3]: the chosen frames of a clip. Raises DataError if it cannot be decoded."""
        try:
            return self.read_frames(index, choose)
        except (RejectedClip, OSError) as error:
            raise DataError(f"{error}; repair it, or leave it out of data.clips") from None
        except MemoryError:
            raise DataError(f"{self.clips[index]}: there is too little memory to decode it; leave it out") from None

    def read_frames(self, index: int, choose: ChooseFrames) -> np.ndarray:
        if index in self.frames:
            first, count = choose(len(self.frames[index]))
            return self.frames[index][first : first + count]
        times = self.times.get(index)
        if times is None:
            with self.reader_lock.released(), open_clip(self.clips[index], self.limits) as clip:
                frame = next(iter(clip.frames))
                first, count = choose(clip.num_frames)
                fits = clip.num_frames * frame.nbytes <= self.free_bytes
                if fits or count == clip.num_frames:
                    frames = stack_frames(chain([frame], clip.frames), clip.num_frames)
                else:
                    times = ClipTimes(clip.num_frames, clip.fps, clip.timestamps[0])
            if times is None:
                self.keep(index, frames)
                return frames[first : first + count]
            self.times[index] = times
        first, count = choose(times.num_frames)
        with self.reader_lock.released():
            return read_excerpt(self.clips[index], self.limits, times, first, count)

    def keep(self, index: int, frames: np.ndarray) -> None:
        if index not in self.frames and frames.nbytes <= self.free_bytes:
            self.frames[index] = frames
            self.free_bytes -= frames.nbytes

    def describe(self, index: int) -> str:
        return str(self.clips[index])


def read_excerpt(media: Media, limits: IngestConfig, times: ClipTimes, first: int, count: int) -> np.ndarray:
    """uint8 [count, H, W, 3]: frames `first` to `first + count` of a video. The file is read from a key frame on."""
    start = times.start + max(0.0, first - 0.5) / times.fps
    end = times.start + (first + count - 0.5) / times.fps
    end = end if media.end is None else min(end, media.end)
    with open_clip(replace(media, start=start, end=end), limits) as clip:
        return stack_frames(clip.frames, count)


def stack_frames(frames, count: int) -> np.ndarray:
    """uint8 [count, H, W, 3] of at most `count` frames; the memory is allocated once."""
    stacked: np.ndarray | None = None
    number = 0
    for number, frame in enumerate(islice(frames, count), 1):
        if stacked is None:
            stacked = np.empty((count, *frame.shape), np.uint8)
        stacked[number - 1] = frame
    return stacked[:number]

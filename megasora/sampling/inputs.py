"""Given files of a request: images, videos and masks, of which only the frames that are needed are kept in memory."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from megasora.config import IngestConfig
from megasora.data.clip_reader import open_clip
from megasora.data.media import Media, RejectedClip, sha256
from megasora.data.media_formats import IMAGE_FORMATS, VIDEO_FORMATS
from megasora.errors import MegaSoraError

WHITE = 128  # a mask is True where its grey level, of 255, is at least this


@dataclass(frozen=True)
class Source:
    """A readable image or video. `name`: the flag that gives it, for messages."""

    name: str
    path: Path
    limits: IngestConfig
    height: int
    width: int
    num_frames: int
    fps: float  # 0 for one frame

    @classmethod
    def open(cls, name: str, path: Path, limits: IngestConfig, formats: dict[str, str] | None = None) -> Source:
        """Reads the header and the first frame. `formats`: by suffix; None: all. Raises MegaSoraError."""
        formats = formats or {**IMAGE_FORMATS, **VIDEO_FORMATS}
        if path.suffix.lower() not in formats:
            kind = "an image" if formats is IMAGE_FORMATS else "a video or an image"
            raise MegaSoraError(f"{name} {path} is not {kind} file: {' '.join(formats)}")
        if not path.is_file():
            raise MegaSoraError(f"{name} {path} {'is not a file' if path.exists() else 'does not exist'}")
        limits = native(limits)
        with named_errors(name), open_clip(Media(path), limits) as clip:
            first = next(iter(clip.frames), None)
            if first is None:
                raise RejectedClip("no frames", f"{path} has no frames")
            return cls(name, path, limits, *first.shape[:2], clip.num_frames, clip.fps if clip.num_frames > 1 else 0.0)

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 [H, W, 3], one by one. Raises MegaSoraError, at the latest after the last."""
        count = 0
        with named_errors(self.name), open_clip(Media(self.path), self.limits) as clip:
            for count, frame in enumerate(clip.frames, 1):  # noqa: B007, counts
                yield frame
        if count != self.num_frames:
            raise MegaSoraError(f"{self.name} {self.path} has {count} frames, its header {self.num_frames}: it changed")

    def first(self, count: int) -> np.ndarray:
        """uint8 [F, H, W, 3]: the first frames, at most `count`."""
        frames = self.frames()
        try:
            return np.stack(list(islice(frames, count)))
        finally:
            frames.close()

    def last(self, count: int) -> np.ndarray:
        """uint8 [F, H, W, 3]: the last frames, at most `count`. Decodes all."""
        return np.stack(deque(self.frames(), maxlen=count))

    def read_into(self, frames_FHWC: np.ndarray) -> None:
        """Decodes all frames into an array, which may be a file."""
        for i, frame in enumerate(self.frames()):
            frames_FHWC[i] = frame

    def sha256(self) -> str:
        return sha256(Media(self.path))


def read_mask(source: Source, frames: int) -> np.ndarray:
    """bool [frames, H, W], True where the mask is white. A mask of one frame holds for all."""
    white = np.empty((source.num_frames, *source.size), bool)
    for i, frame in enumerate(source.frames()):
        white[i] = frame.mean(axis=2) >= WHITE
    return np.broadcast_to(white, (frames, *source.size)) if len(white) == 1 else white


def native(limits: IngestConfig) -> IngestConfig:
    """Limits under which frames keep their size and rate."""
    return dataclasses.replace(limits, fit_height=0, fit_width=0, max_fps=0.0)


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Errors of a given file begin with the flag that gives it."""
    try:
        yield
    except RejectedClip as error:
        raise MegaSoraError(f"{name} {error}; repair it, or give another file") from None
    except OSError as error:
        raise MegaSoraError(f"{name} cannot be read: {error}") from None

"""A clip in a file or in a byte range of one, the limits of its size, and what a reader returns of it.

Media --ByteWindow--> bytes --a reader--> OpenClip: fps, and an iterator over uint8 [H, W, 3] frames
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megasora.config import IngestConfig
from megasora.errors import MegaSoraError
from megasora.files import open_regular


class RejectedClip(MegaSoraError):
    """A clip that cannot be used: a short reason to count, a message that names the file, and the rejecting filter."""

    def __init__(self, reason: str, message: str, filter_name: str = "decode"):
        super().__init__(message)
        self.reason, self.filter_name = reason, filter_name


@dataclass(frozen=True)
class Media:
    """A clip in a file, or in a byte range of one (a member of a tar): all of it, or the seconds [start, end)."""

    path: Path  # of the file
    name: str = ""  # of the member of a tar; its suffix is that of the format
    offset: int = 0  # bytes
    size: int | None = None  # bytes; None: to the end of the file
    start: float = 0.0  # seconds
    end: float | None = None

    def __str__(self) -> str:
        start, end = f" from {self.start:g} s", f" to {self.end:g} s" if self.end is not None else ""
        return f"{self.path}{f': {self.name}' if self.name else ''}{start + end if self.is_excerpt else ''}"

    @property
    def suffix(self) -> str:
        return (os.path.splitext(self.name)[1] if self.name else self.path.suffix).lower()

    @property
    def is_excerpt(self) -> bool:
        return self.start > 0 or self.end is not None


@dataclass(frozen=True)
class Clip:
    """A decoded clip."""

    frames_FHWC: np.ndarray  # uint8 [F, H, W, 3]
    fps: float  # 0 for an image


@dataclass(frozen=True)
class OpenClip:
    """A clip that is being decoded."""

    fps: float  # of the frames returned; 0 for an image and for a video of one frame
    frames: Iterator[np.ndarray]  # uint8 [H, W, 3], of one size; raises RejectedClip, at the latest after the last
    timestamps: list[float]  # of the frames returned so far, seconds from the start of the file
    num_frames: int  # that `frames` returns


class ByteWindow(io.RawIOBase):
    """A byte range of an open file, as a file."""

    def __init__(self, file: io.FileIO, offset: int, size: int | None):
        self.file, self.offset, self.position = file, offset, 0
        available = max(0, os.fstat(file.fileno()).st_size - offset)
        self.size = available if size is None else min(size, available)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        if position < 0:
            raise ValueError(f"seek to byte {position}")
        self.position = position
        return position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.size - self.position))
        count = os.preadv(self.file.fileno(), [view[:count]], self.offset + self.position) if count else 0
        self.position += count
        return count


def sha256(media: Media) -> str:
    """SHA-256 of all bytes of the file or member, as hex."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with open_regular(media.path) as file:
        window = ByteWindow(file, media.offset, media.size)
        while count := window.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def check_size(media: Media, height: int, width: int, frames: int, limits: IngestConfig) -> None:
    """Raises RejectedClip if a clip exceeds the limits."""
    if height < 1 or width < 1:
        raise RejectedClip("unreadable", f"{media} declares {height}x{width} pixels: the file is cut or damaged")
    if height > limits.max_height or width > limits.max_width:
        raise RejectedClip(
            "too large",
            f"{media} has {height}x{width} pixels; ingest.max_height={limits.max_height}, "
            f"ingest.max_width={limits.max_width}",
        )
    if frames > limits.max_frames:
        raise RejectedClip("too long", f"{media} has {frames} frames; ingest.max_frames={limits.max_frames}")
    mib = frames * height * width * 3 / 2**20
    if mib > limits.max_clip_mib:
        raise RejectedClip(
            "too many pixels", f"{media} decodes to {mib:.0f} MiB; ingest.max_clip_mib={limits.max_clip_mib}"
        )


def fitting_size(height: int, width: int, limits: IngestConfig) -> tuple[int, int]:
    """The largest (height, width) of this aspect ratio within the configured one, and at most this size."""
    shrink = min(1.0, (limits.fit_height or height) / height, (limits.fit_width or width) / width)
    return (height, width) if shrink == 1 else (max(1, round(height * shrink)), max(1, round(width * shrink)))

"""Opens any clip, video or image: bytes --open_clip--> OpenClip.

A file is opened in the format of its first bytes, else of its suffix (`media_formats.py`), never by guessing: a
guessing demuxer would follow a text file to other local files. Demuxers read from a byte range of an open file and
never get its name, which they could take for a protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megasora.config import IngestConfig
from megasora.data.images import open_image
from megasora.data.media import ByteWindow, Clip, Media, OpenClip, RejectedClip
from megasora.data.media_formats import FIRST_BYTES, PILLOW_NAMES, format_to_open
from megasora.data.video import open_video
from megasora.files import open_regular


def read_clip(path: Path, limits: IngestConfig) -> Clip:
    """Decodes all frames of a clip. Raises RejectedClip."""
    with open_clip(Media(path), limits) as clip:
        frames = list(clip.frames)
    return Clip(np.stack(frames), clip.fps if len(frames) > 1 else 0.0)


@contextmanager
def open_clip(media: Media, limits: IngestConfig) -> Iterator[OpenClip]:
    """Opens a clip. Raises RejectedClip.

    Frames have their native size and rate, or, if set, at most `limits.fit_height` x `fit_width` pixels and
    `limits.max_fps` frames per second.
    """
    with open_regular(media.path) as file:
        window = ByteWindow(file, media.offset, media.size)
        if window.size == 0:
            raise RejectedClip("empty file", f"{media} has 0 bytes")
        try:
            format = format_to_open(media.suffix, window.read(FIRST_BYTES))
        except ValueError as error:
            raise RejectedClip("wrong suffix", f"{media} {error}") from None
        window.seek(0)
        if format in PILLOW_NAMES.values():
            yield open_image(window, media, format, limits)
            return
        with open_video(window, media, format, limits) as clip:
            yield clip

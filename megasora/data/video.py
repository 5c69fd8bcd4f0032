"""Video files to frames.

    bytes --open_video--> OpenClip: fps, and an iterator over uint8 [H, W, 3] frames

A file is read twice: first its packets, for their time stamps (`video_packets.py`), from which the rate and the frames
to return follow (`frame_schedule.py`); then it is decoded, one frame after the other. Limits are checked before
decoding. A file with fewer frames than it declares, or with frames that the decoder had to conceal, is rejected. Frames
before the first key frame that refer to what is not in the file are not returned: no player shows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np

from megasora.config import IngestConfig
from megasora.data.deinterlace import deinterlace
from megasora.data.frame_converter import FrameConverter
from megasora.data.frame_schedule import FrameSchedule, FrameTimes, build_schedule
from megasora.data.media import ByteWindow, Media, OpenClip, RejectedClip, check_size
from megasora.data.ogg_pages import ogg_damage
from megasora.data.video_packets import VideoPackets, read_packets, seek_before

BUFFER_BYTES = 1 << 18  # that a demuxer reads at once
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own ones ignore transparency
# decoder -> errors that it returns; aggressive: data left over at the end of a slice; explode: those that it conceals
ERROR_DETECTION = {
    "h264": "aggressive",
    "mjpeg": "explode",
    "msmpeg4": "aggressive",
    "wmv1": "aggressive",
    "wmv2": "aggressive",
}


@contextmanager
def open_video(window: ByteWindow, media: Media, format: str, limits: IngestConfig) -> Iterator[OpenClip]:
    """Opens the first video stream of a file in a format of FFmpeg. Raises RejectedClip."""
    import av

    if format == "ogg" and media.end is None:
        reject_missing(media, ogg_damage(window))
        window.seek(0)
    with reject_decoder_errors(media):
        container = av.open(window, format=format, buffer_size=BUFFER_BYTES, metadata_errors="replace")
    with container:
        with reject_decoder_errors(media):
            source = open_source(container, media, limits)
            decoded = source.decode()
            first = next(decoded, None)
        if first is None:
            raise RejectedClip("no frames", f"{media} has no frame")
        schedule = source.schedule(first[0], limits)
        if media.end is not None:
            reject_missing(media, source.packets.missing_of_excerpt(source.stream, media.end))
        timestamps: list[float] = []
        frames = read_frames(source, schedule, chain([first], decoded), limits, timestamps)
        yield OpenClip(schedule.fps, frames, timestamps, len(schedule.seconds))


@contextmanager
def reject_decoder_errors(media: Media) -> Iterator[None]:
    """Turns errors of the demuxer and decoder into RejectedClip, except for memory errors."""
    import av

    try:
        yield
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, av.error.MemoryError):
            raise MemoryError(str(error)) from None
        raise RejectedClip(
            "unreadable", f"{media} cannot be decoded: {getattr(error, 'strerror', None) or error}"
        ) from None


@dataclass(frozen=True)
class VideoSource:
    """A video stream whose packets were read once, and its decoder."""

    media: Media
    container: Any
    stream: Any
    decoder: Any
    packets: VideoPackets
    times: FrameTimes
    has_pts: bool  # False: decoded frames are those of `times` in order
    before_key: int  # number of frames that are displayed before the first key frame

    def decode(self) -> Iterator[tuple[int, Any]]:
        """Yields (number of the frame in `times`, frame). Raises RejectedClip for a missing or damaged frame."""
        seek_before(self.container, self.stream, self.packets.beginning)
        number = -1
        packets = (packet for packet in self.container.demux(self.stream) if packet.size)  # decoders refuse empty ones
        for packet in chain(packets, [None]):
            for frame in self.decoder.decode(packet):
                number = self.number_of(frame, number + 1)
                if frame.is_corrupt:
                    message = f"frame {number + 1} could not be decoded in full: the file is damaged"
                    raise RejectedClip("damaged", f"{self.media}: {message}")
                yield number, frame
        self.check_missing(number + 1, len(self.times.ticks_N))

    def number_of(self, frame, next_number: int) -> int:
        """The number in `times` of a decoded frame, at least `next_number`."""
        ticks_N, number, fits = self.times.ticks_N, next_number, True
        if frame.pts is not None and self.has_pts:
            tick = frame.pts - (self.stream.start_time or 0)
            number += int(np.searchsorted(ticks_N[next_number:], tick))
            fits = number < len(ticks_N) and ticks_N[number] == tick
        if number >= len(ticks_N) or not fits:
            message = f"the time stamps of its packets and frames differ at frame {next_number + 1}"
            raise RejectedClip("variable rate", f"{self.media}: {message}")
        self.check_missing(next_number, number)
        return number

    def check_missing(self, first: int, stop: int) -> None:
        """Raises RejectedClip if frames `first` to `stop` are missing, unless they are before the first key frame."""
        if first == stop or first == 0 and stop <= self.before_key:
            return
        total = len(self.times.ticks_N)
        message = f"{self.media} has {total} frames, frame {first + 1} could not be decoded: the file is damaged"
        raise RejectedClip("truncated", message)

    def schedule(self, first: int, limits: IngestConfig) -> FrameSchedule:
        """The schedule of the clip whose first displayed frame is number `first`. Raises RejectedClip."""
        media, ticks_N = self.media, self.times.ticks_N[first:]
        times = replace(self.times, ticks_N=ticks_N)
        span = (media.start, math.inf if media.end is None else media.end) if media.is_excerpt else ()
        schedule = build_schedule(times, media, limits.max_fps, *span)
        numbers = np.flatnonzero(schedule.repeats_N)
        if not len(numbers):
            raise RejectedClip("no frames", f"{media} has no frame")
        frames = max(int(numbers[-1] - numbers[0]) + 1, len(schedule.seconds))
        check_size(media, self.stream.height, self.stream.width, frames, limits)
        return replace(schedule, repeats_N=np.concatenate([np.zeros(first, np.int64), schedule.repeats_N]))


def open_source(container, media: Media, limits: IngestConfig) -> VideoSource:
    """Reads the packets of the first video stream that is no cover picture. Raises RejectedClip."""
    import av

    cover = av.stream.Disposition.attached_pic
    stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
    if stream is None:
        raise RejectedClip("no video stream", f"{media} has no video stream")
    if stream.codec_context is None:
        raise RejectedClip("unknown codec", f"{media} has a video stream that no decoder here reads")
    check_size(media, stream.height, stream.width, 1, limits)
    packets = read_packets(container, stream, media)
    if not packets.count:
        raise RejectedClip("no frames", f"{media} has no frame")
    if not packets.stamps:
        raise RejectedClip("variable rate", f"{media} has frames without time stamps")
    if media.end is None:
        reject_missing(media, packets.missing(stream, (container.duration or 0) / av.time_base))
    times, key_time = packets.times(stream), packets.key_time
    before_key = 0
    if key_time is not None:
        before_key = int(np.searchsorted(times.ticks_N, key_time - (stream.start_time or 0)))
    decoder = build_decoder(stream, media)
    return VideoSource(media, container, stream, decoder, packets, times, packets.has_pts, before_key)


def reject_missing(media: Media, missing: str) -> None:
    """Raises RejectedClip if something is missing."""
    if missing:
        raise RejectedClip("truncated", f"{media} {missing}: the file is cut or damaged")


def build_decoder(stream, media: Media):
    """The decoder of a stream; it uses one thread, since clips are decoded in parallel. Raises RejectedClip."""
    import av

    decoder, name = stream.codec_context, stream.codec_context.name
    if name in ALPHA_DECODERS and stream.metadata.get("alpha_mode") == "1":
        if ALPHA_DECODERS[name] not in av.codecs_available:
            raise RejectedClip("alpha", f"{media} has transparency that no decoder here reads")
        decoder = av.CodecContext.create(ALPHA_DECODERS[name], "r")
    decoder.thread_count = 1
    decoder.options = {"err_detect": ERROR_DETECTION[name]} if name in ERROR_DETECTION else {}
    return decoder


def read_frames(
    source: VideoSource, schedule: FrameSchedule, decoded: Iterator, limits: IngestConfig, timestamps: list[float]
) -> Iterator[np.ndarray]:
    """Yields the frames of the schedule, uint8 [H, W, 3]; appends to `timestamps`. Raises RejectedClip."""
    media, stream, repeats_N = source.media, source.stream, schedule.repeats_N
    is_opaque = source.container.format.name == "avi" and source.decoder.name == "rawvideo"  # RGB32: no alpha
    converter = FrameConverter(media, limits, Fraction(stream.sample_aspect_ratio or 1), is_opaque)
    last = np.flatnonzero(repeats_N)[-1] if media.end is not None else len(repeats_N)
    with reject_decoder_errors(media):
        for number, frame in deinterlace(decoded):
            converter.check(frame)
            if repeats_N[number]:
                pixels = converter.convert(frame)
            for _ in range(repeats_N[number]):
                timestamps.append(float(schedule.seconds[len(timestamps)]))
                yield pixels
            if number >= last:
                break

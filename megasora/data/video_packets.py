"""What a demuxer yields of a video stream, read once before decoding: time stamps, and whether the file is complete.

    container --read_packets--> VideoPackets --missing--> what the file declares and does not have

Decoders do not report missing frames, and headers do not tell when frames are shown. Letters: `N` frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from megasora.data.frame_schedule import FrameTimes
from megasora.data.media import Media

UNSEEKABLE_FORMATS = ("mpeg",)  # demuxers that give other time stamps after a seek
SEEK_BACK_SECONDS = (0.0, 2.0, 10.0, math.inf)  # tried until the key frame is displayed before the start of an excerpt


@dataclass
class VideoPackets:
    """The packets of a video stream, and where those of all streams end. Times are in ticks of the video stream."""

    stores_pts: bool  # of the function of this name
    reorders: bool = False  # True if frames may be displayed in another order than they are decoded
    stamps: list[tuple[int | None, int | None]] = field(default_factory=list)  # (pts, dts) of those that are displayed
    durations: list[int] = field(default_factory=list)  # of the same; 0: not declared
    count: int = 0  # of all packets of the video stream
    hidden: int = 0  # of these, not displayed: an edit list starts the clip between two key frames
    key: int = -1  # index in `stamps` of the first key frame
    incomplete: int | None = None  # number of video packets before the first packet that is not complete, of any stream
    video_end: Fraction = Fraction(0)  # seconds
    end: Fraction = Fraction(0)  # of any stream
    beginning: int = 0  # time stamp to seek, to read the same packets again

    def add(self, packet, stream) -> None:
        if not packet.size:
            return
        if packet.is_corrupt and self.incomplete is None:
            self.incomplete = self.count
        stamp = packet.pts if packet.pts is not None else packet.dts
        stop = ((stamp or 0) + (packet.duration or 0)) * (packet.time_base or 0)
        self.end = max(self.end, stop)
        if packet.stream.index != stream.index:
            return
        if not self.count:
            self.beginning = stamp_of(packet) or 0
        self.count += 1
        self.hidden += packet.is_discard
        self.video_end = max(self.video_end, stop)
        if packet.is_discard or stamp is None or is_invisible(packet, stream):
            return
        if self.key < 0 and packet.is_keyframe:
            self.key = len(self.stamps)
        self.stamps.append((packet.pts, packet.dts))
        self.durations.append(packet.duration or 0)

    @property
    def has_pts(self) -> bool:
        """False for files without the order of display: frames then have the sorted decoding times.

        Copies of avi files with B-frames in mp4 have decoding times in place of both.
        """
        if not self.stores_pts or any(pts is None for pts, _ in self.stamps):
            return False
        return not (self.reorders and all(pts == dts for pts, dts in self.stamps))

    @property
    def key_time(self) -> int | None:
        """When the first key frame is displayed; frames before it may refer to what is not in the file."""
        pts, dts = self.stamps[self.key] if self.key >= 0 else (None, None)
        return pts if self.has_pts else dts

    def times(self, stream) -> FrameTimes:
        """When the frames are displayed, in order, counted from the start of the stream."""
        has_pts = self.has_pts
        stamps_N = np.array(
            [pts if has_pts else dts for pts, dts in self.stamps if has_pts or dts is not None], np.int64
        )
        order = np.argsort(stamps_N, kind="stable")
        durations_N = np.array(self.durations, np.int64)[order] if len(order) == len(self.durations) else None
        last = believed_last_duration(stamps_N[order], durations_N) if durations_N is not None else 0
        return FrameTimes(stamps_N[order] - (stream.start_time or 0), stream.time_base, last, stream.average_rate)

    def missing(self, stream, seconds: float) -> str:
        """What of a whole file is missing, for the message; empty if nothing is.

        mp4 and avi declare the number of frames; an edit list hides some, then the others reach the declared end.
        matroska and fragmented mp4 declare only `seconds`.
        """
        declared, present = stream.frames, self.count - self.hidden
        if self.incomplete is not None:
            return self.first_gap(declared)
        rate = self.rate(stream)
        if declared and self.count < declared:
            length = (stream.duration or 0) * stream.time_base
            reaches_end = length and self.video_end >= length - 1 / (2 * rate)
            return "" if reaches_end else f"declares {declared} frames, has {present}"
        if not declared and self.end < seconds - 2 / rate:
            return f"declares {seconds:.2f} seconds, has {float(self.end):.2f}"
        return ""

    def missing_of_excerpt(self, stream, end: float) -> str:
        """What of the seconds before `end` is missing, for the message; empty if nothing is."""
        if self.incomplete is not None:
            return self.first_gap(0)
        last = float(self.video_end - (stream.start_time or 0) * stream.time_base)
        return f"ends at {last:.2f} s" if last < end - 1.5 / self.rate(stream) else ""

    def first_gap(self, declared: int) -> str:
        """Where data is missing first, for the message."""
        kind = "ends within a frame" if self.count <= self.incomplete + 1 else "has a frame that is not complete"
        return f"{kind}, after {self.incomplete}{f' of {declared}' if declared else ''}"

    def rate(self, stream) -> float:
        """Mean frames per second."""
        ticks = self.times(stream).ticks_N
        span = float((ticks[-1] - ticks[0]) * stream.time_base) if len(ticks) > 1 else 0.0
        return (len(ticks) - 1) / span if span else float(stream.average_rate or 1)


def read_packets(container, stream, media: Media) -> VideoPackets:
    """The packets of a clip; of an excerpt, those from a key frame before it to its end."""
    base, tick = stream.start_time or 0, stream.time_base
    stop = math.inf if media.end is None else base + int(media.end / tick)
    if not media.start or container.format.name in UNSEEKABLE_FORMATS or not stores_pts(container, stream):
        return read_until(container, stream, stop)
    first = next((stamp_of(packet) for packet in container.demux(stream) if packet.size), None) or 0
    for seconds in SEEK_BACK_SECONDS:
        target = base + int((media.start - seconds) / tick) if media.start > seconds else first
        seek_before(container, stream, target)
        packets = read_until(container, stream, stop)
        packets.beginning = target
        if packets.key_time is not None and packets.key_time <= base + math.ceil(media.start / tick):
            break
    return packets


def read_until(container, stream, stop: float) -> VideoPackets:
    """Reads packets up to the end, or up to the first that is decoded after the time stamp `stop`."""
    packets = VideoPackets(stores_pts(container, stream), stream.codec_context.has_b_frames)
    for packet in container.demux():
        packets.add(packet, stream)
        if packet.stream.index == stream.index and packet.dts is not None and packet.dts > stop:
            break
    return packets


def stores_pts(container, stream) -> bool:
    """False where FFmpeg guesses when frames are displayed: in avi, which stores decoding times only, with B-frames."""
    decoder = stream.codec_context
    return not (container.format.name == "avi" and (decoder.has_b_frames or decoder.name in ("h264", "hevc")))


def stamp_of(packet) -> int | None:
    """The time stamp that a demuxer seeks by."""
    return packet.dts if packet.dts is not None else packet.pts


def seek_before(container, stream, target: int) -> None:
    """Seeks to the last key frame that is not after a time stamp."""
    container.seek(target, stream=stream, backward=True)


def is_invisible(packet, stream) -> bool:
    """True for the reference frames of VP8 that are decoded and never displayed."""
    return stream.codec_context.name.startswith("vp8") and not (memoryview(packet)[0] >> 4) & 1


def believed_last_duration(stamps_N: np.ndarray, durations_N: np.ndarray) -> int:
    """The duration of the last packet, in ticks; 0 if those of the others are not the times to the next frames.

    Some containers give all packets the duration that follows from the header.
    """
    agree = np.abs(np.diff(stamps_N) - durations_N[:-1]) <= 1
    return int(durations_N[-1]) if len(agree) and agree.mean() > 0.5 else 0

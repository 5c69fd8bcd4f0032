"""Video and image files to frames, and frames to H.264 files.

    bytes --open_clip--> OpenClip: fps, and uint8 [H, W, 3] frames one after the other

A file is opened as what its name says it is (never by guessing: a text file can name other local files to a guessing
demuxer), through a window on its own bytes (no name ever reaches a demuxer, which could read it as a protocol), held to
limits before it is decoded, and refused when it gives fewer frames than it declares or a decoder had to make some up.
Frames come as they are shown: turned as the container or EXIF says, upright.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from megasora.config import IngestConfig
from megasora.errors import MegaSoraError

VIDEO_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".avi": "avi"}
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
CRF = "10"  # visually lossless; the renderer's clips and the samples are tiny
BUFFER = 1 << 18  # bytes that a demuxer reads at once
TICK = 5e-4  # seconds; a frame this close to the start of an excerpt is its first


class RejectedClip(MegaSoraError):
    """A clip that cannot be used: a short reason to count, a message that names the file, and the rejecting filter."""

    def __init__(self, reason: str, message: str, filter_name: str = "decode"):
        super().__init__(message)
        self.reason, self.filter_name = reason, filter_name


@dataclass(frozen=True)
class Media:
    """Where the bytes of a clip lie: a file, or a range of one (a member of a tar); of these, seconds [start, end)."""

    path: Path
    name: str = ""  # a member's name in its tar; its suffix says what it is
    offset: int = 0  # bytes
    size: int | None = None  # bytes; None: to the end of the file
    start: float = 0.0  # seconds
    end: float | None = None

    def __str__(self) -> str:
        part = f" from {self.start:g} s{f' to {self.end:g} s' if self.end is not None else ''}" if self.excerpt else ""
        return f"{self.path}{f': {self.name}' if self.name else ''}{part}"

    @property
    def suffix(self) -> str:
        return (os.path.splitext(self.name)[1] if self.name else self.path.suffix).lower()

    @property
    def excerpt(self) -> bool:
        return self.start > 0 or self.end is not None


@dataclass(frozen=True)
class Clip:
    frames_FHWC: np.ndarray  # uint8 [F, H, W, 3]
    fps: float  # 0 for an image


@dataclass(frozen=True)
class OpenClip:
    fps: float  # of the frames given; 0 for an image, and unknown where a video does not say
    frames: Iterator[np.ndarray]  # uint8 [H, W, 3], of one size; raises RejectedClip, at the latest behind the last
    seconds: list[float]  # when the frames given so far are shown, from the start of the file; NaN where it is not said


def is_clip(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_FORMATS or path.suffix.lower() in IMAGE_FORMATS


def read_clip(path: Path, limits: IngestConfig) -> Clip:
    """Every frame at once. Raises RejectedClip."""
    with open_clip(Media(path), limits) as clip:
        frames = list(clip.frames)
    return Clip(np.stack(frames), clip.fps if len(frames) > 1 else 0.0)


@contextmanager
def open_clip(media: Media, limits: IngestConfig) -> Iterator[OpenClip]:
    """A clip's frames at native size, or not larger than `limits.fit_height` x `fit_width` where these are set, and not
    more than `limits.max_fps` a second where that is. Raises RejectedClip."""
    with open(media.path, "rb", buffering=0) as file:
        window = Window(file, media.offset, media.size)
        if window.size == 0:
            raise RejectedClip("empty file", f"{media} has 0 bytes")
        if media.suffix in IMAGE_FORMATS:
            yield OpenClip(0.0, iter((read_image(window, media, limits),)), [0.0])
            return
        with open_video(window, media, limits) as clip:
            yield clip


class Window(io.RawIOBase):
    """A range of bytes of an open file, as a file."""

    def __init__(self, file: io.FileIO, offset: int, size: int | None):
        self.file, self.offset, self.place = file, offset, 0
        rest = max(0, os.fstat(file.fileno()).st_size - offset)
        self.size = rest if size is None else min(size, rest)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        if place < 0:
            raise ValueError(f"seek to byte {place}")
        self.place = place
        return place

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.size - self.place))
        count = os.preadv(self.file.fileno(), [view[:count]], self.offset + self.place) if count else 0
        self.place += count
        return count


def sha256(media: Media) -> str:
    """Of all bytes of the file or member."""
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with open(media.path, "rb", buffering=0) as file:
        window = Window(file, media.offset, media.size)
        while count := window.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def read_image(window: Window, media: Media, limits: IngestConfig) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(window, formats=[IMAGE_FORMATS[media.suffix]]) as image:
            check_size(media, image.height, image.width, 1, limits)
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Image.DecompressionBombError as error:
        raise RejectedClip("too large", f"{media}: {error}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise RejectedClip("unreadable", f"{media} is not a readable image: {error}") from None
    height, width = fitting_size(*pixels.shape[:2], limits)
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


@contextmanager
def refusing(media: Media) -> Iterator[None]:
    """What a decoder has to say about the bytes, as a reason to refuse them."""
    import av

    try:
        yield
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, av.error.MemoryError):
            raise MemoryError(str(error)) from None
        raise RejectedClip(
            "unreadable", f"{media} cannot be decoded: {getattr(error, 'strerror', None) or error}"
        ) from None


@contextmanager
def open_video(window: Window, media: Media, limits: IngestConfig) -> Iterator[OpenClip]:
    import av

    with refusing(media):
        container = av.open(window, format=VIDEO_FORMATS[media.suffix], buffer_size=BUFFER, metadata_errors="replace")
    with container:
        if not container.streams.video:
            raise RejectedClip("no video stream", f"{media} has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise RejectedClip("unknown codec", f"{media} has a video stream that no decoder here reads")
        check_size(media, stream.height, stream.width, 1 if media.excerpt else max(1, stream.frames), limits)
        stream.codec_context.thread_count = 1  # clips are decoded side by side, each on one core
        rate = float(stream.average_rate or 0)
        kept = limits.max_fps / rate if 0 < limits.max_fps < rate else 1.0
        seconds: list[float] = []
        frames = read_video(container, stream, media, limits, kept, seconds)
        yield OpenClip(limits.max_fps if kept < 1 else rate, frames, seconds)


def read_video(
    container, stream, media: Media, limits: IngestConfig, kept: float, seconds: list[float]
) -> Iterator[np.ndarray]:
    """Of frames 0, 1, 2 ..., frame n where `kept` * n passes a whole number; `seconds` grows with them."""
    import av

    received, passed, decoded, damaged, first = Received(), 0, 0, 0, None
    shown_size, turn, reformatter = None, None, av.video.reformatter.VideoReformatter()
    with refusing(media):
        if media.start:
            base = stream.start_time or 0
            container.seek(base + int(media.start / stream.time_base), stream=stream, backward=True)
        for frame in decode(container, stream, received):
            damaged = damaged or (frame.is_corrupt and decoded + 1)
            moment = moment_of(frame, stream)
            if media.excerpt:
                if math.isnan(moment):
                    raise RejectedClip("no time stamps", f"{media} has frames without time: no part can be taken of it")
                if moment < media.start - TICK:
                    passed += 1
                    continue
                if media.end is not None and moment >= media.end - TICK:
                    break
            check_size(media, frame.height, frame.width, decoded + 1, limits)
            first = first or (frame.height, frame.width)
            if (frame.height, frame.width) != first:
                raise RejectedClip("size changes", f"{media}: frame {decoded + 1} has another size than the first")
            if turn is None:
                turn = Turn.of(frame, media)
                shown_size = turn.before(*fitting_size(*turn.after(*first), limits))
            if decoded == 0 or int(decoded * kept) > int((decoded - 1) * kept):
                height, width = shown_size
                seconds.append(moment)
                scaling = {"interpolation": "AREA"} if shown_size != first else {}
                yield turn.apply(pixels_of(reformatter.reformat(frame, width, height, "rgb24", threads=1, **scaling)))
            decoded += 1
        if not decoded:
            raise RejectedClip("no frames", f"{media} holds no frame")
        missing = (
            missing_of_excerpt(media, received, decoded, stream)
            if media.end is not None
            else received.missing(passed + decoded, stream, (container.duration or 0) / av.time_base)
        )
    if missing:
        raise RejectedClip("truncated", f"{media} {missing}: the file is cut or damaged")
    if damaged:
        raise RejectedClip("damaged", f"{media}: frame {damaged} could not be decoded in full: the file is damaged")


def pixels_of(rgb) -> np.ndarray:
    """uint8 [H, W, 3]: the memory of an rgb24 frame, whose rows may have padding behind them."""
    (plane,) = rgb.planes
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: rgb.height, : 3 * rgb.width]
    return rows.reshape(rgb.height, rgb.width, 3)


def decode(container, stream, received: Received) -> Iterator:
    for packet in container.demux():
        received.count(packet, stream)
        if packet.is_corrupt:  # it ends with the file: what was decoded before is counted
            yield from stream.codec_context.decode(None)
            return
        if packet.stream_index == stream.index:
            yield from packet.decode()


def moment_of(frame, stream) -> float:
    """Seconds from the start of the stream; NaN where the container does not say."""
    stamp = frame.pts if frame.pts is not None else frame.dts
    return math.nan if stamp is None else float((stamp - (stream.start_time or 0)) * stream.time_base)


def missing_of_excerpt(media: Media, received: Received, frames: int, stream) -> str:
    if received.cut:
        return f"ends within a frame, {frames} could be decoded"
    rate = stream.average_rate or 1
    start = (stream.start_time or 0) * stream.time_base
    if received.video_end - start < media.end - 1.5 / rate:
        return f"ends at {float(received.video_end - start):.2f} s"
    whole = (media.end - media.start) * float(rate)
    return f"gave {frames} frames of about {whole:.0f}" if frames < 0.9 * whole - 2 else ""


@dataclass(frozen=True)
class Turn:
    """How a decoded frame is turned to be shown: across its diagonal first, then mirrored."""

    across: bool
    left_right: bool
    up_down: bool

    @classmethod
    def of(cls, frame, media: Media) -> Turn:
        """From the display matrix: a pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift."""
        data = frame.side_data.get("DISPLAYMATRIX")
        if data is None:
            return cls(False, False, False)
        a, b, _, c, d = np.frombuffer(bytes(data), "<i4")[:5]
        if a and d and not (b or c):
            return cls(False, bool(a < 0), bool(d < 0))
        if b and c and not (a or d):
            return cls(True, bool(c < 0), bool(b < 0))
        raise RejectedClip(
            "tilted", f"{media} is shown turned by {frame.rotation} degrees; only quarter turns are read"
        )

    def after(self, height: int, width: int) -> tuple[int, int]:
        return (width, height) if self.across else (height, width)

    before = after  # of a quarter turn and of none, the inverse does the same to a size

    def apply(self, pixels_HWC: np.ndarray) -> np.ndarray:
        x = pixels_HWC.swapaxes(0, 1) if self.across else pixels_HWC
        x = x[:, ::-1] if self.left_right else x
        return x[::-1] if self.up_down else x


@dataclass
class Received:
    """What came out of a container, to hold against what it declares: a decoder is silent about what is missing."""

    packets: int = 0  # of the video stream
    hidden: int = 0  # of these not to be shown: an edit list starts the clip between two key frames
    cut: bool = False  # the container ended within a packet
    video_end: Fraction = Fraction(0)  # seconds
    end: Fraction = Fraction(0)  # of any stream

    def count(self, packet, stream) -> None:
        if not packet.size:
            return
        self.cut = self.cut or packet.is_corrupt
        start = packet.pts if packet.pts is not None else packet.dts or 0
        stop = (start + (packet.duration or 0)) * (packet.time_base or 0)
        self.end = max(self.end, stop)
        if packet.stream_index == stream.index:
            self.packets += 1
            self.hidden += packet.is_discard
            self.video_end = max(self.video_end, stop)

    def missing(self, frames: int, stream, seconds: float) -> str:
        """What is missing, in words, or nothing.

        mp4 and avi declare frames; of these an edit list leaves out some, and the rest then reaches the declared end.
        matroska and fragmented mp4 only declare `seconds`.
        """
        declared, rate = stream.frames, stream.average_rate or 1
        if self.cut:
            return f"ends within a frame, {frames}{f' of {declared}' if declared else ''} could be decoded"
        if declared:
            length = (stream.duration or 0) * stream.time_base
            left_out = self.packets < declared and length and self.video_end >= length - 1 / (2 * rate)
            shown = frames if left_out else declared - self.hidden
            return f"declares {declared} frames, {frames} could be decoded" if frames < shown else ""
        if self.end < seconds - 2 / rate:
            return f"declares {seconds:.2f} seconds, {float(self.end):.2f} are there"
        return ""


def check_size(media: Media, height: int, width: int, frames: int, limits: IngestConfig) -> None:
    if height < 1 or width < 1:
        raise RejectedClip("unreadable", f"{media} declares {height}x{width} pixels")
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
    """The largest size of this aspect within the configured one; the size itself where none is, or it fits."""
    shrink = min(1.0, (limits.fit_height or height) / height, (limits.fit_width or width) / width)
    return (height, width) if shrink == 1 else (max(1, round(height * shrink)), max(1, round(width * shrink)))


def local(path: Path) -> str:
    """A path as FFmpeg must be given it: without this, `part 1: red.mp4` is a file of the protocol `part 1`."""
    return f"file:{path}"


def write_video(
    frames_FHWC: np.ndarray, fps: float, path: Path, comment: str = "", codec: str = "libx264", crf: str = CRF
) -> None:
    """uint8 [F, H, W, 3], even height and width, to an H.264 mp4 that browsers play; whole or not at all.

    The same frames give the same bytes: no dates and versions in the container, and x264 without mbtree, which reads
    past the edge of very small frames.
    """
    import av

    part = path.with_name(f".{path.name}.part")
    rgb = codec == "libx264rgb"
    try:
        with av.open(
            local(part), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
        ) as container:
            if comment:
                container.metadata["comment"] = comment
            rate = Fraction(fps).limit_denominator(1001)
            stream = container.add_stream(codec, rate=rate)
            stream.height, stream.width = frames_FHWC.shape[1:3]
            stream.pix_fmt = "rgb24" if rgb else "yuv420p"
            stream.options = {"preset": "veryfast", "mbtree": "0", **({"qp": "0"} if rgb else {"crf": crf})}
            stream.codec_context.thread_count = 1
            stream.codec_context.time_base = 1 / rate
            for number, pixels in enumerate(frames_FHWC):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts, frame.time_base = number, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_image(pixels_HWC: np.ndarray, path: Path, comment: str = "") -> None:
    """uint8 [H, W, 3] to PNG; whole or not at all."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    part = path.with_name(f".{path.name}.part")
    info = PngInfo()
    if comment:
        info.add_text("Comment", comment)
    try:
        Image.fromarray(pixels_HWC).save(part, format="PNG", pnginfo=info)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

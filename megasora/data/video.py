"""Video and image files to frames, and frames to H.264 files.

    bytes --open_clip--> OpenClip: fps, and an iterator over uint8 [H, W, 3] frames

A file is opened in the format of its suffix, never by guessing: a guessing demuxer would follow a text file to other
local files. Demuxers read from a byte range of an open file and never get its name, which they could take for a
protocol. Limits are checked before decoding. A file with fewer frames than it declares, or with frames that the decoder
had to conceal, is rejected. Frames are returned as they are displayed: rotated and mirrored as the container or EXIF
says.
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
from megasora.data.media_formats import IMAGE_FORMATS, VIDEO_FORMATS
from megasora.errors import MegaSoraError

CRF = "10"  # visually lossless; the files that are written here are small
BUFFER_BYTES = 1 << 18  # that a demuxer reads at once
TIME_TOLERANCE = 5e-4  # seconds; a frame this close to the start of an excerpt belongs to it


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

    fps: float  # of the frames returned; 0 for an image, and if a video does not declare it
    frames: Iterator[np.ndarray]  # uint8 [H, W, 3], of one size; raises RejectedClip, at the latest after the last
    timestamps: list[float]  # of the frames returned so far, seconds from the start of the file; NaN if not declared


def is_clip(path: Path) -> bool:
    """True if the suffix is that of a supported video or image format."""
    return path.suffix.lower() in VIDEO_FORMATS or path.suffix.lower() in IMAGE_FORMATS


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
    with open(media.path, "rb", buffering=0) as file:
        window = ByteWindow(file, media.offset, media.size)
        if window.size == 0:
            raise RejectedClip("empty file", f"{media} has 0 bytes")
        if media.suffix in IMAGE_FORMATS:
            yield OpenClip(0.0, iter((read_image(window, media, limits),)), [0.0])
            return
        with open_video(window, media, limits) as clip:
            yield clip


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
    with open(media.path, "rb", buffering=0) as file:
        window = ByteWindow(file, media.offset, media.size)
        while count := window.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def read_image(window: ByteWindow, media: Media, limits: IngestConfig) -> np.ndarray:
    """uint8 [H, W, 3]. Raises RejectedClip."""
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


@contextmanager
def open_video(window: ByteWindow, media: Media, limits: IngestConfig) -> Iterator[OpenClip]:
    """Opens the first video stream. Raises RejectedClip."""
    import av

    with reject_decoder_errors(media):
        format = VIDEO_FORMATS[media.suffix]
        container = av.open(window, format=format, buffer_size=BUFFER_BYTES, metadata_errors="replace")
    with container:
        if not container.streams.video:
            raise RejectedClip("no video stream", f"{media} has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise RejectedClip("unknown codec", f"{media} has a video stream that no decoder here reads")
        check_size(media, stream.height, stream.width, 1 if media.is_excerpt else max(1, stream.frames), limits)
        stream.codec_context.thread_count = 1  # clips are decoded in parallel, each on one core
        rate = float(stream.average_rate or 0)
        keep_ratio = limits.max_fps / rate if 0 < limits.max_fps < rate else 1.0
        timestamps: list[float] = []
        frames = read_video(container, stream, media, limits, keep_ratio, timestamps)
        yield OpenClip(limits.max_fps if keep_ratio < 1 else rate, frames, timestamps)


def read_video(
    container, stream, media: Media, limits: IngestConfig, keep_ratio: float, timestamps: list[float]
) -> Iterator[np.ndarray]:
    """Yields uint8 [H, W, 3] frames, the fraction `keep_ratio` of all, evenly spaced; appends to `timestamps`.

    Raises RejectedClip.
    """
    import av

    received, converter, skipped, decoded, damaged = ReceivedPackets(), FrameConverter(media, limits), 0, 0, 0
    with reject_decoder_errors(media):
        if media.start:
            base = stream.start_time or 0
            container.seek(base + int(media.start / stream.time_base), stream=stream, backward=True)
        for frame in decode(container, stream, received):
            damaged = damaged or (frame.is_corrupt and decoded + 1)
            timestamp = timestamp_of(frame, stream)
            if media.is_excerpt:
                if math.isnan(timestamp):
                    message = f"{media} has frames without time stamps, so it has no excerpts"
                    raise RejectedClip("no time stamps", message)
                if timestamp < media.start - TIME_TOLERANCE:
                    skipped += 1
                    continue
                if media.end is not None and timestamp >= media.end - TIME_TOLERANCE:
                    break
            converter.check(frame, decoded + 1)
            if decoded == 0 or int(decoded * keep_ratio) > int((decoded - 1) * keep_ratio):
                timestamps.append(timestamp)
                yield converter.convert(frame)
            decoded += 1
        if not decoded:
            raise RejectedClip("no frames", f"{media} has no frame")
        if media.end is not None:
            missing = missing_of_excerpt(media, received, decoded, stream)
        else:
            missing = received.missing(skipped + decoded, stream, (container.duration or 0) / av.time_base)
    if missing:
        raise RejectedClip("truncated", f"{media} {missing}: the file is cut or damaged")
    if damaged:
        raise RejectedClip("damaged", f"{media}: frame {damaged} could not be decoded in full: the file is damaged")


class FrameConverter:
    """Converts the decoded frames of a clip to upright uint8 [H, W, 3] arrays within the limits of size."""

    def __init__(self, media: Media, limits: IngestConfig):
        import av

        self.media, self.limits = media, limits
        self.reformatter = av.video.reformatter.VideoReformatter()
        self.coded_size: tuple[int, int] | None = None  # height and width of the first frame, as decoded
        self.output_size: tuple[int, int] | None = None  # the same after scaling
        self.orientation: Orientation | None = None

    def check(self, frame, number: int) -> None:
        """Raises RejectedClip if frame `number`, counted from 1, exceeds the limits or has another size."""
        size = frame.height, frame.width
        check_size(self.media, *size, number, self.limits)
        if self.orientation is None:
            self.coded_size, self.orientation = size, Orientation.of_frame(frame, self.media)
            display_size = fitting_size(*self.orientation.display_size(*size), self.limits)
            self.output_size = self.orientation.coded_size(*display_size)
        elif size != self.coded_size:
            raise RejectedClip("size changes", f"{self.media}: frame {number} has another size than the first")

    def convert(self, frame) -> np.ndarray:
        """uint8 [H, W, 3] of a frame that was checked."""
        height, width = self.output_size
        scaling = {"interpolation": "AREA"} if self.output_size != self.coded_size else {}
        rgb = self.reformatter.reformat(frame, width, height, "rgb24", threads=1, **scaling)
        return self.orientation.apply(pixels_of(rgb))


def pixels_of(rgb) -> np.ndarray:
    """uint8 [H, W, 3]: a view of an rgb24 frame, without the padding of its rows."""
    (plane,) = rgb.planes
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: rgb.height, : 3 * rgb.width]
    return rows.reshape(rgb.height, rgb.width, 3)


def decode(container, stream, received: ReceivedPackets) -> Iterator:
    """Yields the frames of a stream; counts all packets of the container in `received`."""
    for packet in container.demux():
        received.count(packet, stream)
        if packet.is_corrupt:  # it ends with the file: return the frames before it
            yield from stream.codec_context.decode(None)
            return
        if packet.stream_index == stream.index:
            yield from packet.decode()


def timestamp_of(frame, stream) -> float:
    """Seconds from the start of the stream; NaN if the container does not declare it."""
    stamp = frame.pts if frame.pts is not None else frame.dts
    return math.nan if stamp is None else float((stamp - (stream.start_time or 0)) * stream.time_base)


def missing_of_excerpt(media: Media, received: ReceivedPackets, frames: int, stream) -> str:
    """What is missing of an excerpt with an end, for the message; empty if nothing is."""
    if received.cut:
        return f"ends within a frame, {frames} could be decoded"
    rate = stream.average_rate or 1
    start = (stream.start_time or 0) * stream.time_base
    if received.video_end - start < media.end - 1.5 / rate:
        return f"ends at {float(received.video_end - start):.2f} s"
    expected = (media.end - media.start) * float(rate)
    return f"has {frames} frames of about {expected:.0f}" if frames < 0.9 * expected - 2 else ""


@dataclass(frozen=True)
class Orientation:
    """How a decoded frame is displayed: transposed first, then mirrored."""

    transposed: bool
    left_right: bool
    up_down: bool

    @classmethod
    def of_frame(cls, frame, media: Media) -> Orientation:
        """From the display matrix: pixel (x, y) is displayed at (a x + c y, b x + d y), up to a shift."""
        data = frame.side_data.get("DISPLAYMATRIX")
        if data is None:
            return cls(False, False, False)
        a, b, _, c, d = np.frombuffer(bytes(data), "<i4")[:5]
        if a and d and not (b or c):
            return cls(False, bool(a < 0), bool(d < 0))
        if b and c and not (a or d):
            return cls(True, bool(c < 0), bool(b < 0))
        raise RejectedClip(
            "tilted", f"{media} is displayed rotated by {frame.rotation} degrees; only quarter turns are supported"
        )

    def display_size(self, height: int, width: int) -> tuple[int, int]:
        return (width, height) if self.transposed else (height, width)

    coded_size = display_size  # the inverse, which is the same

    def apply(self, pixels_HWC: np.ndarray) -> np.ndarray:
        x = pixels_HWC.swapaxes(0, 1) if self.transposed else pixels_HWC
        x = x[:, ::-1] if self.left_right else x
        return x[::-1] if self.up_down else x


@dataclass
class ReceivedPackets:
    """Counts what a container yields, to compare it with what it declares: decoders do not report missing frames."""

    packets: int = 0  # of the video stream
    hidden: int = 0  # of these, not displayed: an edit list starts the clip between two key frames
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
        """What is missing, for the message; empty if nothing is.

        mp4 and avi declare the number of frames; an edit list hides some, then the others reach the declared end.
        matroska and fragmented mp4 declare only `seconds`.
        """
        declared, rate = stream.frames, stream.average_rate or 1
        if self.cut:
            return f"ends within a frame, {frames}{f' of {declared}' if declared else ''} could be decoded"
        if declared:
            length = (stream.duration or 0) * stream.time_base
            has_edit_list = self.packets < declared and length and self.video_end >= length - 1 / (2 * rate)
            displayed = frames if has_edit_list else declared - self.hidden
            return f"declares {declared} frames, {frames} could be decoded" if frames < displayed else ""
        if self.end < seconds - 2 / rate:
            return f"declares {seconds:.2f} seconds, has {float(self.end):.2f}"
        return ""


def check_size(media: Media, height: int, width: int, frames: int, limits: IngestConfig) -> None:
    """Raises RejectedClip if a clip exceeds the limits."""
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
    """The largest (height, width) of this aspect ratio within the configured one, and at most this size."""
    shrink = min(1.0, (limits.fit_height or height) / height, (limits.fit_width or width) / width)
    return (height, width) if shrink == 1 else (max(1, round(height * shrink)), max(1, round(width * shrink)))


def ffmpeg_url(path: Path) -> str:
    """A path for FFmpeg, which would take `part 1: red.mp4` for a file of the protocol `part 1`."""
    return f"file:{path}"


def write_video(
    frames_FHWC: np.ndarray, fps: float, path: Path, comment: str = "", codec: str = "libx264", crf: str = CRF
) -> None:
    """Writes uint8 [F, H, W, 3] frames of even height and width to an H.264 mp4 that browsers play, atomically.

    The same frames give the same bytes: the container has no dates and versions, and x264 runs without mbtree, which
    reads past the edge of very small frames.
    """
    import av

    temporary = path.with_name(f".{path.name}.part")
    rgb = codec == "libx264rgb"
    try:
        with av.open(
            ffmpeg_url(temporary), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
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
            for i, pixels in enumerate(frames_FHWC):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts, frame.time_base = i, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_image(pixels_HWC: np.ndarray, path: Path, comment: str = "") -> None:
    """Writes uint8 [H, W, 3] pixels to a PNG file, atomically."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    temporary = path.with_name(f".{path.name}.part")
    info = PngInfo()
    if comment:
        info.add_text("Comment", comment)
    try:
        Image.fromarray(pixels_HWC).save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

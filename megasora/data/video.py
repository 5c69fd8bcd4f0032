"""Video and image files to frames, and frames to H.264 files.

A file is opened as what its name says it is (never by guessing: a text file can name other local files to a guessing
demuxer), held to limits before it is decoded, and refused when it gives fewer frames than it declares.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from megasora.config import IngestConfig
from megasora.errors import MegaSoraError

VIDEO_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".avi": "avi"}
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
CRF = "10"  # visually lossless; the renderer's clips and the samples are tiny


class RejectedClip(MegaSoraError):
    """One clip that cannot be used: a short reason to count, and a message that names the file."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Clip:
    frames_FHWC: np.ndarray  # uint8 [F, H, W, 3]
    fps: float  # 0 for an image


def is_clip(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_FORMATS or path.suffix.lower() in IMAGE_FORMATS


def read_clip(path: Path, limits: IngestConfig) -> Clip:
    """Every frame at native size. Raises RejectedClip."""
    suffix = path.suffix.lower()
    if path.stat().st_size == 0:
        raise RejectedClip("empty file", f"{path} has 0 bytes")
    return read_image(path, limits) if suffix in IMAGE_FORMATS else read_video(path, limits)


def read_image(path: Path, limits: IngestConfig) -> Clip:
    from PIL import Image

    try:
        with Image.open(path, formats=[IMAGE_FORMATS[path.suffix.lower()]]) as image:
            check_size(path, image.height, image.width, 1, limits)
            return Clip(np.array(image.convert("RGB"))[None], 0.0)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RejectedClip("unreadable", f"{path} is not a readable image: {error}") from None


def read_video(path: Path, limits: IngestConfig) -> Clip:
    import av

    try:
        with av.open(local(path), format=VIDEO_FORMATS[path.suffix.lower()]) as container:
            if not container.streams.video:
                raise RejectedClip("no video stream", f"{path} has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise RejectedClip("unknown codec", f"{path} has a video stream that no decoder here reads")
            check_size(path, stream.height, stream.width, max(1, stream.frames), limits)
            stream.thread_type = "AUTO"
            frames, received = [], Received()
            for packet in container.demux():
                received.count(packet, stream)
                for frame in packet.decode() if packet.stream_index == stream.index else ():
                    check_size(path, frame.height, frame.width, len(frames) + 1, limits)
                    frames.append(frame.to_ndarray(format="rgb24"))
                    if frames[-1].shape != frames[0].shape:
                        raise RejectedClip(
                            "size changes", f"{path}: frame {len(frames)} has another size than the first"
                        )
            rate = stream.average_rate
            if not frames:
                raise RejectedClip("no frames", f"{path} holds no frame")
            missing = received.missing(len(frames), stream, (container.duration or 0) / av.time_base)
    except RejectedClip:
        raise
    except (av.error.FFmpegError, ValueError, MemoryError) as error:
        raise RejectedClip(
            "unreadable", f"{path} cannot be decoded: {getattr(error, 'strerror', None) or error}"
        ) from None
    if missing:
        raise RejectedClip("truncated", f"{path} {missing}: the file is cut or damaged")
    return Clip(np.stack(frames), float(rate) if rate and len(frames) > 1 else 0.0)


def local(path: Path) -> str:
    """A path as FFmpeg must be given it: without this, `part 1: red.mp4` is a file of the protocol `part 1`."""
    return f"file:{path}"


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


def check_size(path: Path, height: int, width: int, frames: int, limits: IngestConfig) -> None:
    if height < 1 or width < 1:
        raise RejectedClip("unreadable", f"{path} declares {height}x{width} pixels")
    if height > limits.max_height or width > limits.max_width:
        raise RejectedClip(
            "too large",
            f"{path} has {height}x{width} pixels; ingest.max_height={limits.max_height}, "
            f"ingest.max_width={limits.max_width}",
        )
    if frames > limits.max_frames:
        raise RejectedClip("too long", f"{path} has {frames} frames; ingest.max_frames={limits.max_frames}")
    mib = frames * height * width * 3 / 2**20
    if mib > limits.max_clip_mib:
        raise RejectedClip(
            "too large in memory", f"{path} decodes to {mib:.0f} MiB; ingest.max_clip_mib={limits.max_clip_mib}"
        )


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

"""Video files for tests of the reader: any codec, container, time stamps, colours and neighbouring streams.

`encode_video` writes with PyAV, which carries its encoders with it; no other program is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

AUDIO_RATE = 48_000


@dataclass(frozen=True)
class Encoding:
    """How `encode_video` encodes."""

    codec: str = "libx264"
    container: str = "mp4"
    pixels: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)  # of the encoder
    muxer_options: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)  # of the file
    stream_metadata: dict[str, str] = field(default_factory=dict)
    source_pixels: str = "rgb24"  # of the arrays that are given
    audio_codec: str = ""  # of a second stream; none without
    audio_first: bool = False  # in the order of streams
    colors: tuple[int, int, int, int] | None = None  # matrix, range, transfer, primaries as declared; converted as by
    matrix: str | None = None  # swscale's name of the matrix
    pixel_aspect: Fraction = Fraction(1)  # width by height
    tick: Fraction | None = None  # seconds per unit of `ticks`


def gradient(frames: int, height: int, width: int) -> np.ndarray:
    """Smooth, distinct uint8 frames: red increases to the right, green downwards, blue by 20 levels per frame."""
    y, x = np.mgrid[0:height, 0:width]
    layers = [[x * 200 // width, y * 200 // height, np.full_like(x, (20 + i * 20) % 256)] for i in range(frames)]
    return np.array(layers).transpose(0, 2, 3, 1).astype(np.uint8)


def encode_video(
    path: Path,
    frames: Sequence[np.ndarray],
    rate: Fraction | int = 12,
    how: Encoding = Encoding(),  # noqa: B008, frozen
    ticks: Sequence[int] | None = None,
) -> Path:
    """Writes frames [H, W, C], or planes [3, H, W], at a constant rate; or at `ticks`, with `rate` in the header."""
    import av

    with av.open(str(path), "w", format=how.container, options=how.muxer_options) as file:
        file.metadata.update(how.metadata)
        audio = file.add_stream(how.audio_codec, rate=AUDIO_RATE) if how.audio_codec and how.audio_first else None
        stream = file.add_stream(how.codec, rate=rate)
        if how.audio_codec and not how.audio_first:
            audio = file.add_stream(how.audio_codec, rate=AUDIO_RATE)
        stream.height, stream.width, stream.pix_fmt = *size_of(frames[0]), how.pixels
        stream.options = how.options
        stream.metadata.update(how.stream_metadata)
        tick = how.tick or 1 / Fraction(rate)
        encoder = stream.codec_context
        encoder.time_base, encoder.sample_aspect_ratio = tick, how.pixel_aspect
        if how.colors:
            encoder.colorspace, encoder.color_range, encoder.color_trc, encoder.color_primaries = how.colors
        seconds = float(len(frames) / Fraction(rate))
        if audio:
            audio.layout = "mono"
            for sound in silence(audio, seconds):
                file.mux(audio.encode(sound))
        for number, pixels in enumerate(frames):
            frame = frame_of(pixels, how.source_pixels)
            if how.matrix:
                full = how.colors[1] == 2
                frame = frame.reformat(
                    format=how.pixels, dst_colorspace=how.matrix, dst_color_range="JPEG" if full else "MPEG"
                )
            if how.colors:
                frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries = how.colors
            frame.pts, frame.time_base = number if ticks is None else ticks[number], tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if audio:
            file.mux(audio.encode(None))
    return path


def size_of(pixels: np.ndarray) -> tuple[int, int]:
    """Height and width of [H, W, C], or of the planes [3, H, W] of a format without subsampling."""
    return pixels.shape[:2] if pixels.shape[-1] in (3, 4) else pixels.shape[1:]


def frame_of(pixels: np.ndarray, pixel_format: str):
    """A frame of [H, W, C] in a packed format, or of [3, H, W] in a planar one."""
    import av

    if pixels.shape[-1] in (3, 4):
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=pixel_format)
    height, width = size_of(pixels)
    frame = av.VideoFrame(width, height, pixel_format)
    for plane, values in zip(frame.planes, pixels, strict=True):
        rows = np.zeros((height, plane.line_size // pixels.itemsize), pixels.dtype)
        rows[:, :width] = values
        plane.update(rows.tobytes())
    return frame


def silence(stream, seconds: float) -> Iterator:
    """Audio frames of 1024 samples for an encoder."""
    import av

    kind = stream.codec_context.format.name
    dtype = {"fltp": np.float32, "flt": np.float32, "s16": np.int16, "s16p": np.int16, "s32p": np.int32}[kind]
    for number in range(int(seconds * AUDIO_RATE) // 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype), format=kind, layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = AUDIO_RATE, number * 1024, Fraction(1, AUDIO_RATE)
        yield frame


def copy_packets(
    source: Path,
    target: Path,
    container: str,
    muxer_options: dict[str, str] | None = None,
    start: Fraction = Fraction(0),
) -> Path:
    """Copies the video stream without encoding, from the last key frame before `start` seconds on, which becomes 0."""
    import av

    with av.open(str(source)) as file, av.open(str(target), "w", format=container, options=muxer_options or {}) as copy:
        stream = file.streams.video[0]
        out = copy.add_stream_from_template(stream)
        shift = int(start / stream.time_base)
        packets = [packet for packet in file.demux(stream) if packet.size]
        keys = [number for number, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= shift]
        for packet in packets[keys[-1] if keys else 0 :]:
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, out
            copy.mux(packet)
    return target

"""Frames to H.264 files, and pixels to PNG files.

Videos declare how their colours are stored: BT.709 primaries and transfer, limited range, and the matrix that players
use for files that do not declare one, BT.709 from 720 rows or 1280 columns on and BT.601 below.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np

from megasora.data.frame_converter import is_hd

CRF = "10"  # visually lossless; the files that are written here are small
MIN_FPS, MAX_FPS = 0.1, 1000.0  # well within what the time base of an mp4 can represent
BT709, SMPTE170M, IDENTITY = 1, 6, 0  # ITU-T H.273; SMPTE170M is the matrix of BT.601
LIMITED_RANGE, FULL_RANGE = 1, 2  # of FFmpeg
COLORS = {"RGB": (None, IDENTITY), "HD": ("ITU709", BT709), "SD": ("ITU601", SMPTE170M)}  # (swscale's name, H.273)


def ffmpeg_url(path: Path) -> str:
    """A path for FFmpeg, which would take `part 1: red.mp4` for a file of the protocol `part 1`."""
    return f"file:{path}"


def write_video(
    frames_FHWC: np.ndarray, fps: float, path: Path, comment: str = "", codec: str = "libx264", crf: str = CRF
) -> None:
    """Writes uint8 [F, H, W, 3] frames to a file as `write_frames` does."""
    write_frames(frames_FHWC, frames_FHWC.shape[1:3], fps, path, comment, codec, crf)


def write_frames(
    frames: Iterable[np.ndarray],
    size: tuple[int, int],
    fps: float,
    path: Path,
    comment: str = "",
    codec: str = "libx264",
    crf: str = CRF,
) -> None:
    """Writes uint8 [H, W, 3] frames of even height and width to an H.264 mp4 that browsers play, atomically.

    `frames` are read one by one; `size`: their (height, width). The same frames give the same bytes: the container has
    no dates and versions, and x264 runs without mbtree, which reads past the edge of very small frames.
    """
    import av
    from av.video.reformatter import VideoReformatter

    temporary = path.with_name(f".{path.name}.part")
    rgb, reformatter = codec == "libx264rgb", VideoReformatter()
    matrix, tag = COLORS["RGB" if rgb else "HD" if is_hd(*size) else "SD"]
    try:
        with av.open(
            ffmpeg_url(temporary), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
        ) as container:
            if comment:
                container.metadata["comment"] = comment
            rate = Fraction(fps).limit_denominator(1001)
            stream = container.add_stream(codec, rate=rate)
            stream.height, stream.width = size
            stream.pix_fmt = "rgb24" if rgb else "yuv420p"
            stream.options = {"preset": "veryfast", "mbtree": "0", **({"qp": "0"} if rgb else {"crf": crf})}
            stream.codec_context.thread_count = 1
            stream.codec_context.time_base = 1 / rate
            declare_colors(stream.codec_context, tag, FULL_RANGE if rgb else LIMITED_RANGE)
            for i, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                if not rgb:
                    frame = reformatter.reformat(
                        frame, format="yuv420p", dst_colorspace=matrix, dst_color_range="MPEG", threads=1
                    )
                frame.pts, frame.time_base = i, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def declare_colors(encoder, matrix: int, color_range: int) -> None:
    """Sets what the file says about its colours: the matrix and range given, transfer and primaries of BT.709."""
    encoder.colorspace, encoder.color_range, encoder.color_trc, encoder.color_primaries = (
        matrix,
        color_range,
        BT709,
        BT709,
    )


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

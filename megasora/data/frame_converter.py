"""Decoded video frames to what a player shows: upright RGB arrays of square pixels, within the limits of size.

Colours: the matrix and range that the video declares. Without a declared matrix, frames of at least 720 rows or 1280
columns are BT.709, smaller ones BT.601. HDR and the primaries of BT.2020: `tone_map.py`. Transparency:
`compositing.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megasora.config import IngestConfig
from megasora.data.compositing import on_background
from megasora.data.media import Media, RejectedClip, check_size, fitting_size
from megasora.data.tone_map import ToneMap

UNSPECIFIED = 2  # colour matrix, in ITU-T H.273
MATRICES = (0, 1, UNSPECIFIED, 4, 5, 6, 7, 9)  # that FFmpeg's converter knows
HD_HEIGHT, HD_WIDTH = 720, 1280


class FrameConverter:
    """Converts the frames of a clip to upright uint8 [H, W, 3] arrays within the limits of size."""

    def __init__(self, media: Media, limits: IngestConfig, pixel_aspect: Fraction, is_opaque: bool = False):
        """`pixel_aspect`: width of a pixel by its height, as it is displayed; `is_opaque`: alpha is no transparency."""
        import av

        self.media, self.limits, self.pixel_aspect = media, limits, pixel_aspect
        self.reformatter = av.video.reformatter.VideoReformatter()
        self.coded_size: tuple[int, int] | None = None  # height and width of the first frame, as decoded
        self.output_size: tuple[int, int] | None = None  # the same, with square pixels, after scaling
        self.orientation: Orientation | None = None
        self.is_opaque, self.has_alpha = is_opaque, False
        self.tone_map: ToneMap | None = None
        self.matrix: str | None = None  # of the source, if it does not declare one

    def check(self, frame) -> None:
        """Raises RejectedClip if the first frame is none that can be converted, or another has another size."""
        if self.orientation is None:
            self.prepare(frame)
        elif (frame.height, frame.width) != self.coded_size:
            message = f"{self.media} changes from {'x'.join(map(str, self.coded_size))} to {frame.height}x{frame.width}"
            raise RejectedClip("size changes", f"{message} pixels")

    def prepare(self, frame) -> None:
        """Chooses the conversion from the first frame. Raises RejectedClip."""
        height, width = self.coded_size = frame.height, frame.width
        check_size(self.media, height, width, 1, self.limits)
        square = height, max(1, round(width * self.pixel_aspect))
        if square != self.coded_size:
            check_size(self.media, *square, 1, self.limits)
        self.orientation = Orientation.of_frame(frame, self.media)
        self.output_size = self.orientation.coded_size(
            *fitting_size(*self.orientation.display_size(*square), self.limits)
        )
        if frame.colorspace not in MATRICES:
            message = f"{self.media} has colour matrix {int(frame.colorspace)} of ITU-T H.273, which is not supported"
            raise RejectedClip("colour matrix", message)
        has_alpha = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
        self.has_alpha = has_alpha and not self.is_opaque
        if frame.colorspace == UNSPECIFIED and is_hd(height, width):
            self.matrix = "ITU709"
        if ToneMap.is_needed(frame.color_trc, frame.color_primaries):
            if self.has_alpha:
                raise RejectedClip("alpha", f"{self.media} is HDR video with transparency, which is not supported")
            self.tone_map = ToneMap(frame.color_trc, frame.color_primaries)

    def convert(self, frame) -> np.ndarray:
        """uint8 [H, W, 3] of a frame that was checked."""
        if self.tone_map:
            pixels = self.tone_map.convert(pixels_of(self.scaled(frame, "rgb48le")))
        elif self.has_alpha:
            pixels = self.composited(frame)
        else:
            pixels = pixels_of(self.scaled(frame, "rgb24"))
        return self.orientation.apply(pixels)

    def composited(self, frame) -> np.ndarray:
        """uint8 [H, W, 3] of a frame with transparency, scaled last so that hidden colours do not mix in."""
        import av

        rgba = self.reformatter.reformat(frame, format="rgba", src_colorspace=self.matrix, threads=1)
        shown = on_background(pixels_of(rgba))
        if self.output_size == self.coded_size:
            return shown
        return pixels_of(self.scaled(av.VideoFrame.from_ndarray(shown, format="rgb24"), "rgb24"))

    def scaled(self, frame, pixel_format: str):
        """The frame in the output size, as RGB."""
        (height, width), matrix = self.output_size, None if frame.format.is_rgb else self.matrix
        shrinks = height <= self.coded_size[0] and width <= self.coded_size[1]
        scaling = {"interpolation": "AREA" if shrinks else "BICUBIC"} if self.output_size != self.coded_size else {}
        return self.reformatter.reformat(
            frame, width, height, pixel_format, src_colorspace=matrix, threads=1, **scaling
        )


def is_hd(height: int, width: int) -> bool:
    """True if players take a video that does not declare a matrix for BT.709."""
    return height >= HD_HEIGHT or width >= HD_WIDTH


def pixels_of(frame) -> np.ndarray:
    """uint8 or uint16 [H, W, C]: a view of a frame of packed RGB or RGBA, without the padding of its rows."""
    (plane,) = frame.planes
    channels = len(frame.format.components)
    dtype = np.dtype("<u2" if frame.format.components[0].bits == 16 else np.uint8)
    rows = np.frombuffer(plane, dtype).reshape(-1, plane.line_size // dtype.itemsize)
    return rows[: frame.height, : channels * frame.width].reshape(frame.height, frame.width, channels)


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

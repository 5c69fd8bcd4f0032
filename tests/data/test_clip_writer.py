"""Written videos declare their colours, and hold what they declare."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from megasora.config import IngestConfig
from megasora.data.clip_reader import read_clip
from megasora.data.clip_writer import write_video

LUMA_WEIGHTS = {1: (0.2126, 0.0722), 6: (0.299, 0.114)}  # matrix of ITU-T H.273 -> of red and blue
COLORS = np.array([[16, 192, 64], [227, 49, 49], [20, 40, 220], [128, 128, 128], [250, 250, 250]])


def bars(height: int, width: int) -> np.ndarray:
    """Two uint8 frames of vertical bars."""
    row = COLORS[np.arange(width) * len(COLORS) // width]
    return np.broadcast_to(row, (2, height, width, 3)).astype(np.uint8)


def middles(width: int) -> np.ndarray:
    return (np.arange(len(COLORS)) * 2 + 1) * width // (2 * len(COLORS))


def stored_colors(path: Path) -> tuple[np.ndarray, tuple]:
    """The colours of the bars from the stored planes, by the declared matrix and range; and what is declared."""
    with av.open(str(path)) as file:
        frame = next(file.decode(video=0))
        declared = tuple(
            int(tag) for tag in (frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries)
        )
        assert frame.format.name == "yuv420p"
        planes = frame.to_ndarray().astype(float)
    height, width = frame.height, frame.width
    x = middles(width)
    chroma = planes[height:].reshape(2, height // 2, width // 2)[:, height // 4]
    y, u, v = planes[height // 2, x], chroma[0, x // 2], chroma[1, x // 2]
    kr, kb = LUMA_WEIGHTS[declared[0]]
    luma, cb, cr = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    red, blue = luma + (2 - 2 * kr) * cr, luma + (2 - 2 * kb) * cb
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return 255 * np.stack([red, green, blue], -1), declared


@pytest.mark.parametrize(
    ("size", "matrix"), [((64, 160), 6), ((718, 160), 6), ((720, 160), 1), ((32, 1280), 1), ((32, 1270), 6)]
)
def test_a_written_video_declares_its_colours_and_holds_them(size, matrix, tmp_path):
    write_video(bars(*size), 8, tmp_path / "a.mp4")
    colors, declared = stored_colors(tmp_path / "a.mp4")
    assert declared == (matrix, 1, 1, 1)  # limited range, BT.709 transfer and primaries
    assert np.abs(colors - COLORS).max() < 3
    read = read_clip(tmp_path / "a.mp4", IngestConfig()).frames_FHWC[0, size[0] // 2, middles(size[1])]
    assert np.abs(read.astype(int) - COLORS).max() <= 3


def test_a_lossless_video_declares_rgb(tmp_path):
    write_video(bars(64, 160), 8, tmp_path / "a.mp4", codec="libx264rgb")
    with av.open(str(tmp_path / "a.mp4")) as file:
        frame = next(file.decode(video=0))
    assert (frame.format.name, frame.colorspace, frame.color_trc, frame.color_primaries) == ("gbrp", 0, 1, 1)
    assert np.array_equal(read_clip(tmp_path / "a.mp4", IngestConfig()).frames_FHWC, bars(64, 160))

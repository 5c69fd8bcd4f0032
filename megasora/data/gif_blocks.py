"""GIF files: their blocks, and from them the pictures of their frames.

    bytes --read_gif--> GifFile: frames --picture--> uint8 [H, W, 4] of the area of a frame

Pillow and FFmpeg both draw some frames on each other otherwise than browsers do, which clear an area to transparency
and never to the background color of the file. So frames are decoded alone, by Pillow, and drawn by `compositing.py`.
Format: https://www.w3.org/Graphics/GIF/spec-gif89a.txt
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from megasora.data.compositing import Disposal, FrameArea
from megasora.data.media import ByteWindow

DISPOSALS = {2: Disposal.CLEAR, 3: Disposal.RESTORE}
EXTENSION, PICTURE, TRAILER = b"!", b",", b";"
GRAPHIC_CONTROL = b"\xf9"
GREY_PALETTE = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)  # of a file without palettes


@dataclass(frozen=True)
class GifFrame:
    """A frame: where it is drawn, its colors, and where its compressed pixels are."""

    area: FrameArea
    palette: np.ndarray  # uint8 [256, 3]
    transparent: int | None  # index of the palette
    interlaced: bool
    offset: int  # bytes
    size: int


@dataclass
class GifFile:
    """What a GIF file holds."""

    window: ByteWindow
    size: tuple[int, int]  # height and width
    frames: list[GifFrame] = field(default_factory=list)

    def picture(self, frame: GifFrame) -> np.ndarray:
        """uint8 [H, W, 4] of the area of a frame. Raises ValueError or OSError if it is damaged."""
        from PIL import Image

        self.window.seek(frame.offset)
        data = self.window.read(frame.size)
        height, width = frame.area.height, frame.area.width
        file = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)
        file += PICTURE + struct.pack("<HHHHB", 0, 0, width, height, 0x40 * frame.interlaced) + data + TRAILER
        with Image.open(io.BytesIO(file), formats=["GIF"]) as image:  # without a palette: pixels are indices
            indices_HW = np.asarray(image)
        alpha = np.full(256, 255, np.uint8)
        if frame.transparent is not None:
            alpha[frame.transparent] = 0
        return np.concatenate([frame.palette, alpha[:, None]], 1)[indices_HW]


def read_gif(window: ByteWindow) -> GifFile:
    """What a GIF file holds. Raises ValueError if it is damaged."""
    window.seek(0)
    reader = io.BufferedReader(window, 1 << 18)
    try:
        return read_blocks(window, reader)
    except (struct.error, IndexError):
        raise ValueError("it ends within a block") from None
    finally:
        reader.detach()


def read_blocks(window: ByteWindow, reader: io.BufferedReader) -> GifFile:
    width, height, flags, _, _ = struct.unpack("<HHBBB", reader.read(13)[6:])
    global_palette = read_palette(reader, flags) if flags & 0x80 else None
    file, control = GifFile(window, (height, width)), b""
    while (block := reader.read(1)) not in (TRAILER, b""):
        if block == EXTENSION:
            label, data = reader.read(1), skip_sub_blocks(reader)
            control = data if label == GRAPHIC_CONTROL else control
        elif block == PICTURE:
            file.frames.append(read_frame(file, reader, control, global_palette))
            control = b""
        elif block != b"\0":  # extra terminators are common
            raise ValueError(f"it has an unknown block {block.hex()} after {len(file.frames)} frames")
    if not file.frames:
        raise ValueError("it has no pixels")
    return file


def read_frame(file: GifFile, reader: io.BufferedReader, control: bytes, palette: np.ndarray | None) -> GifFrame:
    """Reads an image descriptor and skips its pixels. `control`: data of the graphic control extension before it."""
    x, y, width, height, flags = struct.unpack("<HHHHB", reader.read(9))
    if not file.frames and (y + height > file.size[0] or x + width > file.size[1]):
        file.size = max(file.size[0], y + height), max(file.size[1], x + width)
    palette = read_palette(reader, flags) if flags & 0x80 else palette
    offset = reader.tell()
    reader.read(1)  # bits of the first code
    try:
        skip_sub_blocks(reader)
        size = reader.tell() - offset
    except IndexError:  # the file ends here; the decoder knows if pixels are missing
        size = file.window.size - offset
    how, delay, transparent = struct.unpack("<BHB", control[:4]) if len(control) >= 4 else (0, 0, 0)
    area = FrameArea(height, width, y, x, Fraction(delay, 100), DISPOSALS.get(how >> 2 & 7, Disposal.KEEP))
    return GifFrame(
        area,
        GREY_PALETTE if palette is None else palette,
        transparent if how & 1 else None,
        bool(flags & 0x40),
        offset,
        size,
    )


def read_palette(reader: io.BufferedReader, flags: int) -> np.ndarray:
    """uint8 [256, 3]; colors that the file does not have are black."""
    data = reader.read(3 << (flags & 7) + 1)
    return np.frombuffer(data.ljust(768, b"\0")[:768], np.uint8).reshape(256, 3)


def skip_sub_blocks(reader: io.BufferedReader) -> bytes:
    """Skips to the end of the sub-blocks; the data of the first one. Raises IndexError at the end of the file."""
    first = reader.read(reader.read(1)[0])
    size = len(first)
    while size:
        size = reader.read(1)[0]
        reader.seek(size, io.SEEK_CUR)
    return first

"""PNG and APNG files: their chunks, and from them PNG files of one picture each.

    bytes --read_png--> PngFile: frames --picture--> a PNG file in memory, with the chunks that pixels depend on

Pillow does not compare the checksums of pixels, accepts a stream that ends early, and refuses files with much text.
Here text is skipped unread, and pixels are compared with their checksums and with the size of the picture. Frames of an
APNG are decoded alone, since Pillow draws them on each other wrongly, and drawn by `compositing.py`. Format:
https://www.w3.org/TR/png-3/
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass, field
from fractions import Fraction

from megasora.data.compositing import Disposal, FrameArea
from megasora.data.media import ByteWindow

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEPT = (b"PLTE", b"tRNS")  # chunks that Pillow needs beside the pixels
MAX_CHUNK_BYTES = 1 << 24  # of a chunk other than pixels that is read
PIECE = 1 << 16  # compressed bytes that are counted at once
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # color type -> samples of a pixel
# of interlaced pictures: distance of rows and columns, first row and column
PASSES = ((8, 8, 0, 0), (8, 8, 0, 4), (8, 4, 4, 0), (4, 4, 0, 2), (4, 2, 2, 0), (2, 2, 0, 1), (2, 1, 1, 0))
DISPOSALS = {0: Disposal.KEEP, 1: Disposal.CLEAR, 2: Disposal.RESTORE}  # of fcTL
HDR_TRANSFERS = (16, 18)  # of cICP: PQ, HLG


@dataclass
class PngFrame:
    """A picture of a PNG file, and where its compressed pixels are."""

    area: FrameArea
    chunks: list[tuple[int, int, bytes]] = field(default_factory=list)  # offset, size, what else the checksum covers


@dataclass
class PngFile:
    """What a PNG file holds."""

    window: ByteWindow
    header: bytes  # the data of IHDR
    kept: dict[bytes, bytes] = field(default_factory=dict)  # chunk type -> its data
    frames: list[PngFrame] = field(default_factory=list)  # of the animation, else the one picture
    icc_profile: bytes = b""
    exif_data: bytes = b""
    is_hdr: bool = False  # its pixels are PQ or HLG

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        width, height = struct.unpack(">II", self.header[:8])
        return height, width

    @property
    def bit_depth(self) -> int:
        return self.header[8]

    @property
    def exif(self):
        """Tag -> value, as of Pillow."""
        from PIL import Image

        tags = Image.Exif()
        tags.load(self.exif_data)
        return tags

    def picture(self, frame: PngFrame) -> io.BytesIO:
        """A PNG file of this frame alone. Raises ValueError if its pixels are damaged or incomplete."""
        header = struct.pack(">II", frame.area.width, frame.area.height) + self.header[8:]
        kept = b"".join(chunk(name, data) for name, data in self.kept.items())
        file, pixels = io.BytesIO(), PixelCounter(header)
        file.write(SIGNATURE + chunk(b"IHDR", header) + kept)
        for offset, size, prefix in frame.chunks:
            if pixels.complete:
                break
            data, checksum = read_at(self.window, offset, size), read_at(self.window, offset + size, 4)
            if len(checksum) == 4 and zlib.crc32(prefix + data) != int.from_bytes(checksum, "big"):
                raise ValueError("the checksum of its pixels is wrong")
            pixels.add(data)
            file.write(chunk(b"IDAT", data))
        if pixels.received < pixels.expected:
            raise ValueError(f"it ends after {pixels.received} of {pixels.expected} bytes of pixels")
        file.write(chunk(b"IEND", b""))
        file.seek(0)
        return file


class PixelCounter:
    """Counts the decompressed bytes of a picture, without keeping them."""

    def __init__(self, header: bytes):
        width, height, depth, color, _, _, interlaced = struct.unpack(">IIBBBBB", header)
        if color not in CHANNELS or depth not in (1, 2, 4, 8, 16):
            raise ValueError(f"its header declares color type {color} with {depth} bits")
        self.expected, self.received = 0, 0  # bytes
        for rows, columns, row, column in PASSES if interlaced else ((1, 1, 0, 0),):
            height_of_pass, width_of_pass = -(-(height - row) // rows), -(-(width - column) // columns)
            if height_of_pass > 0 and width_of_pass > 0:
                self.expected += height_of_pass * (1 + -(-width_of_pass * depth * CHANNELS[color] // 8))
        self.stream = zlib.decompressobj()

    @property
    def complete(self) -> bool:
        return self.received >= self.expected

    def add(self, data: bytes) -> None:
        """Raises ValueError if the compressed data are damaged."""
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            try:
                while piece and not self.complete:
                    self.received += len(self.stream.decompress(piece, 1 << 20))
                    piece = self.stream.unconsumed_tail
            except zlib.error as error:
                raise ValueError(f"its pixels cannot be decompressed: {error}") from None


def read_png(window: ByteWindow) -> PngFile:
    """What a PNG file holds. Raises ValueError if it cannot be read."""
    if read_at(window, 0, len(SIGNATURE)) != SIGNATURE:
        raise ValueError("it does not begin as a PNG file")
    file, declared_frames, animated_frames, still = None, 0, [], None
    for name, offset, size in chunks_of(window):
        if file is None:
            if name != b"IHDR" or size != 13:
                raise ValueError(f"its first chunk is {name!r} with {size} bytes")
            file = PngFile(window, read_chunk(window, name, offset, size))
        elif name == b"acTL" and still is None:
            declared_frames = int.from_bytes(read_chunk(window, name, offset, size)[:4], "big")
        elif name == b"fcTL" and declared_frames:
            animated_frames.append(PngFrame(frame_area(read_chunk(window, name, offset, size), file.size)))
        elif name == b"IDAT":
            if still is None:  # pixels of the first frame of an animation if its fcTL is before them
                still = animated_frames[0] if animated_frames else PngFrame(FrameArea(*file.size))
            still.chunks.append((offset, size, name))
        elif name == b"fdAT" and animated_frames and size > 4:
            animated_frames[-1].chunks.append((offset + 4, size - 4, name + read_at(window, offset, 4)))
        elif size <= MAX_CHUNK_BYTES and (still is None or name == b"eXIf"):
            keep(file, name, offset, size)
    if file is None or still is None:
        raise ValueError("it has no pixels")
    if file.header[9] == 3 and b"PLTE" not in file.kept:
        raise ValueError("it has no palette")
    if len(animated_frames) < declared_frames:
        raise ValueError(f"it declares {declared_frames} frames and has {len(animated_frames)}")
    file.frames = animated_frames[:declared_frames] or [still]
    return file


def chunks_of(window: ByteWindow):
    """Yields (type, offset, size) of the data of each chunk; the last one may end with the file."""
    position = window.position
    while len(start := read_at(window, position, 8)) == 8 and start[4:] != b"IEND" and start[4:].isalpha():
        size = int.from_bytes(start[:4], "big")
        available = window.size - position - 8
        yield start[4:], position + 8, min(size, available)
        position += size + 12


def keep(file: PngFile, name: bytes, offset: int, size: int) -> None:
    """Keeps the data of a chunk that says what the pixels mean; ignores optional ones that are damaged."""
    if name not in (*KEPT, b"eXIf", b"iCCP", b"cICP"):
        return
    try:
        data = read_chunk(file.window, name, offset, size)
        if name == b"iCCP":
            compressed = data[data.index(b"\0") + 2 :]
            file.icc_profile = zlib.decompressobj().decompress(compressed, MAX_CHUNK_BYTES)
        elif name == b"eXIf":
            file.exif_data = data
        elif name == b"cICP":
            file.is_hdr = len(data) == 4 and data[1] in HDR_TRANSFERS
        else:
            file.kept[name] = data
    except (ValueError, zlib.error):
        if name == b"PLTE":
            raise


def frame_area(control: bytes, size: tuple[int, int]) -> FrameArea:
    """The area and time of a frame, from the data of its fcTL."""
    _, width, height, x, y, numerator, denominator, disposal, blend = struct.unpack(">IIIIIHHBB", control)
    if not (0 < height <= size[0] - y and 0 < width <= size[1] - x):
        raise ValueError(f"a frame of {height}x{width} at row {y}, column {x} is not within its {size[0]}x{size[1]}")
    seconds = Fraction(numerator, denominator or 100)
    return FrameArea(height, width, y, x, seconds, DISPOSALS.get(disposal, Disposal.KEEP), blend == 1)


def read_chunk(window: ByteWindow, name: bytes, offset: int, size: int) -> bytes:
    """The data of a chunk. Raises ValueError if they differ from their checksum."""
    data, checksum = read_at(window, offset, size), read_at(window, offset + size, 4)
    if zlib.crc32(name + data) != int.from_bytes(checksum, "big") or len(checksum) < 4:
        raise ValueError(f"the checksum of its chunk {name.decode()} is wrong")
    return data


def read_at(window: ByteWindow, offset: int, size: int) -> bytes:
    """Up to `size` bytes from `offset`."""
    window.seek(offset)
    return window.read(size)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

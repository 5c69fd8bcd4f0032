"""Damage of JPEG and WebP files that Pillow does not report: neither format has checksums.

A decoder that reads a hole loses its place in the compressed data, so that pixels need more data than there are, or
fewer. libwebp notices the first. libjpeg would continue with zeros at the end marker, but without one it waits for more
data. The second is found by decoding the file without its last bytes: if that succeeds, they were not needed. FFmpeg's
JPEG decoder also rejects codes that do not exist.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction

MISSING_JPEG_BYTES = 16  # more than libjpeg reads ahead
UNNEEDED_JPEG_BYTES = 64  # more than cameras add after the last pixel
UNNEEDED_WEBP_BYTES = {b"VP8 ": 64, b"VP8L": 16}
END_OF_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)  # a marker other than a restart
CHECKED_FRAMES = (0xC0, 0xC1, 0xC2)  # Huffman-coded: sequential, extended, progressive
END_OF_IMAGE, START_OF_SCAN, COMMENT = 0xD9, 0xDA, 0xFE


def check_jpeg(data: bytes) -> None:
    """Raises ValueError if the first picture of a JPEG file is damaged."""
    picture, scans, coding = jpeg_without_metadata(data)
    if coding not in CHECKED_FRAMES or not scans:
        return
    check_with_ffmpeg(picture)
    if len(scans) > 1:
        return
    (start, end) = scans[0]
    if not decodes(picture[:end] + bytes(MISSING_JPEG_BYTES), "JPEG"):
        raise ValueError("its pixels need more data than it has")
    end = start + len(picture[start:end].rstrip(b"\0\xff")) - UNNEEDED_JPEG_BYTES
    if end > start and decodes(picture[:end], "JPEG"):
        raise ValueError("its pixels end before its data do")


def jpeg_without_metadata(data: bytes) -> tuple[bytes, list[tuple[int, int]], int]:
    """The first picture of a file as a JPEG file without comments and APP segments, the byte ranges of its scans, and
    the marker of its coding (0: none)."""
    kept, length, scans, coding, position = [b"\xff\xd8"], 2, [], 0, 2
    while position + 4 <= len(data):
        if data[position] != 0xFF or data[position + 1] in (0x00, 0xFF):  # fill bytes
            position += 1
            continue
        marker = data[position + 1]
        if marker == END_OF_IMAGE:
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == START_OF_SCAN:
            scan, match = end, END_OF_SCAN.search(data, end)
            end = match.start() if match else len(data)
            scans.append((length + scan - position, length + end - position))
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            coding = marker
        if not (0xE0 <= marker <= 0xEF or marker == COMMENT):
            kept.append(data[position:end])
            length += end - position
        position = end
    return b"".join([*kept, b"\xff\xd9"]), scans, coding


def check_with_ffmpeg(picture: bytes) -> None:
    """Raises ValueError if FFmpeg's JPEG decoder finds damage."""
    import av

    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.thread_count, decoder.options = 1, {"err_detect": "explode"}
    try:
        with suppress(av.error.PatchWelcomeError, av.error.EOFError):  # a kind of JPEG that it does not decode
            decoder.decode(av.Packet(picture))
            decoder.decode(None)
    except av.error.InvalidDataError:
        raise ValueError("its pixels cannot be decoded in full") from None


def check_webp(data: bytes) -> None:
    """Raises ValueError if a picture of a WebP file has data that it does not need."""
    for name, chunk in chunks_of_webp(data):
        unneeded = UNNEEDED_WEBP_BYTES.get(name, 0)
        if unneeded and len(chunk) > 2 * unneeded and decodes(webp_of(name, chunk[:-unneeded]), "WEBP"):
            raise ValueError("its pixels end before its data do")


def chunks_of_webp(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, data) of each chunk; those of the frames of an animation follow the ANMF of 16 bytes."""
    position = 12
    while position + 8 <= len(data):
        name, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        size = 16 if name == b"ANMF" else size
        yield name, data[position + 8 : position + 8 + size]
        position += 8 + size + size % 2


def webp_delays(data: bytes) -> list[Fraction]:
    """Seconds that each frame of an animation is shown."""
    return [
        Fraction(int.from_bytes(frame[12:15], "little"), 1000)
        for name, frame in chunks_of_webp(data)
        if name == b"ANMF"
    ]


def webp_of(name: bytes, chunk: bytes) -> bytes:
    """A WebP file of one chunk of pixels."""
    body = b"WEBP" + name + len(chunk).to_bytes(4, "little") + chunk + b"\0" * (len(chunk) % 2)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def decodes(data: bytes, format: str) -> bool:
    """True if Pillow decodes a file; at the smallest size where it can choose."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=[format]) as image:
            image.draft(None, (1, 1))
            image.load()
    except (OSError, ValueError, SyntaxError):
        return False
    return True

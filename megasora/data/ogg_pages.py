"""Damage of Ogg files, from the checksums of their pages: demuxers leave damaged pages out and say nothing."""

from __future__ import annotations

import zlib

from megasora.data.media import ByteWindow

HEADER_BYTES = 27  # followed by one byte per segment of the page, its size
FLAGS, SERIAL, CHECKSUM, SEGMENTS = 5, slice(14, 18), slice(22, 26), 26
FIRST_PAGE, LAST_PAGE = 2, 4  # flags: of a stream
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def ogg_damage(window: ByteWindow) -> str:
    """What is wrong with an Ogg file, for the message; empty if nothing is. Bytes after its last page are ignored."""
    open_streams, position = set(), 0
    window.seek(0)
    while position < window.size:
        header = window.read(HEADER_BYTES)
        if header[:4] != b"OggS":
            is_after_end = position and not open_streams
            return "" if is_after_end else f"has no page at byte {position}, where one should start"
        sizes = window.read(header[SEGMENTS]) if len(header) == HEADER_BYTES else b""
        body = window.read(sum(sizes))
        if len(header) < HEADER_BYTES or len(sizes) < header[SEGMENTS] or len(body) < sum(sizes):
            return f"ends within a page, which starts at byte {position}"
        page = header[: CHECKSUM.start] + bytes(4) + header[CHECKSUM.stop :] + sizes + body
        if checksum(page) != int.from_bytes(header[CHECKSUM], "little"):
            return f"has a page with a wrong checksum at byte {position}"
        if header[FLAGS] & FIRST_PAGE:
            open_streams.add(header[SERIAL])
        if header[FLAGS] & LAST_PAGE:
            open_streams.discard(header[SERIAL])
        position += len(page)
    return ""


def checksum(data: bytes) -> int:
    """The CRC-32 of Ogg: that of zlib with all bits in the other order and without its inversions."""
    crc = zlib.crc32(data.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)

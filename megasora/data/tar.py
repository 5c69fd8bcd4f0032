"""Tar archives, read strictly: members in order, or an error that names the file and the byte.

    file --read_members--> Member(name, offset, size) ... --group--> key -> extension -> (offset, size)

Why not `tarfile`: at a header that it cannot read, it takes the rest of the archive for the end, without a word, and so
do the loaders built on it. Here an archive ends with two zeroed blocks and nothing else behind them, and everything
before is whole members. A member is a file, its bytes are never interpreted, and its name is only a name: links,
devices, absolute names and `..` are refused, as is an extension that the caller does not ask for.

Names are those of ustar, of GNU (`L` headers) and of pax (`path` records). Sizes beyond 8 GiB are read as GNU and pax
write them.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Collection, Iterable, Iterator
from typing import BinaryIO, NamedTuple

from megasora.errors import DataError

BLOCK = 512
END = bytes(2 * BLOCK)  # of an archive
MOST_PADDING = 1 << 20  # bytes of zeros behind the end: a longer tail is a hole that swallowed members
LONGEST_HEADER = 1 << 20  # bytes of a long name or of pax records

FILES = (b"0", b"\0")
FOLDER, GNU_NAME, PAX, PAX_GLOBAL = b"5", b"L", b"x", b"g"
REFUSED = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device", b"6": "a fifo",
    b"7": "a contiguous file", b"K": "a link with a long name", b"S": "a sparse file", b"M": "a file in volumes",
}  # fmt: skip


class DamagedTar(DataError):
    """What is wrong in which tar, from which byte on, and which sample it hits where that is known."""

    def __init__(self, path: str, offset: int, what: str, sample_id: int | None = None):
        super().__init__(f"{path}: byte {offset}: {what}")
        self.path, self.offset, self.sample_id = path, offset, sample_id


class Member(NamedTuple):
    name: str  # folders are separated by /
    offset: int  # of its first byte in the archive
    size: int  # bytes


def write_header(name: str, size: int) -> bytes:
    """The header of a file, the same at any time and for any user. `name`: at most 100 bytes of UTF-8."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(size: int) -> int:
    """Bytes that a member of `size` bytes takes behind its header: whole blocks."""
    return -(-size // BLOCK) * BLOCK


def split_name(name: str) -> tuple[str, str] | None:
    """`folder/clip.part.mp4` -> (`folder/clip`, `part.mp4`): WebDataset's key, and the extension in lower case.

    None for a name without an extension or without anything before it.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def group(members: Iterable[Member]) -> dict[str, dict[str, tuple[int, int]]]:
    """key -> extension -> (offset, size), in the order of the archive."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for member in members:
        key, extension = split_name(member.name) or (member.name, "")
        found.setdefault(key, {})[extension] = (member.offset, member.size)
    return found


def read_members(
    file: BinaryIO, extensions: Collection[str], path: str | None = None, others: str = "refuse"
) -> Iterator[Member]:
    """Every file of an archive whose extension (`split_name`) is one of `extensions`.

    `file` can be sought; the caller may read from it between two members. `path` is for messages. `others`: what to do
    with files of another extension: `refuse` or `skip`. Raises DamagedTar; members that were yielded before are whole.
    """
    path = str(getattr(file, "name", "tar")) if path is None else path
    size = file.seek(0, 2)
    if size == 0:
        raise DamagedTar(path, 0, "the file is empty")
    names: set[tuple[str, str]] = set()
    keys: set[str] = set()
    last, at, pending, announced = None, 0, {}, 0
    while True:
        block = read_at(file, at, BLOCK, path, "no end of the archive: it was cut between two members")
        if block == bytes(BLOCK):
            if pending:
                raise DamagedTar(path, announced, "the archive ends where the file with this name should be")
            check_end(file, at, size, path)
            return
        kind, name, length = read_header(block, at, path)
        start = at + BLOCK
        if kind in (GNU_NAME, PAX, PAX_GLOBAL):
            if length > LONGEST_HEADER:
                raise DamagedTar(path, at, f"a name of {length} bytes; at most {LONGEST_HEADER} are read")
            data = read_at(file, start, padded(length), path, "the archive was cut within a name")[:length]
            if kind == GNU_NAME:
                pending["path"], announced = decode(data.removesuffix(b"\0"), at, path), at
            else:
                records = read_pax(data, at, path)
                if kind == PAX:
                    pending, announced = {**pending, **records}, at
                elif {"path", "size", "linkpath"} & records.keys():
                    raise DamagedTar(path, at, "one name or size for all members")
            at = start + padded(length)
            continue
        if "size" in pending:
            if not re.fullmatch(r"\d{1,19}", pending["size"], re.ASCII):
                raise DamagedTar(path, announced, f"a size of {pending['size']!r}")
            length = int(pending["size"])
        name = check_name(pending["path"] if "path" in pending else decode(name, at, path), at, path, kind)
        if kind == FOLDER and length:
            raise DamagedTar(path, at, f"the folder {name!r} has {length} bytes of content")
        if kind in REFUSED or kind not in (*FILES, FOLDER):
            raise DamagedTar(path, at, f"{name!r} is {REFUSED.get(kind, f'of type {kind!r}')}; only files are read")
        if start + padded(length) > size:
            raise DamagedTar(path, at, f"{name!r} has {length} bytes, {max(0, size - start)} are left of the archive")
        pending, at = {}, start + padded(length)
        if kind == FOLDER:
            continue
        pair = split_name(name)
        if pair is None or pair[1] not in extensions:
            if others == "refuse":
                allowed = ", ".join(sorted(extensions))
                raise DamagedTar(path, start - BLOCK, f"{name!r} is no file of the format; these are: {allowed}")
            continue
        if pair in names:
            raise DamagedTar(path, start - BLOCK, f"{name!r} is there twice")
        if pair[0] != last and pair[0] in keys:
            raise DamagedTar(path, start - BLOCK, f"{pair[0]!r} is there twice: its files do not lie together")
        names.add(pair)
        keys.add(pair[0])
        last = pair[0]
        yield Member(name, start, length)


def read_at(file: BinaryIO, offset: int, count: int, path: str, what: str) -> bytes:
    file.seek(offset)
    data = file.read(count)
    if len(data) < count:
        raise DamagedTar(path, offset, what if not data else f"the archive was cut: {len(data)} of {count} bytes")
    return data


def check_end(file: BinaryIO, at: int, size: int, path: str) -> None:
    """Nothing but zeros from `at` on, two blocks of them at least."""
    file.seek(at)
    here = at
    while chunk := file.read(1 << 20):
        if used := chunk.lstrip(b"\0"):
            found = here + len(chunk) - len(used)
            what = "zeros where a header should be" if found < at + len(END) else "the archive ends"
            raise DamagedTar(path, at, f"{what}, but there is more from byte {found} on: a hole, or another file")
        here += len(chunk)
    if size < at + len(END):
        raise DamagedTar(path, at, "half an end: the archive was cut")
    if size > at + MOST_PADDING:
        raise DamagedTar(path, at, f"zeros for {size - at} bytes, to the end of the file: a hole")


def read_header(block: bytes, at: int, path: str) -> tuple[bytes, bytes, int]:
    """Type, name and size that a header of 512 bytes declares. A long name may be cut here in mid-character."""
    declared = number(block[148:156])
    actual = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if declared != actual:
        if at == 0 and block[257:262] != b"ustar":
            raise DamagedTar(path, at, f"no tar: it begins with {block[:16]!r}")
        raise DamagedTar(path, at, "the checksum of the header is wrong")
    if block[257:262] != b"ustar":
        raise DamagedTar(path, at, "the header is not one of ustar, GNU or pax")
    size = number(block[124:136])
    if size is None:
        raise DamagedTar(path, at, f"a size of {block[124:136]!r}")
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""  # GNU keeps times there
    return block[156:157], prefix + b"/" + name if prefix else name, size


def number(field: bytes) -> int | None:
    """Octal digits, or GNU's binary form for what they cannot hold. None: neither, or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.rstrip(b" \0").lstrip(b" ")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None


def read_pax(data: bytes, at: int, path: str) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header, LENGTH counting itself."""
    records = {}
    while data:
        found = re.match(rb"(\d{1,7}) ", data)
        length = int(found[1]) if found else 0
        key, equal, value = data[found.end() if found else 0 : length - 1].partition(b"=")
        if not found or length > len(data) or data[length - 1 : length] != b"\n" or not equal:
            raise DamagedTar(path, at, "a pax header that cannot be read")
        if key.startswith(b"GNU.sparse"):
            raise DamagedTar(path, at, "a sparse file; only plain files are read")
        if key in (b"path", b"size", b"linkpath"):
            records[key.decode()] = decode(value, at, path)
        data = data[length:]
    return records


def decode(name: bytes, at: int, path: str) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise DamagedTar(path, at, f"the name {name!r} is not UTF-8") from None


def check_name(name: str, at: int, path: str, kind: bytes) -> str:
    """`name` without `.` parts. Refused: no name, absolute names, `..`, the character 0."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise DamagedTar(path, at, f"the name {name!r} leads out of the archive")
    if not parts and kind != FOLDER:
        raise DamagedTar(path, at, "a file without a name")
    return "/".join(parts)

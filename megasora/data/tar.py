"""Tar archives, read strictly: either all members in order, or an error with the file and the byte.

    file --read_members--> Member(name, offset, size) ... --group_by_key--> key -> extension -> (offset, size)

Python's `tarfile`, and the loaders built on it, silently take an unreadable header for the end of the archive. Here an
archive must consist of whole members, two zeroed blocks, and nothing but zeros after them. Members are files; their
content is never interpreted. Links, devices, absolute names and `..` are errors, as are extensions that the caller
does not expect.

Names may be in ustar, GNU (`L` headers) or pax (`path` records) format, and sizes beyond 8 GiB in GNU or pax format.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Collection, Iterable, Iterator
from typing import BinaryIO, NamedTuple

from megasora.errors import DataError

BLOCK_BYTES = 512
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)
MAX_TAIL_BYTES = 1 << 20  # zeros at the end of the file: a longer tail is a hole that overwrote members
MAX_NAME_BYTES = 1 << 20  # of a GNU long name, or of pax records

FILES = (b"0", b"\0")
FOLDER, GNU_NAME, PAX, PAX_GLOBAL = b"5", b"L", b"x", b"g"
SURROGATE = re.compile("[\ud800-\udfff]")  # in a name that is not UTF-8
EXTENDED = (GNU_NAME, PAX, PAX_GLOBAL)
UNSUPPORTED = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device", b"6": "a fifo",
    b"7": "a contiguous file", b"K": "a link with a long name", b"S": "a sparse file", b"M": "a file in volumes",
}  # fmt: skip


class DamagedTar(DataError):
    """Damage of a tar from byte `offset` on, and of which sample, if that is known."""

    def __init__(self, path: str, offset: int, problem: str, sample_id: int | None = None):
        super().__init__(f"{path}: byte {offset}: {problem}")
        self.path, self.offset, self.sample_id = path, offset, sample_id


class Member(NamedTuple):
    """A file in an archive."""

    name: str  # with / between folders
    offset: int  # of its first byte in the archive
    size: int  # bytes


def write_header(name: str, size: int) -> bytes:
    """The header of a file, without times and users. `name`: at most 100 bytes of UTF-8."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def padded_size(size: int) -> int:
    """The bytes that a file of `size` bytes takes in an archive, without its header: whole blocks."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def split_name(name: str) -> tuple[str, str] | None:
    """`folder/clip.part.mp4` -> (`folder/clip`, `part.mp4`): WebDataset's key, and the extension in lower case.

    None for a name without an extension or without anything before it.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def group_by_key(members: Iterable[Member]) -> dict[str, dict[str, tuple[int, int]]]:
    """key -> extension -> (offset, size), in the order of the archive."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for member in members:
        key, extension = split_name(member.name) or (member.name, "")
        groups.setdefault(key, {})[extension] = (member.offset, member.size)
    return groups


def read_members(file: BinaryIO, extensions: Collection[str], path: str | None = None) -> Iterator[Member]:
    """Yields every file of an archive of shards; files of one key (`split_name`) are adjacent.

    `file` must be seekable; the caller may read from it between two members. `path`: for messages. Raises DamagedTar,
    also for a file whose extension is not in `extensions`; the members yielded before are whole.
    """
    path = str(getattr(file, "name", "tar")) if path is None else path
    names: set[tuple[str, str]] = set()
    last_key, keys = None, set()
    for member in read_files(file, path):
        header_at, pair = member.offset - BLOCK_BYTES, split_name(member.name)
        if SURROGATE.search(member.name):
            raise DamagedTar(path, header_at, f"the name {member.name!r} is not UTF-8")
        if pair is None or pair[1] not in extensions:
            allowed = ", ".join(sorted(extensions))
            raise DamagedTar(path, header_at, f"{member.name!r} is no file of the format; these are: {allowed}")
        if pair in names:
            raise DamagedTar(path, header_at, f"{member.name!r} occurs twice")
        if pair[0] != last_key and pair[0] in keys:
            raise DamagedTar(path, header_at, f"{pair[0]!r} occurs twice: its files are not contiguous")
        names.add(pair)
        keys.add(pair[0])
        last_key = pair[0]
        yield member


def read_files(file: BinaryIO, path: str) -> Iterator[Member]:
    """Yields every file of an archive, without its folders. Raises DamagedTar.

    Bytes of names that are no UTF-8 become surrogates, as in file names of Python.
    """
    size = file.seek(0, 2)
    if size == 0:
        raise DamagedTar(path, 0, "the file is empty")
    at, fields, fields_at = 0, {}, 0  # fields: name and size from extended headers, for the next file
    while True:
        block = read_at(file, at, BLOCK_BYTES, path, "no end of the archive: it was cut between two members")
        if block == bytes(BLOCK_BYTES):
            if fields:
                raise DamagedTar(path, fields_at, "the archive ends where the file with this name should be")
            check_end(file, at, size, path)
            return
        kind, name, length = read_header(block, at, path)
        start = at + BLOCK_BYTES
        if kind in EXTENDED:
            new_fields = read_extended_header(file, kind, at, length, path)
            if new_fields:
                fields, fields_at = {**fields, **new_fields}, at
            at = start + padded_size(length)
            continue
        if "size" in fields:
            if not re.fullmatch(r"\d{1,19}", fields["size"], re.ASCII):
                raise DamagedTar(path, fields_at, f"a size of {fields['size']!r}")
            length = int(fields["size"])
        name = check_name(fields["path"] if "path" in fields else decode(name), at, path, kind)
        if kind == FOLDER and length:
            raise DamagedTar(path, at, f"the folder {name!r} has {length} bytes of content")
        if kind in UNSUPPORTED or kind not in (*FILES, FOLDER):
            raise DamagedTar(path, at, f"{name!r} is {UNSUPPORTED.get(kind, f'of type {kind!r}')}; only files are read")
        if start + padded_size(length) > size:
            remaining = max(0, size - start)
            raise DamagedTar(path, at, f"{name!r} has {length} bytes, {remaining} are left of the archive")
        fields, at = {}, start + padded_size(length)
        if kind != FOLDER:
            yield Member(name, start, length)


def read_extended_header(file: BinaryIO, kind: bytes, at: int, length: int, path: str) -> dict[str, str]:
    """The fields `path` and `size` that a GNU or pax header at byte `at` gives to the next file."""
    if length > MAX_NAME_BYTES:
        raise DamagedTar(path, at, f"a name of {length} bytes; at most {MAX_NAME_BYTES} are read")
    padded = read_at(file, at + BLOCK_BYTES, padded_size(length), path, "the archive was cut within a name")
    data = padded[:length]
    if kind == GNU_NAME:
        return {"path": decode(data.removesuffix(b"\0"))}
    records = read_pax(data, at, path)
    if kind == PAX:
        return records
    if {"path", "size", "linkpath"} & records.keys():
        raise DamagedTar(path, at, "one name or size for all members")
    return {}


def read_at(file: BinaryIO, offset: int, count: int, path: str, problem: str) -> bytes:
    """`count` bytes at `offset`. Raises DamagedTar: with `problem` if there are none, else with their number."""
    file.seek(offset)
    data = file.read(count)
    if len(data) < count:
        raise DamagedTar(path, offset, problem if not data else f"the archive was cut: {len(data)} of {count} bytes")
    return data


def check_end(file: BinaryIO, at: int, size: int, path: str) -> None:
    """Raises DamagedTar unless there are only zeros from `at` on, at least two blocks and not too many."""
    file.seek(at)
    offset = at
    while chunk := file.read(1 << 20):
        if rest := chunk.lstrip(b"\0"):
            nonzero = offset + len(chunk) - len(rest)
            problem = "zeros where a header should be" if nonzero < at + len(END_OF_ARCHIVE) else "the archive ends"
            raise DamagedTar(path, at, f"{problem}, but there is more from byte {nonzero} on: a hole, or another file")
        offset += len(chunk)
    if size < at + len(END_OF_ARCHIVE):
        raise DamagedTar(path, at, "half an end: the archive was cut")
    if size > at + MAX_TAIL_BYTES:
        raise DamagedTar(path, at, f"zeros for {size - at} bytes, to the end of the file: a hole")


def read_header(block: bytes, at: int, path: str) -> tuple[bytes, bytes, int]:
    """(type, name, size) declared by a header of 512 bytes. A long name may be cut within a character.

    Raises DamagedTar.
    """
    declared = parse_number(block[148:156])
    actual = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if declared != actual:
        if at == 0 and block[257:262] != b"ustar":
            raise DamagedTar(path, at, f"no tar: it begins with {block[:16]!r}")
        raise DamagedTar(path, at, "the checksum of the header is wrong")
    if block[257:262] != b"ustar":
        raise DamagedTar(path, at, "the header is not one of ustar, GNU or pax")
    size = parse_number(block[124:136])
    if size is None:
        raise DamagedTar(path, at, f"a size of {block[124:136]!r}")
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""  # GNU stores times there
    return block[156:157], prefix + b"/" + name if prefix else name, size


def parse_number(field: bytes) -> int | None:
    """A number field: octal digits, or GNU's binary format for larger numbers. None: neither, or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.rstrip(b" \0").lstrip(b" ")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None


def read_pax(data: bytes, at: int, path: str) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header; LENGTH includes itself."""
    records = {}
    while data:
        prefix = re.match(rb"(\d{1,7}) ", data)
        length = int(prefix[1]) if prefix else 0
        key, equal, value = data[prefix.end() if prefix else 0 : length - 1].partition(b"=")
        if not prefix or length > len(data) or data[length - 1 : length] != b"\n" or not equal:
            raise DamagedTar(path, at, "a pax header that cannot be read")
        if key.startswith(b"GNU.sparse"):
            raise DamagedTar(path, at, "a sparse file; only plain files are read")
        if key in (b"path", b"size", b"linkpath"):
            records[key.decode()] = decode(value)
        data = data[length:]
    return records


def decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def check_name(name: str, at: int, path: str, kind: bytes) -> str:
    """`name` without `.` components. Raises DamagedTar for no name, absolute names, `..`, and NUL."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise DamagedTar(path, at, f"the name {name!r} leads out of the archive")
    if not parts and kind != FOLDER:
        raise DamagedTar(path, at, "a file without a name")
    return "/".join(parts)

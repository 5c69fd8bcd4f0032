"""Folders of shards: local, or opened by fsspec. Both list file sizes and read byte ranges.

    open_folder("data/shards")        LocalFolder: preadv
    open_folder("s3://bucket/shards") RemoteFolder: one ranged request per read

A folder is defined by its address, so it can be pickled. An address is never a command: urls of a single file system
are accepted, `pipe:` and chained urls (`a::b`) are errors. While a read waits for the disk or the server, the folder
releases its `reader_lock`, if the reading thread holds it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from megasora.data.reader_lock import ReaderLock
from megasora.errors import MegaSoraError

MAX_OPEN_FILES = 128  # per folder


def open_folder(
    address: str | Path | LocalFolder | RemoteFolder, reader_lock: ReaderLock | None = None
) -> LocalFolder | RemoteFolder:
    """A folder by its path or url; a folder that is open already is returned as it is. Raises MegaSoraError.

    `reader_lock`: the lock that reader threads hold, to be released while a read waits.
    """
    if isinstance(address, (LocalFolder, RemoteFolder)):
        return address
    text = str(address)
    if text.startswith("pipe:") or "::" in text:
        raise MegaSoraError(
            f"{text}: pipes and chained urls are not read; give a folder or a url such as s3://bucket/x"
        )
    is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text)
    return RemoteFolder(text, reader_lock) if is_url else LocalFolder(Path(text), reader_lock)


class Descriptor:
    """A file descriptor, closed when it is no longer referenced."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class LocalFolder:
    """A folder of a file system that is mounted here."""

    def __init__(self, path: Path, reader_lock: ReaderLock | None = None):
        self.path, self.reader_lock = path, reader_lock or ReaderLock()
        self.descriptor = lru_cache(MAX_OPEN_FILES)(lambda name: Descriptor(path / name))

    def __reduce__(self):
        return LocalFolder, (self.path,)

    def __str__(self) -> str:
        return str(self.path)

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file in the folder; empty if there is no such folder."""
        if not self.path.is_dir():
            return {}
        with os.scandir(self.path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fills byte buffers one after the other from byte `offset` of a file on.

        Returns the number of bytes read, which is less than the size of the buffers only at the end of the file. Bytes
        in the page cache are read at once; for the others, the reader lock is released.
        """
        descriptor = self.descriptor(name)
        done = read_cached(descriptor, offset, buffers)
        buffers = remaining_buffers(buffers, done)
        if buffers:
            with self.reader_lock.released():
                while buffers and (count := os.preadv(descriptor.fd, buffers, offset + done)):  # at most 2 GiB per call
                    done += count
                    buffers = remaining_buffers(buffers, count)
        return done

    def read_whole(self, names: list[str]) -> list[bytes]:
        """The contents of several files."""
        return [(self.path / name).read_bytes() for name in names]

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb")


def read_cached(descriptor: Descriptor, offset: int, buffers: Sequence[memoryview]) -> int:
    """Reads without waiting for the disk. Returns the bytes read; 0 if the file system does not support it."""
    try:
        return os.preadv(descriptor.fd, buffers, offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS):
            return 0
        raise


def remaining_buffers(buffers: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """`buffers` without their first `count` bytes."""
    for i, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[i + 1 :]]
        count -= len(buffer)
    return []


class RemoteFolder:
    """A folder of a file system that fsspec opens, such as an object store. Same methods as LocalFolder."""

    def __init__(self, url: str, reader_lock: ReaderLock | None = None):
        import fsspec

        self.url, self.reader_lock = url.rstrip("/"), reader_lock or ReaderLock()
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise MegaSoraError(f"{url} cannot be opened: {error}") from None

    def __reduce__(self):
        return RemoteFolder, (self.url,)

    def __str__(self) -> str:
        return self.url

    def sizes(self) -> dict[str, int]:
        try:
            listing: list[dict[str, Any]] = self.system.ls(self.root, detail=True)
        except FileNotFoundError:
            return {}
        sizes = {item["name"]: item["size"] for item in listing if item["type"] == "file"}
        unknown = [path for path, size in sizes.items() if size is None]  # listings over http have no sizes
        sizes |= zip(unknown, self.system.sizes(unknown), strict=True)
        return {path.rpartition("/")[2]: size for path, size in sizes.items()}

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> int:
        end = offset + sum(len(buffer) for buffer in buffers)
        with self.reader_lock.released():
            data, done = memoryview(self.system.cat_file(f"{self.root}/{name}", start=offset, end=end)), 0
        for buffer in buffers:
            part = data[done : done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done

    def read_whole(self, names: list[str]) -> list[bytes]:
        """The contents of several files, in one batch: such systems have a high latency but serve many at once."""
        return self.system.cat_ranges([f"{self.root}/{name}" for name in names], 0, None, on_error="raise")

    def open(self, name: str) -> BinaryIO:
        return self.system.open(f"{self.root}/{name}", "rb")

"""Folders of shards: local, or opened by fsspec. Both list file sizes and read byte ranges.

    open_folder("data/shards")        LocalFolder: preadv
    open_folder("https://host/shards") HttpFolder (http_folder.py): one ranged request per read
    open_folder("s3://bucket/shards") RemoteFolder: the same through fsspec

A folder is defined by its address, so it can be pickled. An address is never a command: urls of a single file system
are accepted, `pipe:` and chained urls (`a::b`) are errors. While a read waits for the disk or the server, the folder
releases its `reader_lock`, if the reading thread holds it.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from megasora.data.http_folder import HttpFolder
from megasora.data.reader_lock import ReaderLock
from megasora.errors import MegaSoraError
from megasora.files import open_regular

MAX_OPEN_FILES = 128  # per folder


def open_folder(address: str | Path | Folder, reader_lock: ReaderLock | None = None) -> Folder:
    """A folder by its path or url; a folder that is open already is returned as it is. Raises MegaSoraError.

    `reader_lock`: the lock that reader threads hold, to be released while a read waits.
    """
    if isinstance(address, (LocalFolder, RemoteFolder, HttpFolder)):
        return address
    text = str(address)
    if text.startswith("pipe:") or "::" in text:
        raise MegaSoraError(
            f"{text}: pipes and chained urls are not read; give a folder or a url such as s3://bucket/x"
        )
    is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text)
    if is_url and text.lower().startswith(("http://", "https://")):
        return HttpFolder(text, reader_lock)
    return RemoteFolder(text, reader_lock) if is_url else LocalFolder(Path(text), reader_lock)


class OpenFile:
    """An open regular file, closed when it is no longer referenced."""

    def __init__(self, path: Path):
        self.file = open_regular(path)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


class LocalFolder:
    """A folder of a file system that is mounted here."""

    def __init__(self, path: Path, reader_lock: ReaderLock | None = None):
        self.path, self.reader_lock = path, reader_lock or ReaderLock()
        self.open_file = lru_cache(MAX_OPEN_FILES)(lambda name: OpenFile(path / name))

    def __reduce__(self):
        return LocalFolder, (self.path,)

    def __str__(self) -> str:
        return str(self.path)

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """Name -> bytes of those of the files that exist and are regular files."""
        if not self.path.is_dir():
            return {}
        wanted = set(names)
        with os.scandir(self.path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.name in wanted and entry.is_file()}

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fills byte buffers one after the other from byte `offset` of a file on.

        Returns the number of bytes read, which is less than the size of the buffers only at the end of the file. Bytes
        in the page cache are read at once; for the others, the reader lock is released.
        """
        try:
            return self.read_open(name, offset, buffers)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        self.open_file.cache_clear()  # the server has replaced the file since it was opened
        return self.read_open(name, offset, buffers)

    def read_open(self, name: str, offset: int, buffers: Sequence[memoryview]) -> int:
        """`read_into` of the file that is open under this name."""
        opened = self.open_file(name)
        done = read_cached(opened.file, offset, buffers)
        buffers = remaining_buffers(buffers, done)
        if buffers:
            with self.reader_lock.released():
                while buffers and (
                    count := os.preadv(opened.file.fileno(), buffers, offset + done)
                ):  # at most 2 GiB per call
                    done += count
                    buffers = remaining_buffers(buffers, count)
        return done

    def read_whole(self, names: list[str]) -> list[bytes]:
        """The contents of several files."""
        contents = []
        for name in names:
            with open_regular(self.path / name) as file:
                contents.append(file.readall())
        return contents

    def open(self, name: str) -> BinaryIO:
        return io.BufferedReader(open_regular(self.path / name))


def read_cached(file: BinaryIO, offset: int, buffers: Sequence[memoryview]) -> int:
    """Reads without waiting for the disk. Returns the bytes read; 0 if the file system does not support it."""
    try:
        return os.preadv(file.fileno(), buffers, offset, os.RWF_NOWAIT)
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

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """Name -> bytes of those of the files that exist."""
        try:
            listing: list[dict[str, Any]] = self.system.ls(self.root, detail=True)
        except FileNotFoundError:
            return {}
        sizes = {item["name"].rpartition("/")[2]: item["size"] for item in listing if item["type"] == "file"}
        return {name: sizes[name] for name in names if name in sizes}

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


Folder = LocalFolder | RemoteFolder | HttpFolder

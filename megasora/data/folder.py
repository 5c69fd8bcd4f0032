"""Where shards lie: a local folder, or one that fsspec opens. Both list sizes and read ranges of bytes.

    open_folder("data/shards")        LocalFolder: preadv
    open_folder("s3://bucket/shards") RemoteFolder: a ranged request each

A folder is opened by its address alone, so it can be sent to another process. An address is never a command: of urls,
those that name one file system are taken, no `pipe:` and no chains (`a::b`).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from megasora.errors import MegaSoraError

OPEN_FILES = 128  # descriptors kept
READY = nullcontext()  # for who may wait


def open_folder(address: str | Path | LocalFolder | RemoteFolder) -> LocalFolder | RemoteFolder:
    if isinstance(address, (LocalFolder, RemoteFolder)):
        return address
    text = str(address)
    if text.startswith("pipe:") or "::" in text:
        raise MegaSoraError(
            f"{text}: pipes and chained urls are not read; give a folder or a url such as s3://bucket/x"
        )
    return RemoteFolder(text) if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) else LocalFolder(Path(text))


class Descriptor:
    """A file descriptor, closed when the last reader lets go of it."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class LocalFolder:
    def __init__(self, path: Path):
        self.path = path
        self.opened = lru_cache(OPEN_FILES)(lambda name: Descriptor(path / name))

    def __reduce__(self):
        return LocalFolder, (self.path,)

    def __str__(self) -> str:
        return str(self.path)

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file in the folder; empty where there is no folder."""
        if not self.path.is_dir():
            return {}
        with os.scandir(self.path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def read_into(
        self, name: str, offset: int, pieces: Sequence[memoryview], waiting: AbstractContextManager = READY
    ) -> int:
        """Fills `pieces`, of bytes, one after the other from byte `offset` of a file on.

        Gives how many bytes there were: fewer than asked for where the file ends before. What is not in the page cache
        is waited for inside of `waiting`.
        """
        descriptor = self.opened(name)
        done = read_cached(descriptor, offset, pieces)
        pieces = unfilled(pieces, done)
        if pieces:
            with waiting:
                while pieces and (got := os.preadv(descriptor.number, pieces, offset + done)):  # at most 2 GiB at once
                    done += got
                    pieces = unfilled(pieces, got)
        return done

    def read_whole(self, names: list[str]) -> list[bytes]:
        return [(self.path / name).read_bytes() for name in names]

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb")


def read_cached(descriptor: Descriptor, offset: int, pieces: Sequence[memoryview]) -> int:
    """Fills what it can without waiting for the disk, and gives how many bytes; 0 where the file system cannot tell."""
    try:
        return os.preadv(descriptor.number, pieces, offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS):
            return 0
        raise


def unfilled(pieces: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """What of `pieces` lies behind their first `count` bytes."""
    for number, piece in enumerate(pieces):
        if count < len(piece):
            return [piece[count:], *pieces[number + 1 :]]
        count -= len(piece)
    return []


class RemoteFolder:
    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
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
            listed: list[dict[str, Any]] = self.system.ls(self.root, detail=True)
        except FileNotFoundError:
            return {}
        found = {item["name"]: item["size"] for item in listed if item["type"] == "file"}
        unknown = [path for path, size in found.items() if size is None]  # listings of http give no sizes
        found |= zip(unknown, self.system.sizes(unknown), strict=True)
        return {path.rpartition("/")[2]: size for path, size in found.items()}

    def read_into(
        self, name: str, offset: int, pieces: Sequence[memoryview], waiting: AbstractContextManager = READY
    ) -> int:
        end = offset + sum(len(piece) for piece in pieces)
        with waiting:
            data, done = memoryview(self.system.cat_file(f"{self.root}/{name}", start=offset, end=end)), 0
        for piece in pieces:
            found = data[done : done + len(piece)]
            piece[: len(found)] = found
            done += len(found)
        return done

    def read_whole(self, names: list[str]) -> list[bytes]:
        """Together: such systems answer slowly, but many at once."""
        return self.system.cat_ranges([f"{self.root}/{name}" for name in names], 0, None, on_error="raise")

    def open(self, name: str) -> BinaryIO:
        return self.system.open(f"{self.root}/{name}", "rb")

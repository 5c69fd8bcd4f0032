"""Where shards lie: a local folder, or one that fsspec opens. Both list sizes and read ranges of bytes.

    open_folder("data/shards")        LocalFolder: pread
    open_folder("s3://bucket/shards") RemoteFolder: a ranged request each

A folder is opened by its address alone, so it can be sent to another process. An address is never a command: of urls,
those that name one file system are taken, no `pipe:` and no chains (`a::b`).
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from megasora.errors import MegaSoraError

OPEN_FILES = 128  # descriptors kept


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

    def read(self, name: str, offset: int, size: int) -> bytearray:
        """Bytes [offset, offset + size) of a file; fewer where it ends before."""
        data, done = bytearray(size), 0
        descriptor, view = self.opened(name), memoryview(data)
        while done < size:
            got = os.preadv(descriptor.number, [view[done:]], offset + done)  # at most 2 GiB at once
            if got == 0:
                break
            done += got
        view.release()
        del data[done:]
        return data

    def read_whole(self, names: list[str]) -> list[bytes]:
        return [(self.path / name).read_bytes() for name in names]

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb")


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
        return {item["name"].rpartition("/")[2]: item["size"] for item in listed if item["type"] == "file"}

    def read(self, name: str, offset: int, size: int) -> bytearray:
        return bytearray(self.system.cat_file(f"{self.root}/{name}", start=offset, end=offset + size))

    def read_whole(self, names: list[str]) -> list[bytes]:
        """Together: such systems answer slowly, but many at once."""
        return self.system.cat_ranges([f"{self.root}/{name}" for name in names], 0, None, on_error="raise")

    def open(self, name: str) -> BinaryIO:
        return self.system.open(f"{self.root}/{name}", "rb")

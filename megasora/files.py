"""Whole files: written atomically, to a temporary name, flushed to the disk, then renamed; read without waiting."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megasora.errors import MegaSoraError


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A file opened for writing that replaces `path` atomically on exit; after an exception `path` is unchanged."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with errors_naming(path, temporary):
            with open(temporary, "wb") as file:
                yield file
            sync(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def errors_naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """An OSError raised within, which of a full disk names no file, or that names `temporary`, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, temporary, str(temporary)):
            error.filename = str(path)
        raise


def write_text_atomic(path: Path, text: str) -> None:
    """Replaces a text file atomically; UTF-8."""
    with atomic_writer(path) as file:
        file.write(text.encode("utf-8"))


def check_folder(folder: Path, what: str) -> None:
    """Raises MegaSoraError unless this user may write into `folder`, or make it; makes nothing.

    `what`: the setting in the message, e.g. run.dir=a/b.
    """
    for place in (folder, *folder.absolute().parents):
        try:
            os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise MegaSoraError(f"{what}: {error.strerror}; choose another folder") from None
        if not place.is_dir():
            raise MegaSoraError(f"{what}: {place} is not a folder; choose another one")
        if not os.access(place, os.W_OK | os.X_OK):
            raise MegaSoraError(f"{what}: this user may not write into {place}; choose another folder")
        return


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading, unbuffered, without waiting for the writer of a FIFO and without reading a
    device.

    Raises OSError with the path, also where it is a folder, a FIFO, a socket or a device.
    """
    if stat.S_ISREG(os.stat(path).st_mode):  # to open a device may act on it
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(handle).st_mode):  # it may have been replaced since
            return os.fdopen(handle, "rb", buffering=0)
        os.close(handle)
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_regular_file(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file. Raises OSError with the path, also where it has more than `limit` bytes."""
    with io.BufferedReader(open_regular(path)) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return data

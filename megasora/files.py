"""Files that are there whole or not at all: written beside their name, flushed to the disk, then renamed; and locks,
that one process at a time may write."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from megasora.errors import MegaSoraError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which gets its name at the end, in place of an older one; a failure leaves nothing."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
        sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """A text file in one step."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Holds the file `path`, which is gone afterwards, as is its folder where nothing else is in it.

    The system lets go of it when this process ends (and its forks: spawn children). Raises MegaSoraError, which says
    who writes `what`, where another process holds it, unless `wait`.
    """
    while True:
        handle = make_below(path.parent, lambda: os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                break
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise MegaSoraError(
                f"{what} is being written by {holder}; wait for it, or stop it and run this again"
            ) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(handle)
            raise MegaSoraError(f"{path} cannot be locked ({error.strerror}); mount {path.parent} with flock") from None
        os.close(handle)  # its last holder has removed the file: lock the new one
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()  # where nobody holds another
        os.close(handle)


def make_below(folder: Path, make: Callable[[], Any]) -> Any:
    """`make()`, which puts something into `folder`, though others make this folder and remove it when it is empty."""
    while True:
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
        with suppress(FileNotFoundError):
            return make()

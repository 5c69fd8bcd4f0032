"""Atomic writes (to a temporary name, flushed to the disk, then renamed), file locks, and JSONL files."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from megasora.errors import MegaSoraError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file opened for writing that replaces `path` atomically on exit; after an exception `path` is unchanged."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`; on exit removes the file, and its folder if that is empty.

    The system releases the lock when this process and its forks have ended, so spawn children, do not fork them. If
    another process holds it, waits if `wait`, else raises MegaSoraError that names the process and `what` it writes.
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
        os.close(handle)  # the previous holder has removed the file: lock the new one
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()  # if no other lock is in it
        os.close(handle)


def make_below(folder: Path, make: Callable[[], Any]) -> Any:
    """Result of `make()`, which creates a file in `folder`, although other processes may create and remove `folder`."""
    while True:
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
        with suppress(FileNotFoundError):
            return make()


class JsonlWriter:
    """Appends one JSON object per line to a file, unbuffered; closes a line that a killed process left incomplete."""

    def __init__(self, path: Path):
        self.file = open(path, "ab+", buffering=0)  # noqa: SIM115
        end = self.file.seek(0, os.SEEK_END)
        if end and os.pread(self.file.fileno(), 1, end - 1) != b"\n":
            self.file.write(b"\n")

    def write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values).encode() + b"\n")

    def close(self) -> None:
        self.file.close()

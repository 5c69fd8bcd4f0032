"""Locks between processes, on files that are created when they are acquired and removed when they are released."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megasora.errors import MegaSoraError


@contextmanager
def locked(path: Path, what: str, wait: bool = False, note: str = "") -> Iterator[None]:
    """Holds an exclusive lock on the file `path`; on exit removes the file, and its folder if that is empty.

    The system releases the lock when this process and its forks have ended, so spawn children, do not fork them. If
    another process holds it, waits if `wait`, else raises MegaSoraError that names the process and `what` it writes.
    The file holds the name of the process on its first line, then `note`, for other processes.
    """
    while True:
        handle = create_in(path.parent, lambda: os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                break
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").partition("\n")[0] or "another process"
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
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n{note}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()  # if no other lock is in it
        os.close(handle)


def create_in(folder: Path, create: Callable[[], Any]) -> Any:
    """Result of `create()`, which creates a file in `folder`, even if other processes create and remove `folder`."""
    while True:
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
        with suppress(FileNotFoundError):
            return create()

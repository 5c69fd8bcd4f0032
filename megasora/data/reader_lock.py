"""Lets one reader thread at a time run Python code; released while a thread waits for I/O.

    reader thread (reader_pool.py):  with reader_lock: read a pack
    folder (folder.py):              with reader_lock.released(): wait for the disk or the server

Python runs one thread at a time anyway. Threads that compete for the interpreter switch at each system call, which
costs more than the reads themselves: without this lock, four threads on two idle cores took three times the CPU time of
one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReaderLock:
    """A lock that its owner can release for the duration of a block."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: int | None = None  # thread id

    def __enter__(self) -> None:
        self.lock.acquire()
        self.owner = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self.owner = None
        self.lock.release()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Releases the lock inside the block. No effect in a thread that does not hold it."""
        if self.owner != threading.get_ident():
            yield
            return
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

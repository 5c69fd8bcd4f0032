"""Reader threads: packs are submitted, and their results returned in the order of submission.

    submit(packs) --queue--> reader threads: read_pack(pack, begin) --PendingPacks--> results

Threads overlap their I/O, and run Python code one at a time (reader_lock.py). The pool records which clip each thread
reads and since when, so that a read that hangs, e.g. on a dead file system, can be named while it hangs. Threads are
daemons: one that hangs does not keep the process from ending. All others are joined, because a thread that is inside of
torch while its process ends crashes the process.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from megasora.data.reader_lock import ReaderLock

POLL_SECONDS = 0.2  # between two checks whether to continue waiting
CLOSING_SECONDS = 5.0  # for threads to finish their current clip


class ReadersClosed(Exception):
    """Raised in a reader thread to end it, and to whoever waits for packs of a closed pool."""


class PendingPacks:
    """The packs of one `submit`, while they are read. Their waiter is woken once, when all are done."""

    def __init__(self, count: int):
        self.values: list[Any] = [None] * count
        self.errors: dict[int, BaseException] = {}  # by index
        self.remaining = itertools.count(count - 1, -1)  # packs that remain after the next; next() is atomic
        self.done = threading.Event()
        if not count:
            self.done.set()


class ReaderPool:
    """`count` threads that call `read_pack(pack, begin)`; with 0, the caller's thread does.

    `read_pack` calls `begin(clip)` before it reads a clip, by index. It runs under `reader_lock`; what it waits for
    must release it (`ReaderLock.released`).
    """

    def __init__(self, read_pack: Callable[[Any, Callable[[int], None]], Any], count: int, reader_lock: ReaderLock):
        self.read_pack, self.count, self.reader_lock = read_pack, count, reader_lock
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.running: dict[int, tuple[int, float]] = {}  # thread id -> (clip, time at which its read began)
        self.closed = False
        self.threads = [
            threading.Thread(target=self.work, name=f"clip-reader-{index}", daemon=True) for index in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def submit(self, packs: Sequence[Any]) -> Callable[[], Iterator[Any]]:
        """Starts to read packs. Calling what is returned yields the results in order, or raises the first error."""
        if not self.count:
            return lambda: (self.read_tracked(pack) for pack in packs)
        pending = PendingPacks(len(packs))
        for index, pack in enumerate(packs):
            self.jobs.put((pack, pending, index))
        return lambda: self.results(pending)

    def results(self, pending: PendingPacks) -> Iterator[Any]:
        while not pending.done.wait(POLL_SECONDS):
            if self.closed:
                raise ReadersClosed("the readers were closed before all packs were read")
        for index in range(len(pending.values)):
            if index in pending.errors:
                raise pending.errors[index]
            yield pending.values[index]

    def work(self) -> None:
        """The body of a reader thread."""
        while (job := self.jobs.get()) is not None:
            pack, pending, index = job
            try:
                pending.values[index] = self.read_tracked(pack)
            except BaseException as error:  # raised by `results`
                pending.errors[index] = error
            if next(pending.remaining) == 0:
                pending.done.set()
            del job, pending  # else this thread would keep the pack alive while it waits for the next job

    def read_tracked(self, pack: Any) -> Any:
        thread = threading.get_ident()

        def begin(clip: int) -> None:
            if self.closed:
                raise ReadersClosed
            self.running[thread] = clip, time.monotonic()

        try:
            with self.reader_lock:
                return self.read_pack(pack, begin)
        finally:
            self.running.pop(thread, None)

    def longest_running(self) -> tuple[int, float] | None:
        """(clip, seconds so far) of the read that has been running for longest; None if none is running."""
        running = sorted(self.running.copy().values(), key=lambda read: read[1])
        return (running[0][0], time.monotonic() - running[0][1]) if running else None

    def is_hung(self, timeout: float) -> bool:
        """True if a read has been running for more than `timeout` seconds."""
        longest = self.longest_running()
        return longest is not None and longest[1] > timeout

    def close(self) -> None:
        """Asks the threads to end after their current clip, and discards the packs that are not begun."""
        self.closed = True
        with suppress(queue.Empty):
            while True:
                self.jobs.get_nowait()
        for _ in range(self.count):
            self.jobs.put(None)

    def join(self, timeout: float) -> None:
        """Waits for the threads to end, after `close`. Returns early if a read runs for more than `timeout` seconds."""
        deadline = time.monotonic() + CLOSING_SECONDS
        while any(thread.is_alive() for thread in self.threads) and time.monotonic() < deadline:
            if self.is_hung(timeout):
                return
            for thread in self.threads:
                thread.join(POLL_SECONDS / self.count)

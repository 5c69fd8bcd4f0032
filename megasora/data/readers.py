"""Clips read by threads side by side, given back in the order in which they were asked for.

What a thread is reading, and since when, is on record: a read that hangs, as on a file system that is gone, can be
named while it hangs. Threads are daemons: one that hangs does not keep a process from ending. The others are waited
for: a thread that is inside of torch when its process ends takes the process down.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

POLL_SECONDS = 0.2  # between two looks at whether to go on waiting
CLOSING_SECONDS = 5.0  # that threads get to end what they are reading


class Readers:
    """`count` threads that call `read(number)`; with 0, the caller's thread does."""

    def __init__(self, read: Callable[[int], Any], count: int):
        self.read, self.count = read, count
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.running: dict[int, tuple[int, float]] = {}  # thread -> (number, when it was begun)
        self.closed = False
        self.threads = [
            threading.Thread(target=self.work, name=f"clip-reader-{number}", daemon=True) for number in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def ask(self, numbers: Sequence[int]) -> Callable[[], Iterator[Any]]:
        """Begins to read; what is returned gives the results, or raises the first error, when called."""
        if not self.count:
            return lambda: (self.watched(number) for number in numbers)
        results = [Result() for _ in numbers]
        for number, result in zip(numbers, results, strict=True):
            self.jobs.put((number, result))
        return lambda: (self.wait(result) for result in results)

    def wait(self, result: Result) -> Any:
        while not result.there.wait(POLL_SECONDS):
            if self.closed:
                raise RuntimeError("the readers were closed before all clips were read")
        if result.error is not None:
            raise result.error
        return result.value

    def work(self) -> None:
        while (job := self.jobs.get()) is not None:
            number, result = job
            try:
                result.value = self.watched(number)
            except BaseException as error:  # raised where the result is used
                result.error = error
            result.there.set()

    def watched(self, number: int) -> Any:
        thread = threading.get_ident()
        self.running[thread] = number, time.monotonic()
        try:
            return self.read(number)
        finally:
            del self.running[thread]

    def slowest(self) -> tuple[int, float] | None:
        """(number, seconds so far) of the read that has been going on for longest."""
        running = sorted(self.running.copy().values(), key=lambda read: read[1])
        return (running[0][0], time.monotonic() - running[0][1]) if running else None

    def close(self) -> None:
        """Threads end after what they are reading; what was asked for and not begun is not read."""
        self.closed = True
        with suppress(queue.Empty):
            while True:
                self.jobs.get_nowait()
        for _ in range(self.count):
            self.jobs.put(None)

    def join(self, patience: float) -> None:
        """Waits for the threads, behind `close`; not where a read goes on for more than `patience` seconds."""
        end = time.monotonic() + CLOSING_SECONDS
        while any(thread.is_alive() for thread in self.threads) and time.monotonic() < end:
            slowest = self.slowest()
            if slowest is not None and slowest[1] > patience:
                return
            for thread in self.threads:
                thread.join(POLL_SECONDS / self.count)


class Result:
    def __init__(self) -> None:
        self.there = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None

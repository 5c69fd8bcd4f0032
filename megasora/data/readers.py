"""Packs read by threads, given back in the order in which they were asked for.

Threads wait for data side by side, but one at a time computes: it has the turn, and gives it up while it waits. Python
runs one thread at a time anyway, and threads that want to run spend more on handing over to each other, at each call
of the system, than reading costs: on two idle cores four of them took three times the CPU seconds of one.

Which clip a thread is at, and since when, is on record: a read that hangs, as on a file system that is gone, can be
named while it hangs. Threads are daemons: one that hangs does not keep a process from ending. The others are waited
for: a thread that is inside of torch when its process ends takes the process down.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

POLL_SECONDS = 0.2  # between two looks at whether to go on waiting
CLOSING_SECONDS = 5.0  # that threads get to end what they are reading


class Closed(Exception):
    """Raised in a thread that is to end."""


class Waiting:
    """The context in which a thread gives up its turn."""

    def __init__(self, turn: threading.Lock):
        self.turn = turn

    def __enter__(self) -> None:
        self.turn.release()

    def __exit__(self, *error: object) -> None:
        self.turn.acquire()


class Readers:
    """`count` threads that call `read(pack, begin, waiting)`; with 0, the caller's thread does.

    `read` calls `begin(number)` for each clip that it begins to read, and waits for data inside of `waiting`.
    """

    def __init__(self, read: Callable[[Any, Callable[[int], None], Waiting], Any], count: int):
        self.read, self.count, self.turn = read, count, threading.Lock()
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.running: dict[int, tuple[int, float]] = {}  # thread -> (number of the clip, when it was begun)
        self.closed = False
        self.threads = [
            threading.Thread(target=self.work, name=f"clip-reader-{number}", daemon=True) for number in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def ask(self, packs: Sequence[Any]) -> Callable[[], Iterator[Any]]:
        """Begins to read; what is returned gives the results, or raises the first error, when called."""
        if not self.count:
            return lambda: (self.watched(pack) for pack in packs)
        asked = Asked(len(packs))
        for place, pack in enumerate(packs):
            self.jobs.put((pack, asked, place))
        return lambda: self.wait(asked)

    def wait(self, asked: Asked) -> Iterator[Any]:
        while not asked.there.wait(POLL_SECONDS):
            if self.closed:
                raise Closed("the readers were closed before all packs were read")
        for place in range(len(asked.values)):
            if place in asked.errors:
                raise asked.errors[place]
            yield asked.values[place]

    def work(self) -> None:
        while (job := self.jobs.get()) is not None:
            pack, asked, place = job
            try:
                asked.values[place] = self.watched(pack)
            except BaseException as error:  # raised where the value is used
                asked.errors[place] = error
            if next(asked.left) == 0:
                asked.there.set()
            del job, asked  # a pack is not held while the next is waited for

    def watched(self, pack: Any) -> Any:
        thread = threading.get_ident()

        def begin(number: int) -> None:
            if self.closed:
                raise Closed
            self.running[thread] = number, time.monotonic()

        try:
            with self.turn:
                return self.read(pack, begin, Waiting(self.turn))
        finally:
            self.running.pop(thread, None)

    def slowest(self) -> tuple[int, float] | None:
        """(number, seconds so far) of the clip whose reading has been going on for longest."""
        running = sorted(self.running.copy().values(), key=lambda read: read[1])
        return (running[0][0], time.monotonic() - running[0][1]) if running else None

    def close(self) -> None:
        """Threads end after the clip that they are reading; what was asked for and not begun is not read."""
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


class Asked:
    """Packs that were asked for at once. Who waits for them is woken once, when all are there."""

    def __init__(self, count: int):
        self.values: list[Any] = [None] * count
        self.errors: dict[int, BaseException] = {}  # by place
        self.left = itertools.count(count - 1, -1)  # to be read after the next; counting is one step, also for threads
        self.there = threading.Event()
        if not count:
            self.there.set()

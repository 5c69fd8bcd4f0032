"""A thread that runs an endless iterator ahead of its consumer: items in; the same items out of a bounded queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

POLL_SECONDS = 0.2  # between two checks whether the consumer has stopped


class Prefetcher:
    """Runs `items`, which must be endless, in a thread.

    At most `depth` items are queued, and one more is produced or waits for space.
    """

    def __init__(self, items: Iterator[Any], depth: int):
        self.items, self.stopped = items, threading.Event()
        self.queue: queue.Queue = queue.Queue(maxsize=depth)
        self.thread = threading.Thread(target=self.work, name="pack-loader", daemon=True)
        self.thread.start()

    def get(self, timeout: float) -> Any:
        """The next item. Raises the error of the iterator, or queue.Empty after `timeout` seconds."""
        item = self.queue.get(timeout=timeout)
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """Asks the thread to end once it has its current item."""
        self.stopped.set()

    def join(self, timeout: float) -> None:
        self.thread.join(timeout)

    def work(self) -> None:
        """The body of the thread."""
        try:
            for item in self.items:
                if not self.put(item):
                    return
            raise RuntimeError("the iterator of a Prefetcher has ended; it must be endless")
        except BaseException as error:
            self.put(error)

    def put(self, item: object) -> bool:
        """False if the consumer has stopped."""
        while not self.stopped.is_set():
            try:
                self.queue.put(item, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

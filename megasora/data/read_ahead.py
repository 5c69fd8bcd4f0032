"""Steps of a loader, read ahead by a thread while the training uses the ones before them."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megasora.data.prefetch import Prefetcher
from megasora.data.reader_pool import ReaderPool
from megasora.errors import DataError


def read_ahead(
    steps: Iterator[Any], readers: ReaderPool, depth: int, timeout: float, describe_clip: Callable[[int], str]
) -> Iterator[Any]:
    """Yields `steps`, which must be endless and use `readers`; a thread reads `depth` of them ahead.

    Errors of the thread are raised here, and DataError with `describe_clip(index)` if the read of a clip takes longer
    than `timeout` seconds. The threads end with the iterator.
    """
    prefetcher = Prefetcher(steps, depth)
    try:
        while True:
            try:
                step = prefetcher.get(min(1.0, timeout / 4))
            except queue.Empty:
                raise_if_hung(readers, timeout, describe_clip)
                continue
            yield step
    finally:
        prefetcher.stop()
        readers.close()
        if not readers.is_hung(timeout):  # a thread that hangs is abandoned
            prefetcher.join(timeout)
            readers.join(timeout)


def read_in_turn(steps: Iterator[Any], readers: ReaderPool, timeout: float) -> Iterator[Any]:
    """Yields `steps`, which use `readers`, each when it is requested. The threads end with the iterator."""
    try:
        yield from steps
    finally:
        readers.close()
        readers.join(timeout)


def submit_ahead(
    steps: Iterable[tuple[Any, list[Any]]], readers: ReaderPool, packs_per_step: int
) -> Iterator[tuple[Any, Callable[[], Iterable[Any]]]]:
    """(step, a function that returns its packs as read) of each (step, packs to read), in order.

    So many steps are submitted ahead that each reader thread has a pack. Keep no function longer than its step: it
    keeps the packs alive.
    """
    steps_ahead = -(-readers.count // packs_per_step)
    submitted: deque = deque()
    for step, packs in steps:
        submitted.append((step, readers.submit(packs)))
        if len(submitted) > steps_ahead:
            yield submitted.popleft()


def raise_if_hung(readers: ReaderPool, timeout: float, describe_clip: Callable[[int], str]) -> None:
    longest = readers.longest_running()
    if longest is not None and longest[1] > timeout:
        clip, seconds = longest
        raise DataError(
            f"{describe_clip(clip)}: reading it has taken {seconds:.1f} s, more than "
            f"data.read_timeout_seconds={timeout:g}; check its disk or server, or raise the limit"
        )

"""What libraries say while clips are read: counted by kind instead of shown, with the first of each kind.

in a worker: warnings, logging, FFmpeg, prints --lines of standard error--> pool: LibraryWarnings of each clip
in the main process (encoders of captions): warnings, logging --> LibraryWarnings
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

END_OF_JOB = "\0"  # the line that a worker prints after its start and after each job
MAX_LINE = 200  # characters that are kept of a line
MAX_KINDS = 20  # that are counted apart
OTHERS = "others"


class LibraryWarnings:
    """Lines by kind: a line without its numbers and addresses."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # kind -> the first line

    def add(self, line: str, clip: str = "") -> None:
        """Counts a line that a library printed while it read `clip`; an empty line is none."""
        line = line.strip()[:MAX_LINE]
        if line:
            kind = re.sub(r"\b(0x[0-9a-fA-F]+|\d+(\.\d+)?)", "N", line)
            self.count(kind, 1, f"{clip}: {line}" if clip else line)

    def count(self, kind: str, number: int, example: str) -> None:
        if kind not in self.kinds and len(self.kinds) >= MAX_KINDS:
            kind = OTHERS
        self.kinds[kind] += number
        self.examples.setdefault(kind, example)

    def update(self, details: dict[str, list[Any]]) -> None:
        """Adds the `details` of others."""
        for kind, (number, example) in details.items():
            self.count(kind, number, example)

    def details(self) -> dict[str, list[Any]]:
        """kind -> [count, first example], as JSON values; the most frequent kind first."""
        ordered = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))
        return {kind: [number, self.examples[kind]] for kind, number in ordered}


@contextmanager
def python_warnings_to(receive: Callable[[str], None]) -> Iterator[None]:
    """Gives each Python warning, and each record that a logger would print, to `receive` as one line."""

    class Receiver(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            receive(f"{record.name}: {record.getMessage()}".replace("\n", " "))

    def receive_warning(message, category, *_) -> None:
        receive(f"{category.__name__}: {message}".replace("\n", " "))

    receiver = Receiver(logging.WARNING)
    loggers = [logger for logger in logging.Logger.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    replaced = [(logger, handler) for logger in [logging.root, *loggers] for handler in terminal_handlers(logger)]
    for logger, handler in replaced:
        logger.removeHandler(handler)
    receivers = {logging.root, *(logger for logger, _ in replaced)}
    for logger in receivers:
        logger.addHandler(receiver)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")  # else the count depends on what was read before
            warnings.showwarning = receive_warning
            yield
    finally:
        for logger in receivers:
            logger.removeHandler(receiver)
        for logger, handler in replaced:
            logger.addHandler(handler)


def terminal_handlers(logger: logging.Logger) -> list[logging.Handler]:
    """The handlers of a logger that print to standard error or output."""
    return [
        handler
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler)
        and getattr(handler, "stream", None) in (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
    ]


def print_line(line: str) -> None:
    """Prints a line to standard error, which a worker's pool reads."""
    os.write(2, f"{line}\n".encode("utf-8", "backslashreplace"))


def log_decoder_errors() -> None:
    """Has FFmpeg's errors logged, each time that they occur.

    FFmpeg calls Python for each, so threads of a decoder would wait for each other; workers decode in one thread.
    """
    import av

    av.logging.set_skip_repeated(False)
    av.logging.set_level(av.logging.ERROR)

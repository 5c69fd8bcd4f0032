"""Progress of a run on standard error: a live line on a terminal, otherwise a plain line every 15 seconds.

If the terminal is closed meanwhile, nothing more is shown, and the run goes on: SIGHUP asks it to save and stop.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megasora.errors import printable

PLAIN_LINE_SECONDS = 15.0


class ProgressLine:
    """The progress line of a run of `total` steps, of which `done` were done before this launch."""

    def __init__(self, total: int, done: int):
        self.total, self.first_step = total, done
        self.start, self.last_print = time.monotonic(), 0.0
        self.bar = self.task = None
        self.is_closed = False  # nobody reads it any more
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )  # fmt: skip
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task("train", total=total, completed=done, text="")

    def update(self, step: int, text: str) -> None:
        """Shows that `step` steps are done, with `text` on the line."""
        with self.written():
            self.show(step, text)

    def show(self, step: int, text: str) -> None:
        if self.is_closed:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
        elif time.monotonic() - self.last_print >= PLAIN_LINE_SECONDS or step == self.total:
            self.last_print = time.monotonic()
            seconds_per_step = (self.last_print - self.start) / max(1, step - self.first_step)
            minutes_left = seconds_per_step * (self.total - step) / 60
            print(f"step {step}/{self.total}  {text}  {minutes_left:.1f} min left", file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        """Prints a message on a line of its own; names in it may have control characters."""
        text = printable(text)
        with self.written():
            if self.bar is None:
                print(text, file=sys.stderr, flush=True)
            elif not self.is_closed:
                self.bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        with self.written():
            if self.bar is not None:
                self.bar.stop()

    @contextmanager
    def written(self) -> Iterator[None]:
        """What is written within the context is lost if the terminal was closed."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            self.is_closed = True

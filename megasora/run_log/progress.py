"""Progress of a run on standard error: a live line on a terminal, otherwise a plain line every 15 seconds."""

from __future__ import annotations

import sys
import time

PLAIN_LINE_SECONDS = 15.0


class ProgressLine:
    """The progress line of a run of `total` steps, of which `done` were done before this launch."""

    def __init__(self, total: int, done: int):
        self.total, self.first_step = total, done
        self.start, self.last_print = time.monotonic(), 0.0
        self.bar = self.task = None
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
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
        elif time.monotonic() - self.last_print >= PLAIN_LINE_SECONDS or step == self.total:
            self.last_print = time.monotonic()
            seconds_per_step = (self.last_print - self.start) / max(1, step - self.first_step)
            minutes_left = seconds_per_step * (self.total - step) / 60
            print(f"step {step}/{self.total}  {text}  {minutes_left:.1f} min left", file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        """Prints a message on a line of its own."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()

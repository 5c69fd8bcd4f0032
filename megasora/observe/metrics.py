"""What a run tells while it runs: a JSON line a step, a progress line, and Weights & Biases if it is there.

wandb is talked to by a thread of its own: absent, failing or hanging, it never holds a step up.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megasora.config import WandbConfig

QUIET_LINE_SECONDS = 15.0  # between progress lines where there is no terminal
WANDB_CLOSE_SECONDS = 10.0


class JsonLines:
    """Appends objects to a file, a line each, unbuffered. A line that a kill has torn is closed first."""

    def __init__(self, path: Path):
        self.file = open(path, "ab+", buffering=0)  # noqa: SIM115
        end = self.file.seek(0, os.SEEK_END)
        if end and os.pread(self.file.fileno(), 1, end - 1) != b"\n":
            self.file.write(b"\n")

    def write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values).encode() + b"\n")

    def close(self) -> None:
        self.file.close()


class ProgressLine:
    """One live line on a terminal; elsewhere a plain line every quarter of a minute."""

    def __init__(self, total: int, done: int):
        self.total, self.last = total, 0.0
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
        self.start, self.first = time.monotonic(), done

    def update(self, step: int, text: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
        elif time.monotonic() - self.last >= QUIET_LINE_SECONDS or step == self.total:
            self.last = time.monotonic()
            left = (self.last - self.start) / max(1, step - self.first) * (self.total - step)
            print(f"step {step}/{self.total}  {text}  {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


class WandbLog:
    """A queue to a daemon thread that owns wandb. `warning` says once what went wrong."""

    def __init__(self, config: WandbConfig, run_dir: Path, settings: dict[str, Any]):
        self.lines: queue.Queue = queue.Queue(maxsize=10_000)
        self.warning: str | None = None
        self.thread = None
        if config.mode != "disabled":
            self.thread = threading.Thread(
                target=self.work, args=(config, run_dir, settings), name="wandb", daemon=True
            )
            self.thread.start()

    def work(self, config: WandbConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        try:
            import wandb

            run = wandb.init(
                mode=config.mode, project=config.project, name=run_dir.name, dir=str(run_dir), config=settings,
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )  # fmt: skip
            while (item := self.lines.get()) is not None:
                step, values = item
                run.log(values, step=step)
            run.finish()
        except BaseException as error:
            self.warning = f"wandb: {type(error).__name__}: {error}"

    def write(self, step: int, values: dict[str, Any]) -> None:
        if self.thread is not None and self.thread.is_alive():
            try:
                self.lines.put_nowait((step, values))
            except queue.Full:
                self.warning = "wandb: its queue is full; some lines were dropped"

    def close(self) -> None:
        if self.thread is not None and self.thread.is_alive():
            try:
                self.lines.put_nowait(None)
            except queue.Full:
                return
            self.thread.join(WANDB_CLOSE_SECONDS)
            if self.thread.is_alive():
                self.warning = f"wandb did not finish within {WANDB_CLOSE_SECONDS:.0f} s; the run goes on without it"

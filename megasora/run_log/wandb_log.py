"""Logging to Weights & Biases from a thread of its own: if wandb is absent, fails or hangs, no step waits for it."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megasora.config import WandbConfig

CLOSE_SECONDS = 10.0
MAX_QUEUED = 10_000  # lines


class WandbLog:
    """A queue to a daemon thread that calls wandb. `warning`: the last thing that went wrong, or None."""

    def __init__(self, config: WandbConfig, run_dir: Path, settings: dict[str, Any]):
        self.queue: queue.Queue = queue.Queue(maxsize=MAX_QUEUED)
        self.warning: str | None = None
        self.thread = None
        if config.mode != "disabled":
            self.thread = threading.Thread(
                target=self.log_queued, args=(config, run_dir, settings), name="wandb", daemon=True
            )
            self.thread.start()

    def log_queued(self, config: WandbConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        """Runs in the thread: logs queued lines until None is queued."""
        try:
            import wandb

            run = wandb.init(
                mode=config.mode, project=config.project, name=run_dir.name, dir=str(run_dir), config=settings,
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )  # fmt: skip
            while (item := self.queue.get()) is not None:
                step, values = item
                run.log(values, step=step)
            run.finish()
        except BaseException as error:
            self.warning = f"wandb: {type(error).__name__}: {error}"

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Queues a line; drops it, with a warning, if the queue is full."""
        if self.thread is not None and self.thread.is_alive():
            try:
                self.queue.put_nowait((step, values))
            except queue.Full:
                self.warning = "wandb: its queue is full; some lines were dropped"

    def close(self) -> None:
        """Waits at most CLOSE_SECONDS for the queued lines to be logged; a warning if some are not."""
        if self.thread is not None and self.thread.is_alive():
            deadline = time.monotonic() + CLOSE_SECONDS
            with suppress(queue.Full):
                self.queue.put(None, timeout=CLOSE_SECONDS)
            self.thread.join(max(0.0, deadline - time.monotonic()))
            if self.thread.is_alive():
                self.warning = f"wandb did not finish within {CLOSE_SECONDS:.0f} s; lines that were not sent are lost"

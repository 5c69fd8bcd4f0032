"""Logging to Weights & Biases in a process of its own: if wandb is absent, fails or hangs, no step waits for it.

    steps --queue--> thread --pipe--> wandb_process.py --> RUN/wandb/, and the server if wandb.mode=online

A process can be ended, unlike the threads and exit handlers of wandb, which wait more than a minute for a server that
does not answer. What it was sent is in RUN/wandb before it goes to the server, and can be sent later.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megasora.config import WandbConfig
from megasora.run_log import wandb_process

CLOSE_SECONDS = 10.0
MAX_QUEUED = 10_000  # lines


class WandbLog:
    """A queue to a daemon thread that feeds the process. `warning`: the last thing that went wrong, or None."""

    def __init__(self, config: WandbConfig, run_dir: Path, settings: dict[str, Any]):
        self.queue: queue.Queue = queue.Queue(maxsize=MAX_QUEUED)
        self.run_dir = run_dir
        self.warning: str | None = None
        self.process: subprocess.Popen | None = None
        if config.mode != "disabled":
            arguments = {
                "mode": config.mode, "project": config.project, "name": run_dir.name, "dir": str(run_dir),
                "config": settings,
            }  # fmt: skip
            # -P: modules are not imported from the folder of the script
            command = [sys.executable, "-P", wandb_process.__file__]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                start_new_session=True,
            )  # fmt: skip
            self.queue.put(arguments)
            self.threads = [
                threading.Thread(target=target, name="wandb", daemon=True)
                for target in (self.send_queued, self.read_warnings)
            ]
            for thread in self.threads:
                thread.start()

    def send_queued(self) -> None:
        """Runs in a thread: sends queued lines to the process until None is queued, then the end of the input."""
        with suppress(OSError):  # the process has ended: it has said why
            with self.process.stdin as stdin:
                while (item := self.queue.get()) is not None:
                    stdin.write(json.dumps(item) + "\n")
                    stdin.flush()

    def read_warnings(self) -> None:
        """Runs in a thread: keeps the last line that the process prints."""
        for line in self.process.stdout:
            self.warning = f"wandb: {line.strip()}"

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Queues a line; drops it, with a warning, if the queue is full."""
        if self.process is not None and self.threads[0].is_alive():
            try:
                self.queue.put_nowait((step, values))
            except queue.Full:
                self.warning = "wandb: its queue is full; some lines were dropped"

    def close(self) -> None:
        """Waits at most CLOSE_SECONDS for the queued lines to be logged; a warning if some are not."""
        if self.process is None:
            return
        deadline = time.monotonic() + CLOSE_SECONDS
        with suppress(queue.Full):
            self.queue.put(None, timeout=CLOSE_SECONDS)
        try:
            code = self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.warning = (
                f"wandb did not finish within {CLOSE_SECONDS:.0f} s and was ended; send what it has in "
                f"{self.run_dir / 'wandb'} with: wandb sync {self.run_dir / 'wandb' / 'latest-run'}"
            )
            return
        self.threads[1].join(max(0.0, deadline - time.monotonic()))  # it reads to the end of what was printed
        if code and self.warning is None:
            self.warning = f"wandb: its process ended with code {code}"

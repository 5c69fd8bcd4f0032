"""Watchdog: a thread that ends its process if the training loop sends no heartbeat for too long.

A rank that waits in a collective looks like the rank that is stuck, so every rank writes what it is doing:

    RUN/logs/hang-00003   the current activity of rank 3, written at its timeout; a stopped or dead process writes none

After GATHER_SECONDS every rank reads these files. It prints the stacks of all its threads to its log, records the
activities of all ranks in exit.json, and exits with errors.HANG, without destructors that would wait for other ranks.

After a stop request a process gets STOP_SECONDS plus STOP_ACTIVITIES times its longest recent activity. torchrun sends
the same signal when another process has crashed; then the current step may never finish.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megasora.errors import CRASH, HANG
from megasora.run_log.launches import record_exit

STARTUP, NO_ANSWER = "startup", "no answer: stopped or dead"
POLL_SECONDS = 0.2
GATHER_SECONDS = 3.0
STOP_SECONDS, STOP_ACTIVITIES, RECENT_ACTIVITIES = 10.0, 3, 32
MAX_LISTED_RANKS = 8


class Watchdog:
    """Watches one of `processes` ranks. `seconds`: the longest time between two heartbeats."""

    def __init__(self, run_dir: Path, rank: int, processes: int, seconds: float, stop_requested: Callable[[], bool]):
        self.run_dir, self.rank, self.processes, self.seconds = run_dir, rank, processes, seconds
        self.stop_requested = stop_requested
        self.activity, self.activity_start = STARTUP, time.monotonic()
        self.durations: deque[float] = deque(maxlen=RECENT_ACTIVITIES)  # seconds per activity, without the startup

    def heartbeat(self, activity: str) -> None:
        """Resets the timeout. `activity`: what the process does next, e.g. "step 7"."""
        now = time.monotonic()
        if self.activity != STARTUP:
            self.durations.append(now - self.activity_start)
        self.activity, self.activity_start = activity, now

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Runs the watchdog thread within the context."""
        done = threading.Event()
        self.activity_file(self.rank).unlink(missing_ok=True)
        thread = threading.Thread(target=self.watch, args=(done,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def watch(self, done: threading.Event) -> None:
        stop_time = None
        while not done.wait(POLL_SECONDS):
            now = time.monotonic()
            if now - self.activity_start >= self.seconds:
                self.abort_hang()
            if stop_time is None and self.stop_requested():
                stop_time = now
            limit = STOP_SECONDS + STOP_ACTIVITIES * max(self.durations, default=self.seconds)
            if stop_time is not None and now - max(stop_time, self.activity_start) >= limit:
                self.abort_stop(limit)

    def abort_hang(self) -> None:
        """Ends the process with errors.HANG and records what every rank was doing."""
        print(f"no heartbeat for {self.seconds:g} s, during {self.activity}; stacks of all threads:", file=sys.stderr)
        sys.stderr.flush()
        faulthandler.dump_traceback()
        with suppress(OSError):
            self.activity_file(self.rank).write_text(self.activity, encoding="utf-8")
        time.sleep(GATHER_SECONDS)
        reason = f"no heartbeat for {self.seconds:g} s; {self.describe_ranks()}; stacks in {self.run_dir / 'logs'}"
        print(f"megasora: error: {reason}", file=sys.stderr, flush=True)
        record_exit(self.run_dir, HANG, reason, self.rank)
        os._exit(HANG)

    def abort_stop(self, limit: float) -> None:
        """Ends the process with errors.CRASH: it could not follow a stop request."""
        reason = f"stop requested, but {self.activity} did not finish within {limit:.0f} s: other processes are gone"
        record_exit(self.run_dir, CRASH, reason, self.rank)
        os._exit(CRASH)

    def describe_ranks(self) -> str:
        """The activity of every rank: "process 1: no answer: stopped or dead; process 0: step 7".

        Ranks that do not answer come first, then the activities that the fewest ranks have.
        """
        ranks_by_activity: dict[str, list[int]] = {}
        for rank in range(self.processes):
            path = self.activity_file(rank)
            activity = path.read_text(encoding="utf-8") if path.is_file() else NO_ANSWER
            ranks_by_activity.setdefault(activity, []).append(rank)
        parts = []
        for activity, ranks in sorted(ranks_by_activity.items(), key=lambda item: (item[0] != NO_ANSWER, len(item[1]))):
            more = f" and {len(ranks) - MAX_LISTED_RANKS} more" if len(ranks) > MAX_LISTED_RANKS else ""
            parts.append(f"process {', '.join(map(str, ranks[:MAX_LISTED_RANKS]))}{more}: {activity}")
        return "; ".join(parts)

    def activity_file(self, rank: int) -> Path:
        return self.run_dir / "logs" / f"hang-{rank:05d}"

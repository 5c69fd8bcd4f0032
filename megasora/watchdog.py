"""Watchdog: a thread that ends its process if that sends no heartbeat for too long, from its first second on.

A rank that waits in a collective looks like the rank that is stuck, so every rank writes what it is doing:

    RUN/logs/hang-00003   the current activity of rank 3, written at its timeout; a stopped or dead process writes none

After GATHER_SECONDS every rank reads these files. It prints the stacks of all its threads to its log, records the
activities of all ranks in exit.json, and exits with errors.HANG, without destructors that would wait for other ranks.
Before all ranks have joined, those that have not are named instead. Reading and writing may hang themselves, on a
network file system that does not answer: both happen in threads that have a few seconds, and then the process ends.

After a stop request a process gets STOP_SECONDS plus STOP_ACTIVITIES times its longest recent activity. torchrun sends
the same signal when another process has crashed; then the current step may never finish. Before the launch has begun,
a request ends the process within START_STOP_SECONDS.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from megasora.errors import CRASH, HANG, STOPPED, first_of
from megasora.run_log.launches import Launch

STARTUP, NO_ANSWER = "startup", "no answer: stopped or dead"
POLL_SECONDS = 0.2
GATHER_SECONDS = 3.0
WRITE_SECONDS, READ_SECONDS = 1.0, 0.4  # for the log and the run folder to answer
START_STOP_SECONDS = 1.0
SUSPENDED_SECONDS = 5.0  # an activity that takes longer may have been interrupted by SIGSTOP
STOP_SECONDS, STOP_ACTIVITIES, RECENT_ACTIVITIES = 10.0, 3, 32
MAX_LISTED_RANKS = 8


class Watchdog:
    """Watches one of `processes` ranks. `seconds`: the longest time between two heartbeats.

    `describe_absent()`: which processes have not joined, "" if all have; set while this one joins.
    """

    def __init__(self, launch: Launch, processes: int, seconds: float, stop_requested: Callable[[], bool]):
        self.launch, self.run_dir, self.rank = launch, launch.run_dir, launch.rank
        self.processes, self.seconds, self.stop_requested = processes, seconds, stop_requested
        self.activity, self.activity_start = STARTUP, time.monotonic()
        self.durations: deque[float] = deque(maxlen=RECENT_ACTIVITIES)  # seconds per activity, since the launch began
        self.describe_absent: Callable[[], str] = lambda: ""
        self.begun = False

    def heartbeat(self, activity: str) -> None:
        """Resets the timeout. `activity`: what the process does next, e.g. "step 7".

        Raises MegaSoraError in a process that was suspended while another launch has begun.
        """
        now = time.monotonic()
        if self.begun:
            self.durations.append(now - self.activity_start)
            if now - self.activity_start >= SUSPENDED_SECONDS:
                self.launch.check_current()
        self.activity, self.activity_start = activity, now

    def begin(self, activity: str) -> None:
        """A heartbeat: all processes have joined, and from here on a stop request can be followed by a save."""
        self.heartbeat(activity)
        self.begun = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Runs the watchdog thread within the context."""
        done = threading.Event()
        thread = threading.Thread(target=self.watch, args=(done,), name="watchdog", daemon=True)
        with duplicate_stderr() as self.terminal:
            thread.start()
            try:
                for file in self.activity_file(self.rank).parent.glob("hang-*"):  # of an earlier launch
                    file.unlink(missing_ok=True)
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
            if not self.begun:
                if stop_time is not None and now - stop_time >= START_STOP_SECONDS:
                    self.abort_start()
            elif stop_time is not None and now - max(stop_time, self.activity_start) >= limit:
                self.abort_stop(limit)

    # ------------------------------------------------------------------ the end

    def abort_hang(self) -> None:
        """Ends the process with errors.HANG and records what every rank was doing, within a bounded time."""
        descriptions: list[str] = []
        gather_end = time.monotonic() + GATHER_SECONDS
        tasks = self.print_stacks, self.write_activity, lambda: descriptions.append(self.describe_absent())
        answers = run_bounded(tasks, GATHER_SECONDS)
        time.sleep(max(0.0, gather_end - time.monotonic()))
        if not any(descriptions):
            answers &= run_bounded([lambda: descriptions.append(self.describe_ranks())], READ_SECONDS)
        what = next(filter(None, reversed(descriptions)), f"process {self.rank}: {self.activity}")
        reason = f"no heartbeat for {self.seconds:g} s; {what}; stacks in {self.run_dir / 'logs'}"
        line = f"megasora: error: {reason}"
        tasks = lambda: print_line(line, sys.stderr), lambda: self.launch.record_exit(HANG, reason)
        if not run_bounded(tasks, WRITE_SECONDS) or not answers:
            line += f"; {self.run_dir} does not answer: process {self.rank} ends without it"
            run_bounded([lambda: print_line(line, self.terminal)], READ_SECONDS)
        os._exit(HANG)

    def abort_start(self) -> None:
        """Ends the process with errors.STOPPED: a stop was requested before the launch has begun."""
        line = f"megasora: stopped on request, during {self.activity}; the same command starts it again"
        run_bounded([lambda: print_line(line, self.terminal)] if self.rank == 0 else [], READ_SECONDS)
        os._exit(STOPPED)

    def abort_stop(self, limit: float) -> None:
        """Ends the process with errors.CRASH: it could not follow a stop request."""
        reason = f"stop requested, but {self.activity} did not finish within {limit:.0f} s: other processes are gone"
        run_bounded([lambda: self.launch.record_exit(CRASH, reason)], GATHER_SECONDS)
        os._exit(CRASH)

    def print_stacks(self) -> None:
        print(f"no heartbeat for {self.seconds:g} s, during {self.activity}; stacks of all threads:", file=sys.stderr)
        sys.stderr.flush()
        faulthandler.dump_traceback()

    def write_activity(self) -> None:
        path = self.activity_file(self.rank)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.activity, encoding="utf-8")

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
            parts.append(f"process {first_of(ranks, MAX_LISTED_RANKS)}: {activity}")
        return "; ".join(parts)

    def activity_file(self, rank: int) -> Path:
        return self.run_dir / "logs" / f"hang-{rank:05d}"


def run_bounded(tasks: Sequence[Callable[[], object]], seconds: float) -> bool:
    """Runs each task in a thread of its own; whether all have ended, with success or not, within `seconds`."""
    threads = [threading.Thread(target=run_quietly, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def run_quietly(task: Callable[[], object]) -> None:
    with suppress(Exception):
        task()


def print_line(line: str, stream: TextIO) -> None:
    print(line, file=stream, flush=True)


def duplicate_stderr() -> TextIO:
    """The present standard error, which `redirect_output` does not change; the null device if there is none."""
    try:
        return os.fdopen(os.dup(sys.stderr.fileno()), "w")
    except (AttributeError, OSError, ValueError):
        return open(os.devnull, "w")

"""Finds a hang: a thread that ends its process when the run has not moved for too long, and says where everyone stands.

A rank that waits in a collective for one that is stuck looks the same as that one, so all say what they were at:

    RUN/logs/hang-00003   what process 3 was at when it had not moved for `seconds`; a stopped process writes none

After a moment each reads who is silent. The stacks of all threads are in the process's log, the verdict in exit.json,
and the process ends with errors.HANG, without the destructors that would wait for the others.

Once asked to stop, a process is given the time of a few moves only: the launcher asks so too when another process has
crashed, and then the step that would stop it may never end.
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
from megasora.observe.launches import note_exit

START, SILENT = "the start", "silent, stopped or gone"
GATHER_SECONDS = 3.0
STOP_SECONDS, STOP_MOVES, RECENT_MOVES = 10.0, 3, 32  # a request is given 10 s + 3 of the longest recent moves
SHOWN_RANKS = 8


class Watchdog:
    def __init__(self, run: Path, rank: int, processes: int, seconds: float, stop_requested: Callable[[], bool]):
        self.run, self.rank, self.processes, self.seconds = run, rank, processes, seconds
        self.stop_requested = stop_requested
        self.at, self.since = START, time.monotonic()
        self.moves: deque[float] = deque(maxlen=RECENT_MOVES)  # seconds of each, without the start

    def moved(self, to: str) -> None:
        now = time.monotonic()
        if self.at != START:
            self.moves.append(now - self.since)
        self.at, self.since = to, now

    @contextmanager
    def watching(self) -> Iterator[None]:
        done = threading.Event()
        self.file(self.rank).unlink(missing_ok=True)
        thread = threading.Thread(target=self.watch, args=(done,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def watch(self, done: threading.Event) -> None:
        asked = None
        while not done.wait(0.2):
            now = time.monotonic()
            if now - self.since >= self.seconds:
                self.end()
            if asked is None and self.stop_requested():
                asked = now
            patience = STOP_SECONDS + STOP_MOVES * max(self.moves, default=self.seconds)
            if asked is not None and now - max(asked, self.since) >= patience:
                reason = f"asked to stop, but did not get on for {patience:.0f} s at {self.at}: others are gone"
                note_exit(self.run, CRASH, reason, self.rank)
                os._exit(CRASH)

    def end(self) -> None:
        print(f"no move for {self.seconds:g} s, at {self.at}; the stacks of all threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        with suppress(OSError):
            self.file(self.rank).write_text(self.at, encoding="utf-8")
        time.sleep(GATHER_SECONDS)
        reason = f"no move for {self.seconds:g} s; {self.positions()}; stacks in {self.run / 'logs'}"
        print(f"megasora: error: {reason}", file=sys.stderr, flush=True)
        note_exit(self.run, HANG, reason, self.rank)
        os._exit(HANG)

    def positions(self) -> str:
        """'process 1: silent, stopped or gone; process 0: at step 7': who is silent first, then the fewest."""
        places: dict[str, list[int]] = {}
        for rank in range(self.processes):
            path = self.file(rank)
            at = f"at {path.read_text(encoding='utf-8')}" if path.is_file() else SILENT
            places.setdefault(at, []).append(rank)
        words = []
        for at, ranks in sorted(places.items(), key=lambda item: (item[0] != SILENT, len(item[1]))):
            more = f" and {len(ranks) - SHOWN_RANKS} more" if len(ranks) > SHOWN_RANKS else ""
            words.append(f"process {', '.join(map(str, ranks[:SHOWN_RANKS]))}{more}: {at}")
        return "; ".join(words)

    def file(self, rank: int) -> Path:
        return self.run / "logs" / f"hang-{rank:05d}"

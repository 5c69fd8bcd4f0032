"""Stop requests: SIGTERM (a person, a preemption), SIGUSR1 (a time limit is near), SIGHUP (the terminal was closed).

The signal handler only records the request. The trainer all-reduces the requests of all ranks with the sums of each
step, so that all ranks stop after the same step, save a checkpoint there and exit with `errors.STOPPED`. Before there
is anything to save, within `StopSignal.ending`, a request ends the process at once.

Python runs a handler only when the main thread is in Python code. While that waits in a collective, other threads learn
of a request from the pipe into which the interpreter writes the number of each signal.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from megasora.errors import StopRequested

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopSignal:
    """Context in which stop signals do not end the process. `name`: the last signal received, or empty.

    SIGHUP stays ignored if it is when the context is entered: nohup asks for that.
    """

    def __init__(self) -> None:
        self.name = ""
        self.is_ending = False

    def __enter__(self) -> StopSignal:
        numbers = [n for n in STOP_SIGNALS if not (n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN)]
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.previous_writer = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.previous_handlers = {number: signal.signal(number, self.record) for number in numbers}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stopping = kind is not None and issubclass(kind, StopRequested)
        for number, handler in self.previous_handlers.items():
            # torchrun signals processes again while they exit; ignore that, so that the exit code stays STOPPED
            signal.signal(number, signal.SIG_IGN if stopping else handler)
        signal.set_wakeup_fd(self.previous_writer)
        self.requested()  # reads what is in the pipe
        for end in (self.reader, self.writer):
            os.close(end)

    def record(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self.raise_if_ending()

    def requested(self) -> bool:
        """Whether a stop was requested; from any thread, also while the main thread does not run its handlers."""
        with suppress(OSError):  # an empty pipe
            for number in os.read(self.reader, 64):
                if number in STOP_SIGNALS and not self.name:
                    self.name = signal.Signals(number).name
        return bool(self.name)

    @contextmanager
    def ending(self, phase: str) -> Iterator[None]:
        """Within the context a stop request, also one that was made before, raises StopRequested in the main thread.

        `phase`: when that was, for the message, e.g. "before the first step".
        """
        self.phase, self.is_ending = phase, True
        try:
            self.requested()
            self.raise_if_ending()
            yield
        finally:
            self.is_ending = False

    def raise_if_ending(self) -> None:
        if self.name and self.is_ending:
            self.is_ending = False  # the first request ends it; torchrun repeats its signals
            raise StopRequested(f"by {self.name} {self.phase}; the same command starts it again")

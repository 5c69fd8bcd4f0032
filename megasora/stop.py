"""Stop requests: SIGTERM (a person, a preemption) or SIGUSR1 (a time limit is near).

The signal handler only records the request. The trainer all-reduces the requests of all ranks with the sums of each
step, so that all ranks stop after the same step, save a checkpoint there and exit with `errors.STOPPED`.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from megasora.errors import StopRequested

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Context in which stop signals do not end the process. `name`: the last signal received, or empty."""

    def __init__(self) -> None:
        self.name = ""

    def __enter__(self) -> StopSignal:
        self.previous_handlers = {number: signal.signal(number, self.record) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stopping = kind is not None and issubclass(kind, StopRequested)
        for number, handler in self.previous_handlers.items():
            # torchrun signals processes again while they exit; ignore that, so that the exit code stays STOPPED
            signal.signal(number, signal.SIG_IGN if stopping else handler)

    def record(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def requested(self) -> bool:
        return bool(self.name)

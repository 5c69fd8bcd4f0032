"""A request to stop: SIGTERM (a person, a preemption) or SIGUSR1 (a time limit is near).

The signal is only noted here. The trainer adds the notes of all processes to a sum that every step makes anyway, so
that all stop after the same step, whichever of them was asked; it saves there and ends with `errors.STOPPED`.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from megasora.errors import StopRequested

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """`with StopSignal() as stop:` the signals do not end the process; `stop.name` says which came, or is empty."""

    def __init__(self) -> None:
        self.name = ""

    def __enter__(self) -> StopSignal:
        self.before = {number: signal.signal(number, self.note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stopping = kind is not None and issubclass(kind, StopRequested)
        for number, handler in self.before.items():
            # the launcher asks those that still end once more, up to their last moment: their exit code shall be ours
            signal.signal(number, signal.SIG_IGN if stopping else handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def requested(self) -> bool:
        return bool(self.name)

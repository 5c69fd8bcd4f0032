"""Seconds of each phase of a step. GPU times are read from CUDA events, so measuring does not synchronize a phase."""

from __future__ import annotations

import time

import torch


class Laps:
    """The phases of one step: (name, time at its end), the first one nameless."""

    def __init__(self, start: object):
        self.times: list[tuple[str, object]] = [("", start)]

    def seconds(self) -> dict[str, float]:
        """Seconds by name, with their sum under `step`. Waits for a GPU until it is at the end of the last phase."""
        on_gpu = isinstance(self.times[-1][1], torch.cuda.Event)
        if on_gpu:
            self.times[-1][1].synchronize()
        seconds: dict[str, float] = {}
        for (_, start), (name, end) in zip(self.times[:-1], self.times[1:], strict=True):
            seconds[name] = seconds.get(name, 0.0) + (start.elapsed_time(end) / 1000 if on_gpu else end - start)
        (_, first), (_, last) = self.times[0], self.times[-1]
        seconds["step"] = first.elapsed_time(last) / 1000 if on_gpu else last - first
        return seconds


class Stopwatch:
    """`lap(name)` ends a phase; `end_step` returns the phases since the last one, and starts the next step there."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.laps = Laps(self.now())

    def now(self) -> object:
        """The present time, in seconds, or a recorded CUDA event."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        self.laps.times.append((name, self.now()))

    def end_step(self) -> Laps:
        laps, self.laps = self.laps, Laps(self.laps.times[-1][1])
        return laps

    def restart(self) -> None:
        """Starts the next step now: what was since the last one belongs to none."""
        self.laps = Laps(self.now())

"""Seconds of each phase of a step. GPU times are read from CUDA events, so measuring does not synchronize a phase."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """`lap(name)` adds the time since the previous lap to `name`; `read` returns all times and starts the next step."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.laps: list[tuple[str, object]] = [("", self.now())]

    def now(self) -> object:
        """The present time, in seconds, or a recorded CUDA event."""
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        self.laps.append((name, self.now()))

    def read(self) -> dict[str, float]:
        """Seconds by name since the previous `read`, with their sum under `step`. Synchronizes the GPU."""
        if self.gpu:
            torch.cuda.synchronize()
        times: dict[str, float] = {}
        for (_, start), (name, end) in zip(self.laps[:-1], self.laps[1:], strict=True):
            times[name] = times.get(name, 0.0) + self.seconds_between(start, end)
        times["step"] = self.seconds_between(self.laps[0][1], self.laps[-1][1])
        self.laps = [("", self.laps[-1][1])]
        return times

    def seconds_between(self, start, end) -> float:
        return start.elapsed_time(end) / 1000 if self.gpu else end - start

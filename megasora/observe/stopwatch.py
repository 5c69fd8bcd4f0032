"""Seconds of a step by part, without stopping the GPU: its time is read from events after the step."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """`lap(name)` books the time since the last lap on `name`; `read` returns all of them and starts anew."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.laps: list[tuple[str, object]] = [("", self.now())]

    def now(self) -> object:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        self.laps.append((name, self.now()))

    def read(self) -> dict[str, float]:
        """Seconds by name, and of all together under `step`."""
        if self.gpu:
            torch.cuda.synchronize()
        times: dict[str, float] = {}
        for (_, start), (name, end) in zip(self.laps[:-1], self.laps[1:], strict=True):
            times[name] = times.get(name, 0.0) + self.between(start, end)
        times["step"] = self.between(self.laps[0][1], self.laps[-1][1])
        self.laps = [("", self.laps[-1][1])]
        return times

    def between(self, start, end) -> float:
        return start.elapsed_time(end) / 1000 if self.gpu else end - start

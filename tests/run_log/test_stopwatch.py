"""Phases of a step: their seconds, and what belongs to none; numbers on their way to the host."""

from __future__ import annotations

import torch

from megasora.run_log import stopwatch
from megasora.run_log.device_numbers import DeviceNumbers, numbers_on
from megasora.run_log.stopwatch import Stopwatch

CPU = torch.device("cpu")


def test_phases_of_one_name_add_up_and_a_step_ends_where_the_next_begins(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(now))
    watch = Stopwatch(CPU)
    for phase in ("data", "forward", "data", "optimizer"):
        watch.lap(phase)
    first = watch.end_step()
    watch.lap("data")
    second = watch.end_step()
    watch.restart()  # at 21: six seconds belong to no step
    watch.lap("data")
    assert first.seconds() == {"data": 4.0, "forward": 2.0, "optimizer": 4.0, "step": 10.0}
    assert second.seconds() == {"data": 5.0, "step": 5.0}
    assert watch.end_step().seconds() == {"data": 7.0, "step": 7.0}


def test_a_device_numbers_has_the_values_of_the_time_at_which_it_was_made():
    values = numbers_on([1.5, float("inf")], CPU)
    copy = DeviceNumbers(values)
    values.zero_()
    assert values.dtype == torch.float64 and copy.read() == [1.5, float("inf")]

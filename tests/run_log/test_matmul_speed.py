"""The speed that MFU is relative to: measured when warm, once on a machine, and again after a change."""

import json
import multiprocessing
import time

import pytest

from megasora.run_log import matmul_speed
from megasora.run_log.matmul_speed import TIMED_CALLS, WARMUP_CALLS, WARMUP_SECONDS, cached, read, warm_seconds

KEY = {"gpu": "NVIDIA H100", "driver": "580.82", "torch": "2.11.0", "cuda": "13.0", "size": 8192}


class Clock:
    """A GPU whose calls take 3 times as long until it has been busy for `ramp` seconds."""

    def __init__(self, call: float, ramp: float):
        self.call, self.ramp, self.busy, self.counts = call, ramp, 0.0, []

    def seconds(self, calls):
        self.counts.append(calls)
        before = self.busy
        for _ in range(calls):
            self.busy += self.call * (3 if self.busy < self.ramp else 1)
        return self.busy - before


@pytest.mark.parametrize("call", [1e-4, 1.5e-3, 0.1])
def test_only_warm_calls_are_timed(call):
    clock = Clock(call, ramp=0.4)
    assert warm_seconds(clock.seconds) == pytest.approx(call)
    *warm_up, timed = clock.counts
    assert timed == TIMED_CALLS and sum(warm_up) >= WARMUP_CALLS
    assert clock.busy - timed * call >= WARMUP_SECONDS - 1e-9


def count_calls(results):
    results = iter(results)
    calls = []
    return calls, lambda: calls.append(next(results)) or calls[-1]


def test_a_machine_is_measured_once(tmp_path):
    path = tmp_path / "cache" / "speed.json"
    calls, measure = count_calls([5e14, 6e14])
    assert [cached(path, KEY, measure) for _ in range(3)] == [5e14] * 3 and calls == [5e14]
    assert [file.name for file in path.parent.iterdir()] == ["speed.json"]


@pytest.mark.parametrize("changed", KEY)
def test_a_change_of_the_machine_is_measured_again(tmp_path, changed):
    path = tmp_path / "speed.json"
    calls, measure = count_calls([5e14, 6e14])
    cached(path, KEY, measure)
    assert cached(path, {**KEY, changed: "other"}, measure) == 6e14
    assert read(path, {**KEY, changed: "other"}) == 6e14 and read(path, KEY) is None


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"7", b"\xff\xfe", json.dumps(KEY).encode()),
        *(json.dumps({**KEY, "flops_per_s": x}).encode() for x in (None, 0, -1.0, float("nan"), float("inf"), "", [])),
    ],
)
def test_a_damaged_file_is_measured_again(tmp_path, content):
    path = tmp_path / "speed.json"
    path.write_bytes(content)
    assert cached(path, KEY, lambda: 5e14) == 5e14 and read(path, KEY) == 5e14


def test_without_a_place_for_the_file_the_speed_is_measured_each_time(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "speed.json"  # its folder cannot be made
    calls, measure = count_calls([5e14, 6e14])
    assert [cached(path, KEY, measure) for _ in range(2)] == [5e14, 6e14]


def test_a_failed_measurement_is_an_error_and_leaves_no_file(tmp_path):
    def measure():
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error"):
        cached(tmp_path / "speed.json", KEY, measure)
    assert not list(tmp_path.glob("*"))


def measure_slowly(path, log, value):
    def measure():
        with open(log, "a") as file:
            file.write(f"{value}\n")
        time.sleep(0.2)
        return value

    with open(log + ".results", "a") as file:
        file.write(f"{cached(path, KEY, measure)}\n")


def test_of_several_processes_one_measures_and_the_others_wait(tmp_path):
    context, log = multiprocessing.get_context("fork"), str(tmp_path / "log")
    path = tmp_path / "cache" / "speed.json"
    processes = [context.Process(target=measure_slowly, args=(path, log, 1e14 + rank)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    (measured,) = open(log).read().split()
    assert open(log + ".results").read().split() == [measured] * 3


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert matmul_speed.cache_folder() == tmp_path / "megasora"
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", "/home/x")
        assert str(matmul_speed.cache_folder()) == "/home/x/.cache/megasora"

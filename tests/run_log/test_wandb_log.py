"""Every line reaches Weights & Biases; if wandb is absent, fails or hangs, the run does not wait for it."""

from __future__ import annotations

import sys
import threading
import time
import types
from pathlib import Path

import pytest

from megasora.config import WandbConfig
from megasora.run_log import wandb_log
from megasora.run_log.wandb_log import WandbLog

OFFLINE = WandbConfig(mode="offline")
SOON = 10.0  # seconds: upper bound of "without waiting" on a busy machine


class FakeRun:
    def __init__(self):
        self.logged: list[tuple[int, dict]] = []
        self.finished = False

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def install(monkeypatch, init) -> None:
    fake = types.ModuleType("wandb")
    fake.init, fake.Settings = init, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "wandb", fake)


def log_a_run(tmp_path: Path, config: WandbConfig = OFFLINE, lines: int = 3) -> tuple[WandbLog, float]:
    """Logs some lines; returns the log and the seconds that this took."""
    start = time.monotonic()
    log = WandbLog(config, tmp_path, {"run.seed": 1})
    for step in range(lines):
        log.write(step, {"loss": step / 2})
    log.close()
    return log, time.monotonic() - start


@pytest.fixture
def release():
    """An event that a hanging thread waits for, set at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


def test_every_line_arrives_in_order_and_the_run_is_finished(tmp_path, monkeypatch):
    run, init_arguments = FakeRun(), {}

    def init(**arguments):
        init_arguments.update(arguments)
        return run

    install(monkeypatch, init)
    log, _ = log_a_run(tmp_path / "my-run", WandbConfig(mode="online", project="shapes"), lines=500)
    assert run.logged == [(step, {"loss": step / 2}) for step in range(500)]
    assert run.finished and log.warning is None
    assert {k: init_arguments[k] for k in ("mode", "project", "name", "config")} == {
        "mode": "online", "project": "shapes", "name": "my-run", "config": {"run.seed": 1}
    }  # fmt: skip


def test_disabled_mode_does_not_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log, _ = log_a_run(tmp_path, WandbConfig(mode="disabled"))
    assert log.warning is None


def test_a_missing_wandb_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log, seconds = log_a_run(tmp_path)
    assert "ModuleNotFoundError" in log.warning and "\n" not in log.warning
    assert seconds < SOON


def test_a_failing_init_is_one_warning(tmp_path, monkeypatch):
    def init(**_):
        raise OSError("no permission to write [/tmp]")

    install(monkeypatch, init)
    log, seconds = log_a_run(tmp_path)
    assert log.warning == "wandb: OSError: no permission to write [/tmp]"
    assert seconds < SOON


def test_an_init_that_exits_the_interpreter_is_one_warning(tmp_path, monkeypatch):
    install(monkeypatch, lambda **_: sys.exit(3))
    log, _ = log_a_run(tmp_path)
    assert log.warning == "wandb: SystemExit: 3"


def test_a_failing_log_call_is_one_warning_and_later_lines_are_ignored(tmp_path, monkeypatch):
    run = FakeRun()
    run.log = lambda values, step: 1 / 0
    install(monkeypatch, lambda **_: run)
    log, seconds = log_a_run(tmp_path, lines=50)
    assert "ZeroDivisionError" in log.warning and seconds < SOON


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_hang_delays_the_run_by_no_more_than_the_close_timeout(where, tmp_path, monkeypatch, release):
    run = FakeRun()

    def hang(*_, **__):
        release.wait(60)
        return run

    install(monkeypatch, hang if where == "init" else lambda **_: run)
    if where != "init":
        setattr(run, where, hang)
    monkeypatch.setattr(wandb_log, "CLOSE_SECONDS", 0.2)
    log, seconds = log_a_run(tmp_path)
    assert 0.2 <= seconds < SOON
    assert "did not finish" in log.warning
    assert log.thread.daemon  # the interpreter does not wait for it


def test_lines_beyond_the_queue_are_dropped_without_waiting(tmp_path, monkeypatch, release):
    install(monkeypatch, lambda **_: release.wait(60))
    monkeypatch.setattr(wandb_log, "CLOSE_SECONDS", 0.2)
    start, log = time.monotonic(), WandbLog(OFFLINE, tmp_path, {})
    for step in range(10_500):
        log.write(step, {})
    assert "queue is full" in log.warning and log.queue.qsize() == 10_000
    log.close()
    assert "did not finish" in log.warning and "lost" in log.warning
    assert time.monotonic() - start < SOON


def test_closing_a_full_queue_waits_for_space(tmp_path, monkeypatch, release):
    run = FakeRun()

    def init(**_):
        release.wait(60)
        return run

    install(monkeypatch, init)
    monkeypatch.setattr(wandb_log, "MAX_QUEUED", 2)
    log = WandbLog(OFFLINE, tmp_path, {})
    for step in range(2):
        log.write(step, {"loss": step})
    threading.Timer(0.2, release.set).start()
    log.close()
    assert [step for step, _ in run.logged] == [0, 1] and run.finished and log.warning is None


def test_offline_mode_writes_into_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_log, "CLOSE_SECONDS", 60.0)
    log, _ = log_a_run(tmp_path)
    assert log.warning is None
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert written.stat().st_size > 0

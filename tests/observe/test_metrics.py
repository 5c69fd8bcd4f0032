"""What a run tells: every line arrives, and Weights & Biases, absent, failing or hanging, never holds the run up."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from megasora.config import WandbConfig
from megasora.observe import metrics
from megasora.observe.metrics import JsonLines, ProgressLine, WandbLog

OFFLINE = WandbConfig(mode="offline")
SOON = 10.0  # seconds: what "at once" may take on a busy machine


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- lines in a file


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(3):
        lines.write({"step": step, "loss": 1 / (step + 1), "mfu": None, "text": "a\nb — ü"})
        assert len(read(tmp_path / "metrics.jsonl")) == step + 1
    assert read(tmp_path / "metrics.jsonl")[2] == {"step": 2, "loss": 1 / 3, "mfu": None, "text": "a\nb — ü"}
    lines.close()


def test_a_resumed_run_appends(tmp_path):
    for step in (1, 2):
        lines = JsonLines(tmp_path / "metrics.jsonl")
        lines.write({"step": step})
        lines.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_line_torn_by_a_kill_does_not_swallow_the_next_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    lines = JsonLines(path)
    lines.write({"step": 2})
    lines.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2, "lo\n{"step": 2}\n'


# ---------------------------------------------------------------- the progress line


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to."""
    now = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now.seconds)
    return now


def test_without_a_terminal_a_plain_line_comes_every_quarter_of_a_minute_and_at_the_end(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = ProgressLine(total=100, done=40)
    for step in range(41, 101):
        clock.seconds += 1.0
        progress.update(step, f"loss {step}")
    progress.close()
    lines = sys.stderr.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["41/100", "56/100", "71/100", "86/100", "100/100"]
    assert lines[1] == "step 56/100  loss 56  0.7 min left"  # 44 steps at 1 s, counted from the resume
    assert lines[-1] == "step 100/100  loss 100  0.0 min left"


def test_messages_are_lines_of_their_own(capsys):
    progress = ProgressLine(total=10, done=0)
    progress.say("step 5: validation loss [/x] 1.5")
    assert capsys.readouterr().err == "step 5: validation loss [/x] 1.5\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_line_is_live_and_messages_are_not_markup(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = ProgressLine(total=10, done=0)
    progress.update(3, "loss 0.5")
    progress.say("wandb: [/x] [red] failed")
    progress.update(10, "loss 0.4")
    progress.close()
    shown = sys.stderr.getvalue()
    assert "wandb: [/x] [red] failed" in shown and "10/10" in shown and "loss 0.4" in shown


# ---------------------------------------------------------------- Weights & Biases


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
    """A run of some lines; the log, and the seconds that it took of the run."""
    start = time.monotonic()
    log = WandbLog(config, tmp_path, {"run.seed": 1})
    for step in range(lines):
        log.write(step, {"loss": step / 2})
    log.close()
    return log, time.monotonic() - start


@pytest.fixture
def release():
    """What a hanging thread waits for; let go at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


def test_every_line_arrives_in_order_and_the_run_is_finished(tmp_path, monkeypatch):
    run, given = FakeRun(), {}

    def init(**arguments):
        given.update(arguments)
        return run

    install(monkeypatch, init)
    log, _ = log_a_run(tmp_path / "my-run", WandbConfig(mode="online", project="shapes"), lines=500)
    assert run.logged == [(step, {"loss": step / 2}) for step in range(500)]
    assert run.finished and log.warning is None
    assert {k: given[k] for k in ("mode", "project", "name", "config")} == {
        "mode": "online", "project": "shapes", "name": "my-run", "config": {"run.seed": 1}
    }  # fmt: skip


def test_disabled_does_not_even_import_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log, _ = log_a_run(tmp_path, WandbConfig(mode="disabled"))
    assert log.warning is None


def test_its_absence_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log, seconds = log_a_run(tmp_path)
    assert "ModuleNotFoundError" in log.warning and "\n" not in log.warning
    assert seconds < SOON


def test_a_failing_start_is_one_warning(tmp_path, monkeypatch):
    def init(**_):
        raise OSError("no permission to write [/tmp]")

    install(monkeypatch, init)
    log, seconds = log_a_run(tmp_path)
    assert log.warning == "wandb: OSError: no permission to write [/tmp]"
    assert seconds < SOON


def test_a_start_that_exits_the_interpreter_is_one_warning(tmp_path, monkeypatch):
    install(monkeypatch, lambda **_: sys.exit(3))
    log, _ = log_a_run(tmp_path)
    assert log.warning == "wandb: SystemExit: 3"


def test_a_failing_line_is_one_warning_and_later_lines_are_ignored(tmp_path, monkeypatch):
    run = FakeRun()
    run.log = lambda values, step: 1 / 0
    install(monkeypatch, lambda **_: run)
    log, seconds = log_a_run(tmp_path, lines=50)
    assert "ZeroDivisionError" in log.warning and seconds < SOON


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_hang_costs_the_run_no_more_than_the_closing_time(where, tmp_path, monkeypatch, release):
    run = FakeRun()

    def hang(*_, **__):
        release.wait(60)
        return run

    install(monkeypatch, hang if where == "init" else lambda **_: run)
    if where != "init":
        setattr(run, where, hang)
    monkeypatch.setattr(metrics, "WANDB_CLOSE_SECONDS", 0.2)
    log, seconds = log_a_run(tmp_path)
    assert 0.2 <= seconds < SOON
    assert "did not finish" in log.warning
    assert log.thread.daemon  # the interpreter does not wait for it


def test_lines_that_it_cannot_take_are_dropped_and_not_waited_for(tmp_path, monkeypatch, release):
    install(monkeypatch, lambda **_: release.wait(60))
    monkeypatch.setattr(metrics, "WANDB_CLOSE_SECONDS", 0.2)
    log, seconds = log_a_run(tmp_path, lines=10_500)
    assert "queue is full" in log.warning and log.lines.qsize() == 10_000
    assert seconds < SOON


def test_offline_mode_writes_the_run_to_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "WANDB_CLOSE_SECONDS", 60.0)
    log, _ = log_a_run(tmp_path)
    assert log.warning is None
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert written.stat().st_size > 0

"""Every line reaches Weights & Biases; if wandb is absent, fails or hangs, the run does not wait for it.

`wandb` is a module of a few lines that the tests write, except in the last two.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from megasora.config import WandbConfig
from megasora.run_log import wandb_log
from megasora.run_log.wandb_log import WandbLog

OFFLINE, ONLINE = WandbConfig(mode="offline"), WandbConfig(mode="online", project="shapes")
SOON = 10.0  # seconds: upper bound of "without waiting" on a busy machine

FAKE = """
import json, os, sys, time
OUT = {out!r}

def write(*values):
    with open(OUT, "a") as file:
        file.write(json.dumps(values) + "\\n")

def Settings(**settings):
    return settings

class Run:
    def log(self, values, step):
        {log}
        write(step, values)

    def finish(self):
        {finish}
        write("finished")

def init(**arguments):
    write("init", arguments)
    {init}
    return Run()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(init=, log=, finish=): installs a wandb whose functions begin with these statements; returns what it did."""

    def install(init: str = "pass", log: str = "pass", finish: str = "pass", imported: str = ""):
        out = tmp_path / "calls.jsonl"
        (tmp_path / "module").mkdir()
        text = imported + FAKE.format(out=str(out), init=init, log=log, finish=finish)
        (tmp_path / "module" / "wandb.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "module"))
        return lambda: [json.loads(line) for line in out.read_text().splitlines()]

    return install


def log_a_run(run: Path, config: WandbConfig = OFFLINE, lines: int = 3) -> tuple[WandbLog, float]:
    """Logs some lines; returns the log and the seconds that this took."""
    start = time.monotonic()
    log = WandbLog(config, run, {"run.seed": 1})
    for step in range(lines):
        log.write(step, {"loss": step / 2})
    log.close()
    return log, time.monotonic() - start


def test_every_line_arrives_in_order_and_the_run_is_finished(tmp_path, fake):
    calls = fake()
    log, _ = log_a_run(tmp_path / "my-run", ONLINE, lines=500)
    (name, arguments), *lines, last = calls()
    assert lines == [[step, {"loss": step / 2}] for step in range(500)]
    assert (name, last, log.warning) == ("init", ["finished"], None)
    assert {k: arguments[k] for k in ("mode", "project", "name", "config")} == {
        "mode": "online", "project": "shapes", "name": "my-run", "config": {"run.seed": 1}
    }  # fmt: skip
    assert arguments["dir"] == str(tmp_path / "my-run")


def test_disabled_mode_starts_no_process(tmp_path):
    log, _ = log_a_run(tmp_path, WandbConfig(mode="disabled"))
    assert log.warning is None and log.process is None


def test_a_missing_wandb_is_one_warning(tmp_path, fake):
    fake(imported="raise ModuleNotFoundError('No module named wandb\\n...')\n")
    log, seconds = log_a_run(tmp_path)
    assert log.warning == "wandb: ModuleNotFoundError: No module named wandb" and seconds < SOON


@pytest.mark.parametrize(
    ("statement", "message"),
    [("raise OSError('no permission to write [/tmp]')", "OSError: no permission to write [/tmp]"),
     ("sys.exit(3)", "SystemExit: 3"), ("os._exit(3)", "its process ended with code 3")],
)  # fmt: skip
@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failure_is_one_warning(where, statement, message, tmp_path, fake):
    fake(**{where: statement})
    log, seconds = log_a_run(tmp_path, lines=50)
    assert log.warning == f"wandb: {message}" and seconds < SOON


def test_a_server_that_does_not_answer_makes_the_run_an_offline_one(tmp_path, fake):
    calls = fake(init="if arguments['mode'] == 'online': raise OSError('refused')")
    log, _ = log_a_run(tmp_path / "run", ONLINE)
    assert log.warning == (
        f"wandb: OSError: refused; logging offline, send it later: wandb sync {tmp_path}/run/wandb/offline-run-*"
    )
    assert [call[1]["mode"] for call in calls()[:2]] == ["online", "offline"]
    assert calls()[2:] == [[step, {"loss": step / 2}] for step in range(3)] + [["finished"]]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_hang_delays_the_run_by_no_more_than_the_close_timeout(where, tmp_path, monkeypatch, fake):
    fake(**{where: "time.sleep(1000)"})
    monkeypatch.setattr(wandb_log, "CLOSE_SECONDS", 0.5)
    log, seconds = log_a_run(tmp_path)
    assert 0.5 <= seconds < SOON
    assert "did not finish" in log.warning and f"wandb sync {tmp_path}/wandb/latest-run" in log.warning
    assert log.process.returncode == -signal.SIGKILL
    assert all(thread.daemon for thread in log.threads)  # the interpreter does not wait for them


def test_lines_beyond_the_queue_are_dropped_without_waiting(tmp_path, monkeypatch, fake):
    fake(init="time.sleep(1000)")
    monkeypatch.setattr(wandb_log, "CLOSE_SECONDS", 0.2)
    start, log = time.monotonic(), WandbLog(OFFLINE, tmp_path, {})
    for step in range(20_000):
        log.write(step, {})
    assert "queue is full" in log.warning and log.queue.qsize() > 9_000
    log.close()
    assert "did not finish" in log.warning
    assert time.monotonic() - start < SOON


def test_signals_to_all_processes_of_a_job_and_the_death_of_the_run_do_not_lose_lines(tmp_path, fake):
    calls = fake()
    log = WandbLog(OFFLINE, tmp_path, {})
    log.write(0, {"loss": 1.0})
    while not (tmp_path / "calls.jsonl").exists() or len(calls()) < 2:
        time.sleep(0.01)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        os.kill(log.process.pid, number)
    log.process.stdin.close()  # as when this process is killed
    assert log.process.wait(30) == 0 and calls()[-1] == ["finished"]


def test_offline_mode_writes_into_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_log, "CLOSE_SECONDS", 60.0)
    log, _ = log_a_run(tmp_path)
    assert log.warning is None
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert written.stat().st_size > 0


@pytest.mark.waits
def test_a_server_that_cannot_be_reached_holds_a_short_run_for_ten_seconds_at_most(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    log, seconds = log_a_run(tmp_path, ONLINE)
    assert seconds < wandb_log.CLOSE_SECONDS + 1.0
    assert "wandb sync" in log.warning and log.process.poll() is not None

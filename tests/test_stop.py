"""A stop request is recorded, all processes stop after the same step, save one checkpoint and exit with STOPPED."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import check_same_checkpoints, is_running, read_jsonl, train_arguments

from megasora.errors import CONFIGURATION, DONE, STOPPED, StopRequested
from megasora.stop import STOP_SIGNALS, StopSignal

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def restored_handler():
    """restored_handler(signal): its default handler, also where the tests run under nohup or in the background."""
    before = {}

    def set_default(number):
        handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        before[number] = signal.signal(number, handler)
        return handler

    yield set_default
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_recorded_and_does_not_end_the_process(number, restored_handler):
    handler = restored_handler(number)
    with StopSignal() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested() and stop.name == number.name
    assert signal.getsignal(number) is handler


def test_a_signal_that_is_ignored_stays_so():
    """nohup ignores SIGHUP, so that a run survives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_request_is_known_to_other_threads_before_the_main_thread_runs_its_handler():
    """The main thread may wait in a collective. Here the handler is the one that a C extension would delay."""
    with StopSignal() as stop:
        signal.signal(signal.SIGTERM, lambda *_: None)
        os.kill(os.getpid(), signal.SIGTERM)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(stop.requested).result()
        assert stop.name == "SIGTERM"


@pytest.mark.parametrize("moment", ["before", "within"])
def test_before_the_first_step_a_request_ends_the_process_at_once(moment):
    with pytest.raises(StopRequested, match="by SIGTERM before the first step; the same command"), StopSignal() as stop:
        if moment == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        with stop.ending("before the first step"):
            assert moment == "within"
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
            pytest.fail("the request was not followed")
    for number in STOP_SIGNALS:  # ignored while a stopped process ends
        signal.signal(number, signal.SIG_DFL)


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 100
    while not (run / "metrics.jsonl").is_file() or len(lines_of(run)) < count:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def lines_of(run: Path) -> list[bytes]:
    return (run / "metrics.jsonl").read_bytes().splitlines()


def test_a_request_to_one_process_stops_both_after_the_same_step_and_saves_once(shards, tiny, tmp_path):
    run = tmp_path / "run"
    settings = [*train_arguments(run, shards, tiny), "run.steps=300", "checkpoint.every=1000", "validation.every=1000"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start([*launcher, "-m", "megasora.train", *settings])
    wait_for_steps(run, 3, process)
    os.kill(rank_of(process, 1), signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    done = len(read_jsonl(run))
    assert 3 <= done < 300
    assert (run / "checkpoints" / "latest").read_text() == f"step-{done:08d}\n"
    assert [p.name for p in (run / "checkpoints").glob("*step-*")] == [f"step-{done:08d}"]
    recorded = json.loads((run / "exit.json").read_text())
    assert recorded["code"] == STOPPED and f"saved after step {done}" in recorded["reason"]
    assert f"exitcode  : {STOPPED}" in output and output.count("stopped on request, saved") == 1
    assert process.returncode == 1  # torchrun's own


def test_processes_of_a_killed_launcher_end_within_five_seconds(shards, tiny, tmp_path):
    run = tmp_path / "run"
    settings = [*train_arguments(run, shards, tiny), "run.steps=100000", "checkpoint.every=100000"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start([*launcher, "-m", "megasora.train", *settings, "validation.every=100000"])
    wait_for_steps(run, 3, process)
    ranks = [rank_of(process, rank) for rank in range(2)]
    process.kill()
    process.wait()
    end = time.monotonic() + 5
    while any(is_running(pid) for pid in ranks):
        assert time.monotonic() < end, f"processes {ranks} still run without their launcher"
        time.sleep(0.02)


def test_a_second_launch_on_a_run_folder_is_an_error_and_the_first_continues(shards, tiny, tmp_path):
    run = tmp_path / "run"
    settings = [*train_arguments(run, shards, tiny), "run.steps=100000", "checkpoint.every=100000"]
    command = ["megasora.train", *settings, "validation.every=100000"]
    first = start(command)
    wait_for_steps(run, 3, first)
    second = start(command)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == CONFIGURATION
    assert f"run.dir={run} is being written by process {first.pid} on " in output and "Traceback" not in output
    done = len(read_jsonl(run))
    wait_for_steps(run, done + 2, first)
    first.kill()
    first.wait()
    assert [line["step"] for line in read_jsonl(run)] == list(range(1, len(read_jsonl(run)) + 1))
    assert len(read_jsonl(run, "launches.jsonl")) == 1 and not (run / "exit.json").exists()
    code = subprocess.run([sys.executable, "-m", *command, "run.steps=2"], cwd=ROOT, capture_output=True, check=False)
    assert code.returncode == CONFIGURATION  # because of another number of steps, not because of the lock
    assert b"is being written" not in code.stderr


def rank_of(launcher: subprocess.Popen, rank: int) -> int:
    """Process id of a rank that torchrun started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    matches = [pid for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()]
    return int(matches[0])


def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(trained, shards, tiny, tmp_path):
    run = tmp_path / "run"
    arguments = ["megasora.train", *train_arguments(run, shards, tiny)]
    process = start(arguments)
    wait_for_steps(run, 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    first = len(read_jsonl(run))
    assert (process.returncode, first < 20) == (STOPPED, True), output
    process = start(arguments)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == DONE, output
    assert f"from step {first} to 20" in output
    assert [line["loss"] for line in read_jsonl(run)] == [line["loss"] for line in read_jsonl(trained)]
    check_same_checkpoints(run, trained, 20)
    exits = [json.loads(line)["previous_exit"] for line in (run / "launches.jsonl").read_text().splitlines()]
    assert exits[0] is None and exits[1]["code"] == STOPPED
    assert f"saved after step {first}" in exits[1]["reason"]
    assert json.loads((run / "exit.json").read_text())["code"] == DONE
    assert "from step" in (run / "logs" / "rank-00000.log").read_text()


def test_check_prints_the_run_folder_and_starts_no_run(shards, tiny, tmp_path, capsys):
    from megasora.train import main

    arguments = train_arguments(tmp_path / "run", shards, tiny)
    assert main(["--check", *arguments]) == DONE
    assert capsys.readouterr().out == f"{tmp_path / 'run'}\n"
    assert main(["--check", *arguments, "model.heads=3"]) == CONFIGURATION
    assert main(["--check"]) == CONFIGURATION
    assert not (tmp_path / "run").exists()

"""A hang is detected within its timeout, and the rank that hangs is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import train_arguments

from megasora import watchdog
from megasora.errors import CRASH, HANG, MegaSoraError
from megasora.run_log.launches import Launch, read_exit

RUN = """
import sys, time
from pathlib import Path
from megasora import watchdog
from megasora.run_log.launches import Launch

run, seconds, stop = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "stop"
watchdog.STOP_SECONDS = 2.0  # else 10
dog = watchdog.Watchdog(Launch(run, 0), 3, seconds, lambda: stop)
with dog.watching():
    dog.begin("building")
    for step in range(4):
        dog.heartbeat(f"step {step}")
        time.sleep(0.3)
    print("last heartbeat", flush=True)
    time.sleep(float(sys.argv[4]))
"""


def run_with_watchdog(run, seconds: float, stop: str, stuck: float) -> tuple[int, float, str]:
    """Exit code, seconds after the last heartbeat, standard error."""
    (run / "logs").mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-c", RUN, str(run), str(seconds), stop, str(stuck)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    (run / "logs" / "hang-00001").write_text("step 3")  # written by another process
    start = time.monotonic()
    _, error = process.communicate(timeout=60)
    return process.returncode, time.monotonic() - start, error


def test_a_run_with_heartbeats_is_not_ended(tmp_path):
    code, _, error = run_with_watchdog(tmp_path, 1.0, "no", 0.0)
    assert (code, error) == (0, "")


def test_a_run_without_heartbeats_ends_within_its_timeout_and_names_the_process_without_an_answer(tmp_path):
    code, seconds, error = run_with_watchdog(tmp_path, 1.0, "no", 60.0)
    assert code == HANG and seconds < 1.0 + watchdog.GATHER_SECONDS + 2.0
    recorded = read_exit(tmp_path)
    assert recorded["code"] == HANG
    reason = "no heartbeat for 1 s; process 2: no answer: stopped or dead; process 0, 1: step 3; stacks in"
    assert recorded["reason"].startswith(reason) and reason in error
    assert "Current thread" in error and 'File "<string>", line 16' in error  # the stack of the thread that sleeps


def test_a_process_that_cannot_follow_a_stop_request_is_ended(tmp_path):
    code, seconds, _ = run_with_watchdog(tmp_path, 100.0, "stop", 60.0)
    assert code == CRASH and 2.4 < seconds < 30  # 2 s and three activities of 0.3 s, one of them before the start
    assert "other processes are gone" in read_exit(tmp_path)["reason"]


def test_a_process_that_wakes_in_another_launch_goes_no_further(tmp_path):
    """Its next heartbeat comes before the next step, save or validation."""
    launch = Launch(tmp_path, 0)
    launch.begin(1)
    dog = watchdog.Watchdog(launch, 1, 540.0, lambda: False)
    dog.begin("step 6")
    dog.activity_start -= 100.0  # it was suspended for so long, but no other launch has begun
    dog.heartbeat("step 7")
    Launch(tmp_path, 0).begin(1)
    dog.heartbeat("step 8")  # too soon after the last for a launch to have begun: nothing is read
    dog.activity_start -= 100.0
    with pytest.raises(MegaSoraError, match="belongs to another launch since this process was suspended"):
        dog.heartbeat("the save after step 8")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_suspended_process_is_named_by_the_other(shards, tiny, tmp_path):
    run = tmp_path / "run"
    settings = ["run.steps=5000", "checkpoint.every=10000", "validation.every=10000", "run.hang_seconds=20"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    process = subprocess.Popen(
        [*launcher, "-m", "megasora.train", *train_arguments(run, shards, tiny), *settings],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_bytes().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = next(int(pid) for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(victim, signal.SIGSTOP)
    start = time.monotonic()
    while read_exit(run) is None:
        assert time.monotonic() - start < 60, "no hang was detected"
        time.sleep(0.1)
    os.kill(victim, signal.SIGKILL)  # as torchrun does after 30 s
    assert process.wait(timeout=60) == 1
    recorded = json.loads((run / "exit.json").read_text())
    assert recorded["code"] == HANG
    assert "process 1: no answer: stopped or dead; process 0: step" in recorded["reason"]
    assert "Current thread" in (run / "logs" / "rank-00000.log").read_text()

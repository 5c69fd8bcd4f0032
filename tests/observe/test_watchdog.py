"""A hang is found within its time, and who hangs is named."""

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

from megasora.errors import CRASH, HANG
from megasora.observe import watchdog
from megasora.observe.launches import read_exit

RUN = """
import sys, time
from pathlib import Path
from megasora.observe import watchdog

run, seconds, asked = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "asked"
watchdog.STOP_SECONDS = 2.0  # else 10
dog = watchdog.Watchdog(run, 0, 3, seconds, lambda: asked)
with dog.watching():
    for step in range(4):
        dog.moved(f"step {step}")
        time.sleep(0.3)
    print("moved", flush=True)
    time.sleep(float(sys.argv[4]))
"""


def watched(run, seconds: float, asked: str, stuck: float) -> tuple[int, float, str]:
    """Exit code, seconds after the last move, standard error."""
    (run / "logs").mkdir(parents=True, exist_ok=True)
    (run / "logs" / "hang-00001").write_text("step 3")  # what another process has said
    words = [sys.executable, "-c", RUN, str(run), str(seconds), asked, str(stuck)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    start = time.monotonic()
    _, error = process.communicate(timeout=60)
    return process.returncode, time.monotonic() - start, error


def test_a_run_that_moves_is_left_alone(tmp_path):
    code, _, error = watched(tmp_path, 1.0, "no", 0.0)
    assert (code, error) == (0, "")


def test_a_run_that_does_not_move_ends_within_its_time_and_names_the_silent_process(tmp_path):
    code, seconds, error = watched(tmp_path, 1.0, "no", 60.0)
    assert code == HANG and seconds < 1.0 + watchdog.GATHER_SECONDS + 2.0
    told = read_exit(tmp_path)
    assert told["code"] == HANG
    words = "no move for 1 s; process 2: silent, stopped or gone; process 0, 1: at step 3; stacks in"
    assert told["reason"].startswith(words) and words in error
    assert "Current thread" in error and 'File "<string>", line 14' in error  # the stack of the thread that sleeps


def test_a_process_that_was_asked_to_stop_is_not_waited_for_when_others_are_gone(tmp_path):
    code, seconds, _ = watched(tmp_path, 100.0, "asked", 60.0)
    assert code == CRASH and 2.4 < seconds < 30  # 2 s and three moves of 0.3 s, of which one is before the start
    assert "others are gone" in read_exit(tmp_path)["reason"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_stopped_process_of_a_run_is_named_by_the_other(shards, tiny, tmp_path):
    run = tmp_path / "run"
    settings = ["run.steps=5000", "checkpoint.every=10000", "validation.every=10000", "run.hang_seconds=8"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launcher, "--shutdown-timeout", "1", "-m", "megasora.train", *train_arguments(run, shards, tiny), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_bytes().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = next(int(pid) for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(victim, signal.SIGSTOP)
    start = time.monotonic()
    while read_exit(run) is None:
        assert time.monotonic() - start < 40, "not found"
        time.sleep(0.1)
    os.kill(victim, signal.SIGKILL)  # torchrun does so too, after 30 s
    assert process.wait(timeout=60) == 1
    told = json.loads((run / "exit.json").read_text())
    assert told["code"] == HANG and "process 1: silent, stopped or gone; process 0: at step" in told["reason"]
    assert "Current thread" in (run / "logs" / "rank-00000.log").read_text()

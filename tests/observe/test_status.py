"""What `megasora status` reads from a run folder, alive or dead."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time

import pytest

from megasora.cli import main
from megasora.errors import CONFIGURATION, CRASH, STOPPED, MegaSoraError
from megasora.observe.launches import EXIT, begin_launch, note_exit, read_exit
from megasora.observe.rank_log import rank_log
from megasora.observe.status import read_status


@pytest.fixture
def run(tmp_path):
    """A run of 100 steps in its third launch; the first was stopped, the second killed."""
    folder = tmp_path / "run"
    begin_launch(folder, 4)
    note_exit(folder, STOPPED, "saved after step 3", 0)
    begin_launch(folder, 4)
    begin_launch(folder, 4)
    (folder / "config.yaml").write_text("run:\n  steps: 100\n  unknown: 1\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text("step-00000006\n")
    line = {"step": 7, "loss": 1.25, "grad_norm": 0.5, "tokens_per_second": 4321.0, "mfu": 0.4, "time_step": 0.5}
    text = json.dumps(line | {"step": 6}) + "\n" + json.dumps(line) + "\n" + '{"step": 8, "lo'
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_a_live_run_shows_its_step_figures_checkpoint_and_the_reason_of_each_restart(run, capsys):
    status = read_status(run)
    assert status.alive and status.state.startswith("running")
    assert (status.step, status.steps) == (7, 100)
    assert status.figures["loss"] == 1.25 and status.figures["mfu"] == 0.4
    assert status.checkpoint.startswith("step-00000006")
    ends = [end for _, _, end in status.launches]
    assert ends == [
        "stopped on request: saved after step 3 (process 0)",
        "killed: no process has said why",
        status.state,
    ]
    assert main(["status", str(run)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("7 of 100 (7%)", "about 46 s left", "1.2500", "4,321", "40.0%", "step-00000006", "restarts │ 2"):
        assert words in shown


def test_a_silent_run_is_dead_when_its_steps_were_faster_than_its_silence(run):
    now = time.time()
    assert read_status(run, now + 110).alive
    assert not read_status(run, now + 130).alive
    slow = json.dumps({"step": 8, "loss": 1.0, "time_step": 60.0})
    (run / "metrics.jsonl").write_text(slow + "\n")
    assert read_status(run, now + 1000).alive and not read_status(run, now + 1300).alive


def test_a_run_whose_process_is_gone_from_this_machine_is_dead_at_once(run):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    text = (run / "launches.jsonl").read_text()
    assert f'"host": "{platform.node()}"' in text
    (run / "launches.jsonl").write_text(text.replace(f'"pid": {os.getpid()}', f'"pid": {gone.pid}'))
    status = read_status(run)
    assert not status.alive and status.state.startswith("dead")


def test_a_run_that_has_ended_shows_the_reason_of_the_first_process_that_said_one(run):
    note_exit(run, CONFIGURATION, "it was saved by another layout", 3)
    note_exit(run, CRASH, "RuntimeError: connection closed", 0)
    status = read_status(run)
    assert not status.alive and status.state == "refused: it was saved by another layout (process 3)"
    begin_launch(run, 4)
    assert read_status(run).alive and read_exit(run) is None


def test_a_crash_gives_way_to_a_reason_that_comes_within_a_second(run):
    crash = threading.Thread(target=note_exit, args=(run, CRASH, "RuntimeError: connection closed", 0))
    crash.start()
    time.sleep(0.2)
    note_exit(run, STOPPED, "saved after step 7", 1)
    crash.join()
    assert read_exit(run)["code"] == STOPPED


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    for folder, word in ((tmp_path / "none", "no run folder"), (tmp_path, "nothing was started here")):
        with pytest.raises(MegaSoraError, match=word):
            read_status(folder)
        assert main(["status", str(folder)]) == CONFIGURATION


def test_watch_ends_with_the_run(run, capsys):
    note_exit(run, 0, "100 steps", 0)
    start = time.monotonic()
    assert main(["status", str(run), "--watch"]) == 0
    assert time.monotonic() - start < 2 and "done: 100 steps" in capsys.readouterr().out


def test_an_exit_that_cannot_be_written_is_no_error_of_its_own(tmp_path):
    note_exit(tmp_path / "nowhere", STOPPED, "", 0)
    (tmp_path / EXIT).write_text("{torn")
    assert read_exit(tmp_path) is None


@pytest.mark.parametrize("rank", [0, 3])
def test_what_a_process_prints_is_in_its_file_and_the_first_ones_in_the_output_too(rank, tmp_path, capfd):
    for word in ("once", "again"):  # a second launch appends
        with rank_log(tmp_path, rank):
            os.write(1, f"out {word}\n".encode())
            os.write(2, f"error {word}\n".encode())
        os.write(2, b"after\n")
    text = (tmp_path / "logs" / f"rank-{rank:05d}.log").read_text()
    assert text == "out once\nerror once\nout again\nerror again\n"
    shown = capfd.readouterr().err
    assert shown == ("out once\nerror once\nafter\nout again\nerror again\nafter\n" if rank == 0 else "after\nafter\n")

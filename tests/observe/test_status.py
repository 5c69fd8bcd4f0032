"""`megasora status` shows the state of a run from its folder."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time

import pytest

from megasora.cli import main
from megasora.errors import CONFIGURATION, CRASH, STOPPED, MegaSoraError
from megasora.observe.status import build_table, read_status
from megasora.run_log.launches import Launch, newest_launch, read_exit


@pytest.fixture
def run(tmp_path):
    """A run of 100 steps in its third launch; the first was stopped, the second killed."""
    folder = tmp_path / "run"
    first = Launch(folder, 0)
    first.begin(4)
    first.record_exit(STOPPED, "saved after step 3")
    Launch(folder, 0).begin(4)
    Launch(folder, 0).begin(4)
    (folder / "config.yaml").write_text("run:\n  steps: 100\n  unknown: 1\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text("step-00000006\n")
    line = {"step": 7, "loss": 1.25, "grad_norm": 0.5, "tokens_per_second": 4321.0, "mfu": 0.4, "time_step": 0.5}
    text = json.dumps(line | {"step": 6}) + "\n" + json.dumps(line) + "\n" + '{"step": 8, "lo'
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_a_live_run_shows_its_step_figures_checkpoint_and_how_each_launch_ended(run, capsys):
    status = read_status(run)
    assert status.alive and status.state.startswith("running")
    assert (status.step, status.steps) == (7, 100)
    assert status.figures["loss"] == 1.25 and status.figures["mfu"] == 0.4
    assert status.checkpoint.startswith("step-00000006")
    ends = [end for _, _, end in status.launches]
    assert ends == [
        "stopped on request: saved after step 3",
        "killed: no process recorded a reason",
        status.state,
    ]
    assert main(["status", str(run)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("7 of 100 (7%)", "about 46 s left", "1.2500", "4,321", "40.0%", "step-00000006", "restarts │ 2"):
        assert words in shown


@pytest.mark.parametrize(
    "content, shown", [('{"notices": ["FP8 is emulated", 3]}', "FP8 is emulated"), ("[", ""), ("{}", "")]
)
def test_notices_of_a_run_are_shown_if_its_file_can_be_read(content, shown, run, capsys):
    (run / "run.json").write_text(content)
    assert read_status(run).notices == [shown] * bool(shown)
    assert main(["status", str(run)]) == 0
    assert ("│ notice " in capsys.readouterr().out) == bool(shown)


def test_a_run_is_dead_after_a_silence_much_longer_than_its_steps(run):
    now = time.time()
    assert read_status(run, now + 110).alive
    assert not read_status(run, now + 130).alive
    slow = json.dumps({"step": 8, "loss": 1.0, "time_step": 60.0})
    (run / "metrics.jsonl").write_text(slow + "\n")
    assert read_status(run, now + 1000).alive and not read_status(run, now + 1300).alive


def test_a_run_whose_process_on_this_machine_is_gone_is_dead_immediately(run):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    text = (run / "launches.jsonl").read_text()
    assert f'"host": "{platform.node()}"' in text
    (run / "launches.jsonl").write_text(text.replace(f'"pid": {os.getpid()}', f'"pid": {gone.pid}'))
    status = read_status(run)
    assert not status.alive and status.state.startswith("dead")


def test_a_run_that_has_ended_shows_the_first_recorded_reason(run):
    third, first = Launch(run, 3), Launch(run, 0)
    third.id = first.id = newest_launch(run)
    third.record_exit(CONFIGURATION, "it was saved by another layout")
    first.record_exit(CRASH, "RuntimeError: connection closed")
    status = read_status(run)
    assert not status.alive and status.state == "invalid configuration: it was saved by another layout (process 3)"
    Launch(run, 0).begin(4)
    assert read_status(run).alive and read_exit(run) is None


def test_slow_ranks_of_the_newest_launch_are_shown_while_it_runs(run, capsys):
    line = {"time": time.time() + 1, "step": 9, "ranks": [3], "hosts": ["node1"], "seconds": [2.1], "others": [0.42]}
    path = run / "slow_ranks.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert read_status(run).slow == "process 3 on node1: 2.1 s per step, the others 0.42 s"
    assert main(["status", str(run)]) == 0
    assert "process 3 on node1: 2.1 s per step" in " ".join(capsys.readouterr().out.split())
    path.write_text(json.dumps(line | {"time": time.time() - 1000}) + "\n")  # of an earlier launch
    assert read_status(run).slow == ""
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"ranks": [], "hosts": []}) + "\n")
    assert read_status(run).slow == ""


def test_a_folder_that_is_no_run_is_an_error(tmp_path, capsys):
    for folder, word in ((tmp_path / "none", "no run folder"), (tmp_path, "nothing was started here")):
        with pytest.raises(MegaSoraError, match=word):
            read_status(folder)
        assert main(["status", str(folder)]) == CONFIGURATION


def test_watch_ends_with_the_run(run, capsys):
    launch = Launch(run, 0)
    launch.begin(4)
    launch.record_exit(0, "100 steps")
    start = time.monotonic()
    assert main(["status", str(run), "--watch"]) == 0
    assert time.monotonic() - start < 2 and "done: 100 steps" in capsys.readouterr().out


HOSTILE = [None, True, -1, 10**400, 1e308, "x", [], {}, "9" * 5000, {"a": 1}]


@pytest.mark.parametrize("file", ["launches.jsonl", "metrics.jsonl", "exit.json"])
def test_a_hostile_value_of_a_file_is_left_out(file, run):
    launch = Launch(run, 0)
    launch.id = newest_launch(run)
    launch.record_exit(CRASH, "reason")
    line = (run / file).read_text().splitlines()[0]
    for text in ["[" * 100_000, "9" * 5000, "nul", *(json.dumps(value) for value in HOSTILE)]:
        (run / file).write_text(f"{line}\n{text}\n" if file != "exit.json" else text)
        build_table(run, read_status(run))
    values = json.loads(line)
    for key in values:
        for value in HOSTILE:
            (run / file).write_text(json.dumps({**values, key: value}) + "\n")
            build_table(run, read_status(run))


@pytest.mark.parametrize("steps", ["", "x", "1e3", "9" * 5000, "[1]", "-3"])
def test_a_hostile_number_of_steps_is_left_out(steps, run):
    (run / "config.yaml").write_text(f"run: {{steps: {steps}}}\n")
    assert read_status(run).steps is None

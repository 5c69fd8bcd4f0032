"""The start of a launch: what is wrong is said in seconds, a process that is missing is named, nothing waits for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megasora.errors import CONFIGURATION, HANG, STOPPED, MegaSoraError
from megasora.locks import locked
from megasora.parallel import rendezvous as rendezvous_module
from megasora.parallel.launcher import Launcher, check_meeting_point, read_launcher, resolve_problem
from megasora.parallel.rendezvous import Rendezvous
from megasora.run_log.launches import LOCK, Launch, read_exit
from megasora.train import main

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}

PROCESS = """
import sys
from megasora.config import load
from megasora.errors import MegaSoraError
from megasora.stop import StopSignal
from megasora.train import print_error, train

def build_task(config, world, mesh):
    raise MegaSoraError("no task")

try:
    with StopSignal() as stop:
        train(load(None, sys.argv[1:]), stop, build_task)
except MegaSoraError as error:
    sys.exit(print_error(error, error.exit_code))
"""


@pytest.fixture
def environment(monkeypatch):
    """Sets the launcher's variables to exactly the given ones."""

    def change(values: dict[str, str]) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return change


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---------------------------------------------------------------------- the environment


def test_a_process_knows_its_place():
    torchrun = {**TWO, "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert read_launcher(torchrun) == Launcher(1, 2, 1, 2, "127.0.0.1", 29500, True)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    assert read_launcher({}) == read_launcher(alone) == Launcher()
    assert read_launcher({"WORLD_SIZE": "1", "LOCAL_RANK": "3"}) == Launcher(local_rank=3)


WRONG = {
    "a size that is no number": ({**TWO, "WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' in the environment is no number"),
    "a negative rank": ({**TWO, "RANK": "-1"}, "RANK='-1' in the environment is no number"),
    "a number of 5,000 digits": ({**TWO, "RANK": "9" * 5000}, f"RANK='{'9' * 40}' in the environment is no number"),
    "a local rank that is no number": ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK='gpu0' in the environment is no number"),
    "a rank beyond the size": ({**TWO, "RANK": "2"}, "RANK=2 must be less than WORLD_SIZE=2"),
    "a local rank beyond the size": ({**TWO, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 must be less than LOCAL_WORLD_SIZE=2"),
    "a size without a rank": ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set in the environment, RANK is not"),
    "a rank without a size": ({"RANK": "0"}, "RANK=0 is set in the environment, WORLD_SIZE is not"),
    "no place to meet": (
        {"RANK": "0", "WORLD_SIZE": "2"},
        "RANK=0 and WORLD_SIZE=2 are set in the environment, MASTER_ADDR and MASTER_PORT not",
    ),
    "no port": (TWO, "RANK=1 and WORLD_SIZE=2 are set in the environment, MASTER_PORT not"),
}


@pytest.mark.parametrize("case", WRONG)
def test_variables_left_in_the_environment_are_one_line_with_the_remedy(
    case, environment, tmp_path, capsys, monkeypatch
):
    variables, message = WRONG[case]
    environment(variables)
    monkeypatch.setattr("megasora.train.MAIN_PRINTS_SECONDS", 0.0)
    assert main([str(ROOT / "configs" / "dit_s.yaml"), f"run.dir={tmp_path / 'run'}"]) == CONFIGURATION
    said = capsys.readouterr().err
    assert said.startswith(f"megasora: error: {message}") and said.count("\n") == 1
    assert "start the processes with torchrun" in said and "unset RANK WORLD_SIZE" in said
    assert not (tmp_path / "run").exists()


def test_a_place_to_meet_that_does_not_resolve_is_named_in_seconds(monkeypatch):
    def fail(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(MegaSoraError) as error:
        check_meeting_point(Launcher(0, 2, address="node7", port=29500))
    assert str(error.value).startswith("MASTER_ADDR=node7 does not resolve (Name or service not known); on one machine")
    assert "--local-addr 127.0.0.1" in str(error.value)
    check_meeting_point(Launcher())  # alone, no name is asked for
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: time.sleep(30))
    assert resolve_problem("node7", seconds=0.1) == "no answer within 0 s"


def test_a_place_where_nothing_listens_is_one_line_in_seconds(monkeypatch):
    port = free_port()
    for is_torchrun in (True, False):
        monkeypatch.setattr(rendezvous_module, "TORCHRUN_SECONDS" if is_torchrun else "BY_HAND_SECONDS", 0.5)
        start = time.monotonic()
        with pytest.raises(MegaSoraError) as error:
            Rendezvous(Launcher(1, 2, address="127.0.0.1", port=port, is_torchrun=is_torchrun), 540.0).join()
        assert str(error.value).startswith(f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port} cannot be reached (")
        assert "\n" not in str(error.value) and "unset RANK" in str(error.value)
        assert time.monotonic() - start < 30


def test_a_process_that_no_torchrun_starts_is_missed_in_seconds(monkeypatch):
    monkeypatch.setattr(rendezvous_module, "BY_HAND_SECONDS", 0.5)
    with pytest.raises(MegaSoraError) as error:
        Rendezvous(Launcher(0, 3, address="127.0.0.1", port=free_port()), 540.0).join()
    assert "WORLD_SIZE=3 is set in the environment, but within 0 s process 1, 2 has not joined" in str(error.value)


def test_this_machine_has_a_name_that_resolves_or_doctor_names_it(monkeypatch):
    from megasora.observe.doctor import host_name

    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    (fine,) = host_name()
    assert (fine.value, fine.remedy) == ("node7", "")
    monkeypatch.setattr("megasora.observe.doctor.resolve_problem", lambda name: "Name or service not known")
    (broken,) = host_name()
    assert "does not resolve" in broken.value and "--local-addr 127.0.0.1" in broken.remedy and not broken.missing


def test_a_launch_that_is_refused_leaves_no_folder(environment, tmp_path, capsys):
    environment({})
    (tmp_path / "runs").mkdir()
    run = tmp_path / "runs" / "a" / "b" / "run"
    assert main([str(ROOT / "configs" / "dit_s.yaml"), f"run.dir={run}", "data.shards=/nowhere"]) == CONFIGURATION
    assert "no dataset.json in /nowhere" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())
    assert main([str(ROOT / "configs" / "dit_s.yaml"), "run.dir=/proc/no/run"]) == CONFIGURATION
    assert capsys.readouterr().err.startswith("megasora: error: run.dir=/proc/no/run cannot be written: ")


# ---------------------------------------------------------------------- a process that is missing


def start(run: Path, variables: dict[str, str], *settings: str, code: str = PROCESS) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.Popen(
        [sys.executable, "-c", code, f"run.dir={run}", "run.device=cpu", *settings], cwd=ROOT, text=True,
        env={**environment, "OMP_NUM_THREADS": "1", **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def agent():
    """The variables of rank 0 and of rank 1 of a launch whose torchrun is this process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    shared = {**TWO, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    yield [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    del store


@pytest.mark.slow
@pytest.mark.waits
@pytest.mark.timeout(120)
@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_never_joins_is_named_by_the_other_within_its_timeout(silent, agent, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "exit.json").write_text('{"code": 75, "reason": "saved", "rank": 0}')  # of the launch before
    process = start(run, agent[1 - silent], "run.hang_seconds=20")
    output, error = process.communicate(timeout=100)
    assert process.returncode == HANG, error
    recorded = read_exit(run)
    assert (recorded["code"], recorded["rank"]) == (HANG, 1 - silent)
    reason = f"no heartbeat for 20 s; process {silent} of 2 has not joined; stacks in {run / 'logs'}"
    assert recorded["reason"] == reason and f"megasora: error: {reason}" in error
    assert "during joining the other processes; stacks of all threads" in error and "Current thread" in error
    seconds = recorded["time"] - (run / "logs" / f"hang-{1 - silent:05d}").stat().st_mtime
    assert seconds < 5  # from the timeout to the record


@pytest.mark.timeout(120)
def test_a_stop_request_ends_a_process_that_waits_for_others(agent, tmp_path):
    """It waits in C++ code, where Python runs no signal handler. torchrun sends it when another process has failed."""
    process = start(tmp_path / "run", agent[0], "run.hang_seconds=500")
    store = dist.PrefixStore("megasora", dist.TCPStore("127.0.0.1", int(agent[0]["MASTER_PORT"]), is_master=False))
    store.wait(["joined/0"], timedelta(seconds=100))
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert process.returncode == STOPPED and "megasora: stopped on request" in error and "Traceback" not in error
    assert time.monotonic() - asked < 10  # of which the watchdog gives it 1 s
    assert read_exit(tmp_path / "run") is None


HANGING = """
import builtins, io, os, sys, threading, time
from pathlib import Path
from megasora import watchdog
from megasora.run_log.launches import Launch

run, moment = Path(sys.argv[1]), sys.argv[2]

def hang_in(function):
    def call(path, *arguments, **settings):
        if str(run) in str(path):
            time.sleep(1000)
        return function(path, *arguments, **settings)
    return call

def hang():
    for module, name in ((builtins, "open"), (io, "open"), (os, "stat"), (os, "unlink"), (os, "mkdir"), (os, "open"),
                         (os, "scandir"), (os, "listdir"), (os, "link"), (os, "replace")):
        setattr(module, name, hang_in(getattr(module, name)))

if moment == "from the start":
    hang()
with watchdog.Watchdog(Launch(run, 0), 2, 1.0, lambda: False).watching():
    hang()
    print("hangs", flush=True)
    time.sleep(1000)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("moment", ["from the start", "later"])
def test_a_run_folder_that_does_not_answer_does_not_hang_the_watchdog(moment, tmp_path):
    """As on a network file system: each call on a file of the folder blocks."""
    (tmp_path / "logs").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(tmp_path), moment], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    begun = time.monotonic()
    _, error = process.communicate(timeout=50)
    assert process.returncode == HANG
    assert time.monotonic() - begun < 1.0 + 5.0 + 5.0  # the timeout, the bound, a busy machine
    reason = f"no heartbeat for 1 s; process 0: startup; stacks in {tmp_path / 'logs'}"
    assert f"{reason}; {tmp_path} does not answer" in error
    assert not (tmp_path / "exit.json").exists()


# ---------------------------------------------------------------------- a second launch

TORCH_IS_LOADED = """
import sys
from megasora.train import main
code = main(["configs/dit_s.yaml", *sys.argv[1:]])
print("torch" in sys.modules)
sys.exit(code)
"""


def test_a_second_launch_is_refused_before_torch_is_loaded(tmp_path):
    run = tmp_path / "run"
    with locked(run / LOCK, "the run", note=Launch(run, 0).note):
        process = start(run, {}, code=TORCH_IS_LOADED)
        output, error = process.communicate(timeout=60)
    assert (process.returncode, output) == (CONFIGURATION, "False\n"), error
    assert error.startswith(f"megasora: error: run.dir={run} is being written by process {os.getpid()} on ")
    assert error.count("\n") == 1 and "meeting_point" not in error
    assert not run.exists()


# ---------------------------------------------------------------------- processes that differ

OTHER_CODE = f"""
from megasora.run_log import code_version
import os
if os.environ["RANK"] == "1":
    code_version.code_versions.__globals__["source_hash"] = lambda: "0" * 12
{PROCESS}"""


@pytest.mark.timeout(120)
def test_a_process_with_other_code_is_named_on_all_and_the_launch_is_recorded_as_refused(agent, tmp_path):
    from megasora.run_log.code_version import source_hash

    run = tmp_path / "run"
    processes = [start(run, variables, code=OTHER_CODE) for variables in agent]
    ends = [process.communicate(timeout=100) for process in processes]
    message = (
        f"process 1 runs other code than process 0 (megasora: {source_hash()} -> 000000000000); install the same code "
        "and packages on all machines"
    )
    assert [process.returncode for process in processes] == [CONFIGURATION] * 2, ends
    assert f"megasora: error: {message}\n" in ends[0][1] and f"{message} (process 1)" in ends[1][1]
    recorded = read_exit(run)
    assert (recorded["code"], recorded["reason"]) == (CONFIGURATION, message)
    assert not (run / LOCK).exists()

"""A save to the disks of the nodes, or its promotion to the run folder, killed anywhere: at most that save is lost.

The threads of a forked process are the ranks of two nodes; the process ends, without any clean-up, at the n-th change
of a file by one of them, for every n: within the files of ranks, their copies, manifests, renames and deletions. The
other ranks go on until they wait for the one that has stopped.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import node_runs
import pytest
from node_runs import Disks, launch

from megasora.checkpoint import node_target, saver

DONE, KILLED = 0, 9
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}  # audit events, raised before the change
CHILD_SECONDS = 60  # after which the forked process ends in any case
OTHERS_SECONDS = 0.02  # in which the other ranks change no file, so that they wait
SIZES = (1, 1)


def launch_and_kill(disks: Disks, victim: int, number: int, *steps: int, **settings) -> int:
    """A launch in a forked process that ends when rank `victim` is about to make its change `number`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not pytest's, which is inherited
        signal.alarm(CHILD_SECONDS)
        launch_until(disks, victim, number, *steps, **settings)
    finally:
        os._exit(1)


def launch_until(disks: Disks, victim: int, number: int, *steps: int, **settings) -> None:
    """The body of the forked process; never returns."""
    own, count, killed = threading.local(), iter(range(number)), threading.Event()
    last_change = [time.monotonic()]

    def audit(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in CHANGES) or getattr(own, "rank", None) is None:
            return
        last_change[0] = time.monotonic()
        if own.rank == victim and next(count, None) is None:
            killed.set()
            threading.Event().wait()  # this rank does nothing more

    class NodeRank(node_runs.NodeRank):
        def __init__(self, rank, *arguments):
            own.rank = rank
            super().__init__(rank, *arguments)

    class TaskOfRank(saver.Task):
        """A thread of a rank belongs to it."""

        def __init__(self, action, name: str):
            rank = getattr(own, "rank", None)

            def run_of_rank():
                own.rank = rank
                return action()

            super().__init__(run_of_rank, name)

    node_runs.NodeRank, saver.Task, node_target.Task = NodeRank, TaskOfRank, TaskOfRank
    sys.addaudithook(audit)
    thread = threading.Thread(target=launch, args=(disks, SIZES, *steps), kwargs=settings, daemon=True)
    thread.start()
    while thread.is_alive() and not killed.is_set():
        time.sleep(0.0005)
    while killed.is_set() and time.monotonic() - last_change[0] < OTHERS_SECONDS:
        time.sleep(0.0005)
    os._exit(KILLED if killed.is_set() else DONE)


def try_all(before: Disks, tmp_path: Path, victim: int, *steps: int, **settings):
    """Yields (number of the change, the disks after a launch that was killed there), then those of a whole launch."""
    for number in range(500):
        disks = Disks(shutil.copytree(before.folder, tmp_path / str(number)))
        code = launch_and_kill(disks, victim, number, *steps, **settings)
        assert code in (DONE, KILLED), f"change {number} of rank {victim}"
        yield number, disks
        if code == DONE:
            return


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim, copy", [(0, True), (1, True), (0, False)])
def test_a_save_killed_at_any_change_of_a_file_is_the_one_before_or_whole_even_if_a_node_is_lost(
    victim, copy, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a killed process loses nothing that it has written
    before, reached = Disks(tmp_path / "before"), []
    for number, disks in try_all(before, tmp_path, victim, 10, 20, node={"copy": copy}):
        if copy and disks.node(number % 2).exists():
            disks.lose(number % 2)
        reached.append(launch(disks, SIZES))
        assert not list(disks.folder.rglob("*.part")), f"change {number} of rank {victim}"
    for steps in (reached[::2], reached[1::2]):  # without node 0, without node 1
        assert set(steps) == {0, 10, 20} and steps == sorted(steps)
    assert len(reached) > (40 if copy else 25), "changes of files were not noticed"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", range(2))
def test_a_promotion_killed_at_any_change_of_a_file_loses_nothing(victim, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    before, numbers = Disks(tmp_path / "before"), 0
    launch(before, SIZES, 100, 110)
    expected = Disks(shutil.copytree(before.folder, tmp_path / "expected"))
    launch(expected, SIZES)
    for number, disks in try_all(before, tmp_path, victim):
        assert launch(disks, SIZES) == 110, f"change {number} of rank {victim}"
        assert disks.contents(110) == expected.contents(110) and disks.shared() == ["step-00000100", "step-00000110"]
        assert not list(disks.folder.rglob("*.part")), f"change {number} of rank {victim}"
        numbers += 1
    assert numbers > (20 if victim == 0 else 5), "changes of files were not noticed"

"""A save that is killed anywhere leaves the previous checkpoint or the whole new one, and nothing that is half of both.

Two threads of a forked process save as two ranks; the process ends, without any clean-up, at the n-th change of a file
by one of them. This is done for every n: before the first file, within a tensor, around each fsync, at the manifest,
the rename, `latest`, and the deletion of the oldest checkpoint. It is done for saves that stop the ranks, and for
asynchronous ones, during which the ranks change all values and take part in steps.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from saved_runs import OneRank, ThreadRank

from megasora.checkpoint import fragment_file
from megasora.checkpoint import saver as saver_module
from megasora.checkpoint.loader import CheckpointLoader
from megasora.checkpoint.saver import CheckpointSaver
from megasora.checkpoint.store import CheckpointStore, Retention
from megasora.fragment import Fragment
from megasora.placement import Placement

RANKS, KEEP = 2, 2
DONE, KILLED = 0, 9
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}  # audit events, raised before the change
SAVE_SECONDS = 60  # after which the forked process ends in any case
OTHER_SECONDS = 20.0  # for the other rank to write its file


def fragments(rank: int, value: float) -> list[Fragment]:
    """Two halves of a parameter of 6 elements, one on each rank, all elements equal to `value` + rank."""
    values = {kind: torch.full((3,), value + rank + 0.25 * i) for i, kind in enumerate(("weights", "ema"))}
    return [Fragment("weight", torch.Size([6]), Placement(), 0, 1, 3 * rank, values)]


def save_all(folder: Path, step: int, asynchronous: bool = False) -> None:
    """Saves a checkpoint on RANKS threads."""
    barrier, slots = threading.Barrier(RANKS), [None] * RANKS
    threads = [
        threading.Thread(target=save, args=(folder, step, ThreadRank(rank, slots, barrier), asynchronous))
        for rank in range(RANKS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def save(folder: Path, step: int, rank: ThreadRank, asynchronous: bool) -> None:
    store, values = CheckpointStore(folder / "checkpoints", Retention(KEEP)), fragments(rank.rank, step)
    saver = CheckpointSaver(store, values, lambda f: (0, 1), rank, asynchronous)
    saver.save(step, {"tag": f"of {step}"})
    for tensor in values[0].values.values():
        tensor.fill_(-7)
    while saver.current is not None:  # steps of a training
        busy, failed = rank.all_reduce_sum(torch.tensor(saver.progress())).tolist()
        saver.advance(busy, failed)


def load(folder: Path) -> int:
    """Resumes on one rank; the step, after checking that every element and the state are those of its save."""
    both = [f for rank in range(RANKS) for f in fragments(rank, -100.0)]
    store = CheckpointStore(folder / "checkpoints", Retention(KEEP))
    state = CheckpointLoader(store, both, OneRank()).resume("resume-or-fresh")
    if state is None:
        return 0
    for rank, loaded in enumerate(both):
        (expected,) = fragments(rank, state["step"])
        assert all(torch.equal(loaded.values[kind], expected.values[kind]) for kind in expected.values)
    assert state["tag"] == f"of {state['step']}"
    return state["step"]


# ---------------------------------------------------------------- the killed save


def save_and_kill(folder: Path, step: int, victim: int, number: int, asynchronous: bool) -> int:
    """Saves in a forked process that ends when thread `victim` is about to make its change `number`; DONE or KILLED."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not pytest's, which is inherited
        signal.alarm(SAVE_SECONDS)
        save_until(folder, step, victim, number, asynchronous)
    finally:
        os._exit(1)


def save_until(folder: Path, step: int, victim: int, number: int, asynchronous: bool) -> None:
    """The body of the forked process; never returns."""
    killed, barrier, slots = threading.Event(), threading.Barrier(RANKS), [None] * RANKS
    own, count, tasks = threading.local(), iter(range(number)), list[threading.Thread]()

    def change() -> None:
        if getattr(own, "is_victim", False) and next(count, None) is None:
            killed.set()
            threading.Event().wait()  # this rank does nothing more

    def run(rank: int) -> None:
        own.is_victim = rank == victim
        save(folder, step, ThreadRank(rank, slots, barrier), asynchronous)

    class TaskOfRank(saver_module.Task):
        """A thread of a rank belongs to it."""

        def __init__(self, action, name: str):
            is_victim = getattr(own, "is_victim", False)
            if not is_victim:
                tasks.append(self)

            def run_of_rank():
                own.is_victim = is_victim
                return action()

            super().__init__(run_of_rank, name)

    saver_module.Task = TaskOfRank
    install(change)
    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    while not killed.is_set() and any(thread.is_alive() for thread in threads):
        time.sleep(0.0005)
    deadline = time.monotonic() + OTHER_SECONDS
    while killed.is_set() and any(task.is_alive() for task in tasks):  # the other rank writes on
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.0005)
    os._exit(KILLED if killed.is_set() else DONE)


def install(change) -> None:
    """Calls `change()` before each change of a file, and in the middle of each write of a tensor."""

    def audit(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:
            change()

    real_sync, real_writer = os.fsync, fragment_file.atomic_writer

    def fsync(handle: int) -> None:
        change()
        real_sync(handle)
        change()

    @contextmanager
    def writer(path: Path):
        with real_writer(path) as file:
            yield Halves(file, change)

    sys.addaudithook(audit)
    os.fsync, fragment_file.atomic_writer = fsync, writer


class Halves:
    """A file whose writes reach the disk in two halves."""

    def __init__(self, file, change):
        self.file, self.change, self.tell, self.fileno = file, change, file.tell, file.fileno

    def write(self, data) -> None:
        data = bytes(data)
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.change()
        self.file.write(data[len(data) // 2 :])
        self.file.flush()


# ---------------------------------------------------------------- tests


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("earlier", [(), (10,), (10, 20)], ids=["first", "second", "third_of_two"])
@pytest.mark.parametrize("victim", range(RANKS))
@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asynchronous"])
def test_a_save_killed_at_any_change_of_a_file_is_the_previous_checkpoint_or_whole(
    asynchronous, victim, earlier, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a killed process loses nothing that it has written
    previous, step, reached = max(earlier, default=0), 30, []
    (tmp_path / "before" / "checkpoints").mkdir(parents=True)
    for saved in earlier:
        save_all(tmp_path / "before", saved)
    for number in range(500):
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(number))
        code = save_and_kill(folder, step, victim, number, asynchronous)
        assert code in (DONE, KILLED), f"change {number} of rank {victim}"
        reached.append(load(folder))
        assert not list((folder / "checkpoints").glob(".*")), f"change {number} of rank {victim}"
        save_all(folder, step, asynchronous)  # the resumed run saves it again
        assert load(folder) == step
        assert not list(folder.rglob(".*")), f"change {number} of rank {victim} leaves a file behind"
        saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
        assert saved == [f"step-{s:08d}" for s in (*earlier, step)][-KEEP:]
        if code == DONE:
            break
    assert set(reached) <= {previous, step} and reached == sorted(reached)
    assert reached[-1] == step and reached[0] == previous
    assert len(reached) > (25 if victim == 0 else 5), "changes of files were not noticed"

"""The first exit that a process of the newest launch records is kept; processes of earlier launches record none."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from megasora.errors import CONFIGURATION, CRASH, HANG, STOPPED, MegaSoraError
from megasora.locks import locked
from megasora.run_log.launches import EXIT, LAUNCHES, LOCK, Launch, newest_launch, read_exit


def begun(run: Path, ranks: int = 2, meeting_point: str = "node1:29500") -> list[Launch]:
    """The processes of a launch that has begun."""
    launches = [Launch(run, rank, meeting_point) for rank in range(ranks)]
    for launch in launches:
        launch.find_previous()
    launches[0].begin(ranks)
    for launch in launches:
        launch.id = launches[0].id
    return launches


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / LAUNCHES).read_text().splitlines()]


def test_an_exit_code_recorded_within_a_second_of_a_crash_wins(tmp_path):
    main, other = begun(tmp_path)
    crash = threading.Thread(target=main.record_exit, args=(CRASH, "RuntimeError: connection closed"))
    crash.start()
    time.sleep(0.2)
    other.record_exit(STOPPED, "saved after step 7")
    crash.join()
    recorded = read_exit(tmp_path)
    assert (recorded["code"], recorded["rank"], recorded["launch"]) == (STOPPED, 1, main.id)


def test_an_exit_that_cannot_be_written_raises_nothing_and_is_said(tmp_path, capsys):
    Launch(tmp_path / "nowhere", 0).record_exit(STOPPED, "")
    assert f"{tmp_path / 'nowhere' / EXIT} cannot be written (No such file" in capsys.readouterr().err
    (tmp_path / EXIT).write_text("{incomplete")
    assert read_exit(tmp_path) is None


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_full_disk_leaves_no_empty_exit_file(has_begun, tmp_path, monkeypatch, capsys):
    """/dev/full takes no byte, like a full disk."""
    launch = begun(tmp_path)[0] if has_begun else Launch(tmp_path, 0)
    real = open

    def open_full(file, mode="r", *arguments, **settings):
        if ".part" in str(file) and "w" in mode:
            real(file, mode).close()
            return real("/dev/full", mode, *arguments, **settings)
        return real(file, mode, *arguments, **settings)

    monkeypatch.setattr("builtins.open", open_full)
    monkeypatch.setattr("io.open", open_full)
    launch.record_exit(CONFIGURATION, "reason")
    monkeypatch.undo()
    assert not list(tmp_path.glob("*exit*")) and not list(tmp_path.glob(".*part"))
    said = capsys.readouterr().err
    assert f"{tmp_path / EXIT} cannot be written ({os.strerror(errno.ENOSPC)}); free some space" in said


def test_a_file_system_without_hard_links_has_the_first_exit_too(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    main, other = begun(tmp_path)
    other.record_exit(HANG, "first")
    main.record_exit(HANG, "second")
    assert read_exit(tmp_path)["reason"] == "first" and not list(tmp_path.glob(".*part"))


def test_a_process_of_an_earlier_launch_records_no_exit(tmp_path):
    """It was suspended, e.g. by SIGSTOP, and wakes after the next launch has begun, or has ended."""
    _, stale = begun(tmp_path)
    main, _ = begun(tmp_path)
    stale.record_exit(HANG, "no heartbeat")
    assert not stale.is_current() and main.is_current() and read_exit(tmp_path) is None
    main.record_exit(STOPPED, "saved")
    stale.record_exit(HANG, "no heartbeat")
    assert read_exit(tmp_path)["code"] == STOPPED
    with pytest.raises(MegaSoraError, match="belongs to another launch since this process was suspended"):
        stale.check_current()
    main.check_current()


def test_a_process_that_has_not_joined_records_an_exit_unless_another_launch_runs(tmp_path):
    main, other = begun(tmp_path)
    main.record_exit(STOPPED, "saved")
    silent = Launch(tmp_path, 1, "node1:29511")
    silent.find_previous()
    assert silent.previous == main.id and silent.id is None
    with locked(tmp_path / LOCK, "the run", note=Launch(tmp_path, 0, "node9:1").note):  # another launch
        silent.record_exit(HANG, "no heartbeat; process 0 has not joined")
        assert read_exit(tmp_path)["code"] == STOPPED
    with locked(tmp_path / LOCK, "the run", note=Launch(tmp_path, 0, "node1:29511").note):  # its own, not begun
        silent.record_exit(HANG, "no heartbeat; process 0 has not joined")
    assert read_exit(tmp_path)["code"] == HANG  # in place of the exit of the launch before
    begun(tmp_path)
    assert read_exit(tmp_path) is None


def test_the_exit_of_an_earlier_launch_is_not_that_of_the_newest(tmp_path):
    """The main process was killed after it had written its line, before it had removed exit.json."""
    begun(tmp_path)[0].record_exit(STOPPED, "saved")
    text = (tmp_path / EXIT).read_text()
    begun(tmp_path)
    (tmp_path / EXIT).write_text(text)
    assert read_exit(tmp_path) is None


def test_a_launch_has_an_id_and_says_when_its_code_is_another_one(tmp_path):
    first, second, third = (Launch(tmp_path, 0) for _ in range(3))
    assert first.begin(1, "aaaa") is None and second.begin(1, "aaaa") is None
    assert third.begin(1, "bbbb") == "aaaa"
    assert newest_launch(tmp_path) == third.id
    assert [(line["launch"], line["code"]) for line in lines_of(tmp_path)] == [
        (first.id, "aaaa"), (second.id, "aaaa"), (third.id, "bbbb")
    ]  # fmt: skip
    assert len({first.id, second.id, third.id}) == 3


def test_a_fifo_in_place_of_the_exit_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / EXIT)
    assert read_exit(tmp_path) is None

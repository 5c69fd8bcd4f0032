"""A file that is written is there whole or as it was before, nothing is left beside it; one process holds a lock."""

from __future__ import annotations

import fcntl
import os
import time

import pytest

from megasora.errors import MegaSoraError
from megasora.files import locked, whole_file, write_whole


class Killed(BaseException):
    """No error that a program would handle."""


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_whole(file, "before")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, lambda *given: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                write_whole(file, "after")
        assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    write_whole(file, "nach dem Löschen")
    assert file.read_bytes() == "nach dem Löschen".encode() and list(tmp_path.iterdir()) == [file]


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path):
    with pytest.raises(Killed), whole_file(tmp_path / "new.bin") as file:
        file.write(b"half")
        assert not (tmp_path / "new.bin").exists()
        raise Killed
    assert not list(tmp_path.iterdir())


def test_of_many_writers_at_once_one_writes(tmp_path):
    """Processes that take and leave the same lock never hold it together, though its file comes and goes."""
    (tmp_path / "log").touch()
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            done, deadline = 0, time.monotonic() + 60
            while done < 10 and time.monotonic() < deadline:
                try:
                    with locked(tmp_path / "locks" / "x", "x"), open(tmp_path / "log", "ab", buffering=0) as log:
                        log.write(b"(")
                        log.write(b")")
                    done += 1
                except MegaSoraError:
                    pass
            os._exit(0 if done == 10 else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 3
    assert (tmp_path / "log").read_bytes() == b"()" * 30
    assert not (tmp_path / "locks").exists()


def test_a_lock_whose_file_its_last_holder_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Else a third would make the file again, and both would hold it."""
    real, calls = fcntl.flock, []

    def flock(handle, how):
        if not calls:
            (tmp_path / "locks" / "x").unlink()
        calls.append(how)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "locks" / "x", "x"):
        assert len(calls) == 2
        with pytest.raises(MegaSoraError, match="is being written by"), locked(tmp_path / "locks" / "x", "x"):
            pass

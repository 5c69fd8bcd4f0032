"""One process at a time holds a lock."""

from __future__ import annotations

import fcntl
import os
import time

import pytest

from megasora.errors import MegaSoraError
from megasora.locks import locked


def test_only_one_of_many_processes_holds_a_lock(tmp_path):
    """Processes that acquire and release a lock never hold it together, though its file is created and removed."""
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


def test_a_lock_is_acquired_again_if_its_previous_holder_removes_the_file_meanwhile(tmp_path, monkeypatch):
    """Otherwise a third process would create the file again, and both would hold the lock."""
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

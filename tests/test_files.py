"""Files are replaced atomically, without leftovers; one process at a time holds a lock; JSONL lines stay separate."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from megasora.errors import MegaSoraError
from megasora.files import JsonlWriter, locked, whole_file, write_whole


class Killed(BaseException):
    """An exception that no program handles."""


def test_a_file_is_replaced_atomically(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_whole(file, "before")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, lambda *arguments: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                write_whole(file, "after")
        assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    write_whole(file, "nach dem Löschen")
    assert file.read_bytes() == "nach dem Löschen".encode() and list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(Killed), whole_file(tmp_path / "new.bin") as file:
        file.write(b"half")
        assert not (tmp_path / "new.bin").exists()
        raise Killed
    assert not list(tmp_path.iterdir())


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


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_jsonl_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for step in range(3):
        writer.write({"step": step, "loss": 1 / (step + 1), "mfu": None, "text": "a\nb — ü"})
        assert len(read_jsonl(tmp_path / "metrics.jsonl")) == step + 1
    assert read_jsonl(tmp_path / "metrics.jsonl")[2] == {"step": 2, "loss": 1 / 3, "mfu": None, "text": "a\nb — ü"}
    writer.close()


def test_a_new_jsonl_writer_appends(tmp_path):
    for step in (1, 2):
        writer = JsonlWriter(tmp_path / "metrics.jsonl")
        writer.write({"step": step})
        writer.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_an_incomplete_jsonl_line_does_not_merge_with_the_next_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    writer = JsonlWriter(path)
    writer.write({"step": 2})
    writer.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2, "lo\n{"step": 2}\n'

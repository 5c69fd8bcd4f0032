"""Files are replaced atomically, without leftovers."""

from __future__ import annotations

import os

import pytest

from megasora.files import atomic_writer, write_text_atomic


class Killed(BaseException):
    """An exception that no program handles."""


def test_a_file_is_replaced_atomically(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_text_atomic(file, "before")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, lambda *arguments: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                write_text_atomic(file, "after")
        assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    write_text_atomic(file, "nach dem Löschen")
    assert file.read_bytes() == "nach dem Löschen".encode() and list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(Killed), atomic_writer(tmp_path / "new.bin") as file:
        file.write(b"half")
        assert not (tmp_path / "new.bin").exists()
        raise Killed
    assert not list(tmp_path.iterdir())

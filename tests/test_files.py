"""Files are replaced atomically, without leftovers."""

from __future__ import annotations

import errno
import os

import pytest

from megasora.errors import MegaSoraError
from megasora.files import atomic_writer, check_folder, errors_naming, read_regular_file, write_text_atomic


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


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_a_full_disk_names_the_file_and_leaves_it_as_it_was(step, tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_text_atomic(file, "before")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError) as caught, monkeypatch.context() as patch:
        if step == "open":
            patch.setattr("builtins.open", full)
        elif step != "write":
            patch.setattr(os, step, full)
        with atomic_writer(file) as writer:
            writer.write(b"after")
            if step == "write":
                full()
    assert str(caught.value) == f"[Errno 28] No space left on device: '{file}'"
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(OSError) as caught, errors_naming(tmp_path / "a"):
        raise OSError(errno.EIO, "Input/output error", "b")
    assert caught.value.filename == "b"


def test_a_regular_file_is_read_up_to_a_limit(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"x" * 1000)
    assert read_regular_file(file, 1000) == b"x" * 1000
    with pytest.raises(OSError, match="more than 999 bytes"):
        read_regular_file(file, 999)
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(OSError, match="more than 10 bytes"):
        read_regular_file(tmp_path / "sparse", 10)


@pytest.mark.parametrize("kind", ["folder", "FIFO", "device"])
def test_what_is_no_regular_file_is_not_read(kind, tmp_path):
    path = tmp_path / "a"
    {"folder": path.mkdir, "FIFO": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(OSError, match="not a regular file"):
        read_regular_file(path, 10)


def test_a_folder_can_be_made_where_no_file_is_in_the_way(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("", "a", "a/b/c", "link", "link/a"):
        check_folder(tmp_path / name, "run.dir")
    for name in ("file", "file/a/b", "dangling", "dangling/a", "loop", "loop/a", "x" * 300):
        with pytest.raises(MegaSoraError, match="^run.dir: .*choose another"):
            check_folder(tmp_path / name, "run.dir")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(MegaSoraError, match=f"may not write into {tmp_path}"):
        check_folder(tmp_path / "a", "run.dir")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file", "link", "loop"]

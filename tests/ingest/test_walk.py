"""Folders with links, special files and folders that cannot be read: each file is found once, none unnoticed."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from megasora.errors import MegaSoraError
from megasora.ingest.file_counts import BROKEN_LINK, NOT_REGULAR, SEEN_FOLDER, UNREADABLE_FOLDER, FileCounts
from megasora.ingest.sources import find_clips
from megasora.ingest.walk import walk


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def walked(folder: Path) -> tuple[list[str], dict[str, int]]:
    counts = FileCounts()
    return walk(folder, counts), dict(counts.kinds)


def test_without_links_the_order_is_that_of_sorted_paths(tmp_path):
    names = ["b.mp4", "a/z.mp4", "a.mp4", "a b/c.mp4", "a-b.mp4", "A.mp4", "a/b/c/d.mp4", "é/x.png", ".h/a.mp4", "a/.b"]
    touch(tmp_path, *names)
    expected = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert walked(tmp_path) == ([path.relative_to(tmp_path).as_posix() for path in expected], {})


def test_linked_folders_and_files_are_followed(tmp_path):
    outside = touch(tmp_path / "outside", "a.mp4", "deep/b.mp4")
    source = touch(tmp_path / "clips", "own.mp4")
    (source / "linked").symlink_to(outside)
    (source / "relative").symlink_to("../outside/deep")  # seen below `linked`
    (source / "file.mp4").symlink_to(outside / "a.mp4")
    names, counts = walked(source)
    assert names == ["file.mp4", "linked/a.mp4", "linked/deep/b.mp4", "own.mp4"] and counts == {SEEN_FOLDER: 1}
    (tmp_path / "whole").symlink_to(source)
    assert walked(tmp_path / "whole") == (names, counts)


def test_links_to_folders_above_and_to_each_other_end(tmp_path):
    source = touch(tmp_path / "clips", "a.mp4", "sub/b.mp4")
    (source / "self").symlink_to(".")
    (source / "sub" / "up").symlink_to(source)
    (source / "absolute").symlink_to(tmp_path)  # the folder that holds the source
    (source / "x").symlink_to("y")
    (source / "y").symlink_to("x")
    touch(tmp_path, "beside.mp4")
    names, counts = walked(source)
    assert names == ["a.mp4", "absolute/beside.mp4", "sub/b.mp4"]
    assert counts == {SEEN_FOLDER: 3, BROKEN_LINK: 2}  # self, up, and the source within `absolute`


def test_a_folder_has_its_own_name_although_links_to_it_come_first(tmp_path):
    touch(tmp_path, "z/real/a.mp4")
    for name in ("a", "z/b"):
        (tmp_path / name).symlink_to(tmp_path / "z" / "real")
    assert walked(tmp_path) == (["z/real/a.mp4"], {SEEN_FOLDER: 2})


def test_of_two_links_to_one_folder_the_first_by_name_is_followed(tmp_path):
    outside = touch(tmp_path / "outside", "a.mp4")
    (tmp_path / "clips").mkdir()
    for name in ("c", "b", "d"):
        (tmp_path / "clips" / name).symlink_to(outside)
    assert walked(tmp_path / "clips") == (["b/a.mp4"], {SEEN_FOLDER: 2})


@pytest.fixture
def special(tmp_path) -> Path:
    """A FIFO, a socket, a link to a device, and broken links, all named as clips or captions."""
    source = touch(tmp_path / "clips", "a.mp4")
    os.mkfifo(source / "pipe.mp4")
    os.mkfifo(source / "a.txt")
    (source / "zero.png").symlink_to("/dev/zero")
    (source / "captions.jsonl").symlink_to("/dev/null")
    (source / "gone.mp4").symlink_to("nowhere")
    here = os.getcwd()
    os.chdir(source)  # the name of a socket may have 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket.mp4")
    finally:
        os.chdir(here)
    return source


def test_special_files_are_counted_and_never_opened(special):
    """To open a FIFO would wait for ever."""
    listing = find_clips(special)
    assert [(clip.name, clip.caption) for clip in listing.clips] == [("a.mp4", None)]
    assert listing.files.kinds == {"clip": 1, NOT_REGULAR: 5, BROKEN_LINK: 1}
    assert "5 FIFOs, sockets or devices (" in listing.files.describe()[0]


@pytest.mark.parametrize("name", ["list.txt", "list.jsonl", "clips.tar"])
def test_a_source_that_is_a_fifo_is_an_error_in_one_line(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(MegaSoraError, match=f"{name} is a FIFO, a socket or a device; give"):
        find_clips(tmp_path / name)
    (tmp_path / "list2.txt").write_text("pipe.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(MegaSoraError, match="list2.txt:1: .*pipe.mp4 is not a regular file"):
        find_clips(tmp_path / "list2.txt")


def test_a_folder_that_cannot_be_read_is_counted(tmp_path, monkeypatch):
    touch(tmp_path, "a.mp4", "closed/b.mp4")
    open_folder = os.open

    def refusing(path, *arguments, **options):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return open_folder(path, *arguments, **options)

    monkeypatch.setattr("megasora.ingest.walk.os.open", refusing)
    assert walked(tmp_path) == (["a.mp4"], {UNREADABLE_FOLDER: 1})

"""Listing the clips of folders, lists and raw tars, with their captions, splits and excerpts."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from megasora.errors import MegaSoraError
from megasora.ingest.listing import listing_hash
from megasora.ingest.sources import find_clips


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"clip " + name.encode())
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_list(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def listing(source: Path) -> list[tuple[str, str, str | None]]:
    return [(clip.name, clip.split, clip.caption) for clip in find_clips(source).clips]


# ---------------------------------------------------------------- lists


def test_a_text_list_has_one_clip_per_line_with_captions_in_files_beside_it(tmp_path):
    odd = 'b "quoted" 🦊 it\'s.mp4'
    touch(tmp_path, "z.mp4", f"in a folder/{odd}", "val/c.png", "not listed.mp4")
    (tmp_path / "z.txt").write_text("the last  one")
    (tmp_path / "list.txt").write_text(f"z.mp4\n\nin a folder/{odd}\r\nval/c.png\n", encoding="utf-8")
    assert listing(tmp_path / "list.txt") == [
        (f"in a folder/{odd}", "train", None),
        ("val/c.png", "val", None),
        ("z.mp4", "train", "the last one"),
    ]


def test_a_json_list_has_captions_splits_and_excerpts_sorted_by_start(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "b.txt").write_text("beside")
    table = write_list(
        tmp_path / "list.jsonl",
        {"file": "b.mp4", "split": "val"},
        {"file": "a.mp4", "caption": " 二つ目\nの場面 ", "start": 10, "end": 12.5},
        {"file": "a.mp4", "caption": "", "start": 2.5, "end": 10},
        {"file": str(tmp_path / "a.mp4"), "caption": None, "start": 0, "end": 2.5, "other": [1]},
    )
    clips = find_clips(table).clips
    assert [(c.caption, c.split, c.media.start, c.media.end) for c in clips] == [
        (None, "train", 0.0, 2.5),
        ("", "train", 2.5, 10.0),
        ("二つ目 の場面", "train", 10.0, 12.5),
        ("beside", "val", 0.0, None),
    ]


def test_the_order_of_the_lines_does_not_change_the_listing(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    lines = [{"file": "a.mp4", "caption": "a"}, {"file": "b.mp4", "caption": "b"}]
    hashes = {listing_hash(find_clips(write_list(tmp_path / f"{i}.jsonl", *lines[:: 1 - 2 * i])).clips) for i in (0, 1)}
    assert len(hashes) == 1
    for change in ({"caption": "c"}, {"end": 3.0}, {"split": "val"}):
        changed = write_list(tmp_path / "c.jsonl", {**lines[0], **change}, lines[1])
        assert listing_hash(find_clips(changed).clips) not in hashes


LINES = [
    ("{", "1 is not"),
    ('{"caption": "a"}', "1 is not"),
    ('["a.mp4"]', "1 is not"),
    ('{"file": 3}', "1 is not"),
    ("[" * 100_000, "1 is not"),
    ('{"file": "a\\u0000.mp4"}', "1 is not"),
    ('{"file": "no.mp4"}', "1: .*no.mp4 does not exist"),
    ('{"file": "list.jsonl"}', "1: list.jsonl is not a clip"),
    ('{"file": "a.mp4", "split": "test"}', "1: split 'test' is not one of train, val"),
    ('{"file": "a.mp4", "start": "1"}', "1: start and end are seconds, not '1'"),
    ('{"file": "a.mp4", "start": -1}', "1: start and end are seconds, not -1"),
    ('{"file": "a.mp4", "end": NaN}', "1: start and end are seconds, not nan"),
    ('{"file": "a.mp4", "start": 2, "end": 2}', "1: end=2 is not after start=2"),
    ('{"file": "a.mp4", "caption": 3}', "1: the caption: 3 is not text"),
    ('{"file": "a.mp4"}\n{"file": "a.mp4"}', "lists .*a.mp4 twice"),
    ("", "no clip in"),
    ("\xff", "1 is not"),
    ('{"file": "a.mp4", "start": 1' + "0" * 400 + "}", "1: start and end are seconds, not 10000"),
    ('{"file": "a.mp4", "start": 1' + "0" * 5000 + "}", "1 is not"),
    ('{"file": "t.tar"}', "1: t.tar is a tar; name a clip in it"),
    ('{"file": "t.tar", "member": "no.mp4"}', "1: .*t.tar contains no clip named 'no.mp4'"),
    ('{"file": "t.tar", "member": "in.txt"}', "1: .*t.tar contains no clip named 'in.txt'"),
    ('{"file": "t.tar", "member": ["in.mp4"]}', "1: .*t.tar contains no clip named"),
    ('{"file": "a.mp4", "member": "in.mp4"}', "a.mp4: byte 0: "),
    ('{"file": "gone.tar", "member": "in.mp4"}', "1: .*gone.tar does not exist"),
    ('{"file": "t.tar", "member": "in.mp4"}\n' * 2, "lists .*t.tar: in.mp4 twice"),
]


@pytest.mark.parametrize(("text", "words"), LINES)
def test_a_line_that_cannot_be_used_is_an_error_with_its_number(text, words, tmp_path):
    touch(tmp_path, "a.mp4")
    write_tar(tmp_path / "t.tar", {"in.mp4": b"video", "in.txt": b"caption"})
    (tmp_path / "list.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(MegaSoraError, match=f"list.jsonl:?{words}|{words}"):
        find_clips(tmp_path / "list.jsonl")


# ---------------------------------------------------------------- tars


def test_clips_of_tars_have_the_caption_of_their_key_and_their_byte_range(tmp_path):
    write_tar(
        tmp_path / "train-01.tar",
        {
            "x.mp4": b"video x", "x.txt": b"ein  Hund", "x.jpg": b"its thumbnail",
            "deep/a.b.MP4": b"video y", "deep/a.json": b'{"caption": "a cat", "id": 1}',
            "only.txt": b"no clip", "z.png": b"image", "z.cls": b"3",
        },
    )  # fmt: skip
    write_tar(tmp_path / "val-00.tar", {"v.webm": b"held out"})
    write_tar(tmp_path / "val" / "w.tar", {"w.webm": b"held out"})
    clips = find_clips(tmp_path).clips
    assert [(c.name, c.split, c.caption) for c in clips] == [
        ("train-01.tar/x.mp4", "train", "ein Hund"),
        ("train-01.tar/deep/a.b.MP4", "train", "a cat"),
        ("train-01.tar/z.png", "train", None),
        ("val/w.tar/w.webm", "val", None),
        ("val-00.tar/v.webm", "val", None),
    ]
    for clip in clips:
        data = clip.media.path.read_bytes()[clip.media.offset :][: clip.media.size]
        assert data in (b"video x", b"video y", b"image", b"held out") and clip.size == len(data)
    assert listing(tmp_path / "train-01.tar") == listing(tmp_path / "train-*.tar")
    assert len(listing(tmp_path / "train-01.tar")) == 3


def test_a_list_may_name_clips_in_tars(tmp_path):
    """By member; the caption is that of the line, else that of the tar; excerpts are sorted by start."""
    write_tar(
        tmp_path / "in here" / "t 🦊.tar",
        {"z.mp4": b"video z", "z.txt": b"of z", "deep/a.mp4": b"video a", "b.png": b"image", "b.json": b"{"},
    )
    write_tar(tmp_path / "val" / "v.tar", {"v.mp4": b"held out"})
    touch(tmp_path, "a.mp4")
    tar = {"file": "in here/t 🦊.tar"}
    table = write_list(
        tmp_path / "list.jsonl",
        {**tar, "member": "b.png"},
        {**tar, "member": "deep/a.mp4", "start": 3, "caption": "late"},
        {**tar, "member": "deep/a.mp4", "end": 3, "caption": "early", "split": "val"},
        {**tar, "member": "z.mp4"},
        {"file": "val/v.tar", "member": "v.mp4", "caption": None},
        {"file": "a.mp4"},
    )
    clips = find_clips(table).clips
    assert [(c.name, c.caption, c.split, c.media.start, c.media.end) for c in clips] == [
        ("a.mp4", None, "train", 0.0, None),
        ("in here/t 🦊.tar/z.mp4", "of z", "train", 0.0, None),
        ("in here/t 🦊.tar/deep/a.mp4", "early", "val", 0.0, 3.0),
        ("in here/t 🦊.tar/deep/a.mp4", "late", "train", 3.0, None),
        ("in here/t 🦊.tar/b.png", None, "train", 0.0, None),
        ("val/v.tar/v.mp4", None, "val", 0.0, None),
    ]
    assert "b.png: its caption cannot be read: b.json: " in clips[4].caption_rejection.message
    assert not any(clip.caption_rejection for clip in clips[:4])
    data = [c.media.path.read_bytes()[c.media.offset :][: c.media.size] for c in clips[1:4]]
    assert data == [b"video z", b"video a", b"video a"] and [c.size for c in clips[1:4]] == [7, 7, 7]


NO_TEXT, NOT_UTF8 = "unreadable caption", "caption not utf-8"
BAD_CAPTIONS = [
    ("a.txt", b"\xff", NOT_UTF8),
    ("a.txt", "un café".encode("latin-1"), NOT_UTF8),
    ("a.txt", "notepad".encode("utf-16"), NOT_UTF8),
    ("a.json", b"{", NO_TEXT),
    ("a.json", b"[]", NO_TEXT),
    ("a.json", b'{"caption": 3}', NO_TEXT),
    ("a.json", b'{"caption": "\xe9"}', NOT_UTF8),
    ("a.json", b'{"caption": "\\ud800"}', NOT_UTF8),
    ("a.json", b"[" * 100_000, NO_TEXT),
    ("a.json", b'{"caption": 1' + b"0" * 5000 + b"}", NO_TEXT),
    ("a.txt", bytes((1 << 24) + 1), NO_TEXT),
    ("captions.jsonl", b'{"file": "a.mp4", "caption": "un caf\xe9"}\n', NOT_UTF8),
]


def in_a_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        file = path / os.fsdecode(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path


def in_a_tar(path: Path, files: dict[str, bytes]) -> Path:
    return write_tar(path.with_suffix(".tar"), files)


either = pytest.mark.parametrize("place", [in_a_folder, in_a_tar], ids=["folder", "tar"])


@either
@pytest.mark.parametrize(("name", "data", "reason"), BAD_CAPTIONS)
def test_a_caption_that_is_not_text_rejects_its_clip_only(name, data, reason, place, tmp_path):
    files = {"a.mp4": b"video", name: data, "b.mp4": b"video", "b.txt": b"fine"}
    first, second = find_clips(place(tmp_path / "clips", files)).clips
    assert first.caption is None and first.caption_rejection.reason == reason
    assert "a.mp4: its caption " in first.caption_rejection.message and name in first.caption_rejection.message
    assert second.caption == "fine" and second.caption_rejection is None


@either
def test_a_byte_order_mark_and_line_ends_of_windows_are_no_part_of_a_caption(place, tmp_path):
    files = {
        "a.mp4": b"", "a.txt": b"\xef\xbb\xbftwo\r\nlines\r\n", "b.mp4": b"", "b.json": b'\xef\xbb\xbf{"caption": "b"}',
        "c.mp4": b"", "captions.jsonl": b'\xef\xbb\xbf{"file": "c.mp4", "caption": "c\\r\\n"}\r\n\r\n',
    }  # fmt: skip
    assert [clip.caption for clip in find_clips(place(tmp_path / "clips", files)).clips] == ["two lines", "b", "c"]


@either
def test_a_json_file_without_a_caption_leaves_it_to_captions_jsonl(place, tmp_path):
    files = {
        "a.mp4": b"", "a.json": b'{"id": 1, "caption": null}', "b.mp4": b"", "b.json": b'{"fps": 3}',
        "captions.jsonl": b'{"file": "a.mp4", "caption": "from the table"}',
    }  # fmt: skip
    assert [clip.caption for clip in find_clips(place(tmp_path / "clips", files)).clips] == ["from the table", None]


def with_link(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.mp4")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)


def with_device(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.mp4")
        info.type = tarfile.CHRTYPE
        tar.addfile(info)


def of_8_tib(path: Path) -> None:
    info = tarfile.TarInfo("a.mp4")
    info.size = 8 << 40
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def truncated(path: Path) -> None:
    write_tar(path, {"a.mp4": bytes(5000), "b.mp4": bytes(5000)})
    path.write_bytes(path.read_bytes()[: 512 + 5120])


HOSTILE = {
    "a link": with_link,
    "a device": with_device,
    "8 TiB": of_8_tib,
    "truncated between two members": truncated,
    "path outside": lambda path: write_tar(path, {"../a.mp4": b"x"}),
    "absolute path": lambda path: write_tar(path, {"/tmp/a.mp4": b"x"}),
    "not a tar": lambda path: path.write_text("<html>"),
    "duplicate name": lambda path: write_tar(path, {"a.mp4": b"x", "b.mp4": b"x", "./a.mp4": b"x"}),
    "only a pickle": lambda path: write_tar(path, {"a.pkl": b"x"}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_or_damaged_tar_is_an_error_with_its_name(case, tmp_path):
    HOSTILE[case](tmp_path / "bad.tar")
    with pytest.raises(MegaSoraError, match="bad.tar"):
        find_clips(tmp_path / "bad.tar")


def test_a_folder_of_both_tars_and_clips_and_a_pattern_without_match_are_errors(tmp_path):
    touch(tmp_path / "both", "a.mp4")
    write_tar(tmp_path / "both" / "b.tar", {"b.mp4": b"x"})
    with pytest.raises(MegaSoraError, match="holds both tars and clips"):
        find_clips(tmp_path / "both")
    with pytest.raises(MegaSoraError, match=r"no .tar file matches .*\*.tar"):
        find_clips(tmp_path / "*.tar")
    touch(tmp_path, "clip.mp4")
    with pytest.raises(MegaSoraError, match="clip.mp4 is not a folder"):
        find_clips(tmp_path / "clip.mp4")


def test_a_pattern_finds_tars_in_linked_folders_once(tmp_path):
    for name in ("a.tar", "b.TAR", "deep/c.tar", "deep/er/d.tar", ".hidden/e.tar", ".f.tar"):
        write_tar(tmp_path / "in" / name, {f"{name[:-4].replace('/', '-').strip('.')}.mp4": b"x"})
    write_tar(tmp_path / "outside" / "g.tar", {"g.mp4": b"x"})
    for link in ("x", "y", "z"):
        (tmp_path / "in" / link).symlink_to(tmp_path / "in")  # three loops: 3 ** 40 paths
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "outside")
    found = {
        pattern: [clip.media.name for clip in find_clips(tmp_path / pattern).clips]
        for pattern in ("in/*.tar", "in/**/*.tar", "**/*.[tT]*", "in/**/er/*.tar", "i?/deep/**/*.tar")
    }
    assert found == {
        "in/*.tar": ["a.mp4"],
        "in/**/*.tar": ["a.mp4", "deep-c.mp4", "deep-er-d.mp4", "g.mp4"],
        "**/*.[tT]*": ["a.mp4", "b.mp4", "deep-c.mp4", "deep-er-d.mp4", "g.mp4"],
        "in/**/er/*.tar": ["deep-er-d.mp4"],
        "i?/deep/**/*.tar": ["deep-c.mp4", "deep-er-d.mp4"],
    }


def test_a_caption_may_have_100_kb_in_any_script(tmp_path):
    text = "狐 🦊 العربية " * 5000
    clips = touch(tmp_path / "clips", "a.mp4")
    (clips / "a.txt").write_text(text, encoding="utf-8")
    assert find_clips(clips).clips[0].caption == text.strip()
    tar = write_tar(tmp_path / "a.tar", {"a.mp4": b"x", "a.txt": text.encode()})
    assert find_clips(tar).clips[0].caption == text.strip()

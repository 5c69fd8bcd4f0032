"""Every file of a source is a clip or is counted; folder and tar are treated alike."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.config import load
from megasora.data.clip_writer import write_image, write_video
from megasora.errors import MegaSoraError
from megasora.ingest import ingest
from megasora.ingest.file_counts import CAPTION, CLIP, HIDDEN, MAX_SUFFIXES, NO_CLIP_TEXT, OTHER_SUFFIX, THUMBNAIL
from megasora.ingest.listing import Listing
from megasora.ingest.output_folder import SPEC_FILE
from megasora.ingest.sources import find_clips


def in_a_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def in_a_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.with_suffix(".tar")


either = pytest.mark.parametrize("place", [in_a_folder, in_a_tar], ids=["folder", "tar"])


def found(listing: Listing) -> dict[str, str | None]:
    """Clip -> caption, by names in the folder or in the tar."""
    return {clip.media.name or clip.name: clip.caption for clip in listing.clips}


# ---------------------------------------------------------------- thumbnails


@either
def test_a_picture_beside_a_video_is_its_thumbnail(place, tmp_path):
    files = {
        "a.mp4": b"", "a.jpg": b"", "a.webp": b"", "a.txt": b"of a", "a.info.json": b"{}",
        "b.mp4": b"", "b.mp4.png": b"", "deep/a.png": b"", "deep/a.txt": b"of deep a",
        "c.png": b"", "c.jpg": b"", "c.txt": b"of both", "d.MOV": b"", "d.JPG": b"", "d.TXT": b"of d",
    }  # fmt: skip
    listing = find_clips(place(tmp_path / "clips", files))
    expected = {
        "a.mp4": "of a", "b.mp4": None, "c.jpg": "of both", "c.png": "of both", "d.MOV": "of d",
        "deep/a.png": "of deep a",
    }  # fmt: skip
    assert found(listing) == expected
    assert listing.files.kinds[THUMBNAIL] == 4 and "4 thumbnails of videos (" in listing.files.describe()[0]


def test_in_a_tar_the_files_of_one_key_belong_together(tmp_path):
    files = {
        "7.mp4": b"", "7.thumb.jpg": b"", "7.caption.txt": b"seven", "8.video.mp4": b"",
        "8.json": b'{"caption": "eight"}',
        "Mr. A.mp4": b"", "Mr. A.txt": b"first", "Mr. B.mp4": b"", "Mr. B.txt": b"second", "Mr. C.jpg": b"",
    }  # fmt: skip
    listing = find_clips(in_a_tar(tmp_path / "clips", files))
    expected = {
        "7.mp4": "seven", "8.video.mp4": "eight", "Mr. A.mp4": "first", "Mr. B.mp4": "second", "Mr. C.jpg": None,
    }  # fmt: skip
    assert found(listing) == expected and listing.files.kinds == {CLIP: 5, CAPTION: 4, THUMBNAIL: 1}


def test_files_of_a_tar_may_have_any_order(tmp_path):
    files = {"a.mp4": b"", "b.txt": b"of b", "captions.jsonl": b'{"file": "c.mp4", "caption": "of c"}', "b.mp4": b"",
             "a.txt": b"of a", "c.mp4": b""}  # fmt: skip
    assert found(find_clips(in_a_tar(tmp_path / "clips", files))) == {"a.mp4": "of a", "b.mp4": "of b", "c.mp4": "of c"}


# ---------------------------------------------------------------- other files, and lines of captions.jsonl


@either
def test_other_suffixes_are_counted_and_shown(place, tmp_path):
    files = (
        {f"{i}.HEIC": b"" for i in range(5)}
        | {f"{i}.heic": b"" for i in range(3)}
        | {f"{i}.xyz": b"" for i in range(4)}
    )
    files |= {"a.mp4": b"", "a.txt": b"caption", "README": b"", "notes.txt": b"", ".DS_Store": b"", "._a.mp4": b""}
    listing = find_clips(place(tmp_path / "clips", files))
    assert listing.files.kinds == {CLIP: 1, CAPTION: 1, HIDDEN: 2, NO_CLIP_TEXT: 1, OTHER_SUFFIX: 13}
    (line,) = listing.files.describe()
    assert line == (
        "18 files: 1 clip, 1 caption, 2 hidden files, 1 text without a clip (notes.txt), "
        "13 files with other suffixes (8 .heic, 4 .xyz, 1 without suffix)"
    )


@either
def test_clips_and_captions_alone_need_no_line(place, tmp_path):
    files = {"a.mp4": b"", "a.txt": b"x", ".hidden": b"", "captions.jsonl": b'{"file": "a.mp4", "caption": "y"}'}
    assert find_clips(place(tmp_path / "clips", files)).files.describe() == []


def test_a_source_without_a_clip_says_what_it_holds_instead(tmp_path):
    in_a_folder(tmp_path / "clips", {f"{i}.heic": b"" for i in range(3)} | {"a.xyz": b""})
    with pytest.raises(MegaSoraError, match=r"no clip in .*; it holds 4 files with other suffixes \(3 .heic, 1 .xyz\)"):
        find_clips(tmp_path / "clips")


def test_thousands_of_suffixes_make_a_short_line(tmp_path):
    in_a_folder(tmp_path / "clips", {f"a.{i}": b"" for i in range(300)} | {"a.mp4": b""})
    files = find_clips(tmp_path / "clips").files
    (line,) = files.describe()
    assert (
        line.count(",") == MAX_SUFFIXES + 1
        and "300 files with" in line
        and line.endswith(", ...)")
        and len(json.dumps(files.details())) < 5000
    )


@either
def test_lines_that_match_no_clip_or_repeat_a_file_and_clips_without_a_line_are_counted(place, tmp_path):
    lines = [("a.mp4", "first"), ("a.mp4", "second"), ("gone.mp4", "x"), ("b.xyz", "x"), ("./c.mp4", "of c"),
             ("deep/d.mp4", "of d"), ("../out.mp4", "x")]  # fmt: skip
    table = "\n".join(json.dumps({"file": file, "caption": caption}) for file, caption in lines).encode()
    deep = b'{"file": "d.mp4", "caption": "nearer"}\n{"file": "D.mp4", "caption": "x"}'
    files = {name: b"" for name in ("a.mp4", "b.xyz", "c.mp4", "deep/d.mp4", "e.mp4", "f.mp4")}
    files |= {"captions.jsonl": table, "deep/captions.jsonl": deep, "f.txt": b"of f"}
    listing = find_clips(place(tmp_path / "clips", files))
    expected = {"a.mp4": "second", "c.mp4": "of c", "deep/d.mp4": "nearer", "e.mp4": None, "f.mp4": "of f"}
    assert found(listing) == expected
    assert listing.files.describe()[1] == (
        "captions.jsonl: 1 line repeats the file of an earlier one, which it replaces (a.mp4); "
        "1 clip has no line and no other caption (e.mp4); 4 lines match no clip (gone.mp4, b.xyz, ../out.mp4, ...)"
    )


# ---------------------------------------------------------------- invariants

NAMES = st.sampled_from(["a", "b", "a b", "a-b", "a.b", "🦊", "é", "-x", "new\nline", "x\x1b[31m", ".a", "A"])
SUFFIXES = st.sampled_from(
    [
        ".mp4",
        ".MP4",
        ".webm",
        ".jpg",
        ".PNG",
        ".webp",
        ".txt",
        ".TXT",
        ".json",
        ".mp4.jpg",
        ".heic",
        ".part",
        ".srt",
        "",
    ]
)
FOLDERS = st.sampled_from(["", "deep/", "val/", "deep/er/", ".hidden/"])
FILES = st.sets(
    st.one_of(st.builds("{}{}{}".format, FOLDERS, NAMES, SUFFIXES), st.just("deep/captions.jsonl")), max_size=14
)
CONTENTS = {
    ".txt": b"a caption", ".json": b'{"caption": "from json"}',
    "captions.jsonl": b'{"file": "a.mp4", "caption": "a line"}\n{"file": "no.mp4", "caption": "x"}',
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(FILES)
def test_every_file_is_counted_once_and_a_tar_is_as_its_folder(names):
    contents = {
        name: next((data for end, data in CONTENTS.items() if name.lower().endswith(end)), b"") for name in names
    }
    contents |= {"0.mp4": b"", "0.txt": b"always a clip"}
    contents = {name: contents[name] for name in sorted(contents, key=lambda name: name.split("/"))}
    with tempfile.TemporaryDirectory() as base:
        folder = find_clips(in_a_folder(Path(base) / "clips", contents))
        # the rule of keys, which only tars have, joins a.b to a: leave it out of the comparison
        plain = {name: data for name, data in contents.items() if name.rpartition("/")[2].count(".") < 2}
        again = find_clips(in_a_folder(Path(base) / "plain", plain))
        tar = find_clips(in_a_tar(Path(base) / "tar", plain))
    assert folder.files.num_files == len(contents)
    assert folder.files.kinds[CLIP] == len(folder.clips)
    assert sum(folder.files.suffixes.values()) == folder.files.kinds[OTHER_SUFFIX]
    assert found(tar) == found(again)
    assert tar.files.kinds == again.files.kinds and tar.files.lines == again.files.lines
    assert [clip.split for clip in tar.clips] == [clip.split for clip in again.clips]
    for line in folder.files.describe():
        assert str(len(folder.clips)) in line or "captions.jsonl" in line


@pytest.fixture(scope="module")
def messy(tmp_path_factory) -> Path:
    """A folder as people have them: 14 entries beside five clips, of which two can be read."""
    folder = tmp_path_factory.mktemp("source") / "my clips"
    (folder / "deep").mkdir(parents=True)
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    write_video(frames, 12, folder / "holiday 🦊.mp4")
    write_image(frames[0], folder / "deep" / "new\nline\x1b[31m.png")
    shutil.copy(folder / "deep" / "new\nline\x1b[31m.png", folder / "holiday 🦊.png")
    files = {
        "holiday 🦊.txt": "a holiday", "holiday 🦊.info.json": "{}", "empty.mp4": "", "page.webm": "<html>",
        "voice.m4a": "x", "song.MP3": "x", "video.mp4.part": "x", ".DS_Store": "x", "Thumbs.db": "x",
        "holiday 🦊.jpg": "x", "captions.jsonl": '{"file": "gone.mp4", "caption": "x"}\n',
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"")
    (folder / "again").symlink_to(".")
    (folder / "gone").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.mp4")
    return folder


def test_found_is_accepted_plus_rejected_plus_counted(messy, tmp_path, capsys):
    config = load(None, ["codec.channels=24", "ingest.workers=1", "ingest.missing_caption=empty"])
    manifest = ingest(messy, tmp_path / "out", config)
    report = json.loads((tmp_path / "out" / SPEC_FILE).read_text())["report"]
    entries = sum(not (entry.is_dir() and not entry.is_symlink()) for entry in messy.rglob("*"))
    assert report["clips"] == {"accepted": 2, "rejected": 3} and manifest.rejected.keys() >= {"empty file"}
    kinds = Counter(report["files"])
    assert kinds.total() == entries and kinds[CLIP] == 5 == sum(report["clips"].values())
    assert kinds == {
        CLIP: 5, CAPTION: 2, HIDDEN: 1, THUMBNAIL: 2, NO_CLIP_TEXT: 1, OTHER_SUFFIX: 4, "not a regular file": 1,
        "broken link": 1, "folder seen before": 1,
    }  # fmt: skip
    assert report["other_suffixes"] == {".db": 1, ".m4a": 1, ".mp3": 1, ".part": 1}
    assert report["caption_lines"] == {"matches no clip": 1, "clip without a line": 4}
    screen = capsys.readouterr()
    shown = " ".join(screen.out.split())
    assert f"{entries} files: 5 clips, 2 captions" in shown and "(1 .m4a" not in screen.err
    assert "captions.jsonl: " in shown and "1 line matches no clip (gone.mp4)" in shown
    assert not set(screen.out + screen.err) & {"\x1b", "\r", "\x07"}
    screen.out.encode("utf-8")  # no lone surrogates


def test_the_report_of_an_ingest_does_not_prevent_its_repetition(messy, tmp_path):
    config = load(None, ["codec.channels=24", "ingest.workers=1", "ingest.missing_caption=empty"])
    ingest(messy, tmp_path / "out", config)
    before = (tmp_path / "out" / SPEC_FILE).read_text()
    source = shutil.copytree(
        messy, tmp_path / "my clips", symlinks=True, ignore=lambda _, names: {"pipe.mp4"} & set(names)
    )
    (source / "more.heic").write_text("x")  # no clip: the numbers of the clips are the same
    ingest(source, tmp_path / "out", config)
    after = json.loads((tmp_path / "out" / SPEC_FILE).read_text())
    assert after["report"]["other_suffixes"][".heic"] == 1
    assert {**after, "report": None} == {**json.loads(before), "report": None}

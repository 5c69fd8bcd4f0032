"""`ingest` from clips to shards: caption files, records, rejected clips with their reasons, and failures."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megasora.codec import build_codec
from megasora.config import Config, load
from megasora.data.clip_writer import write_image, write_video
from megasora.data.patches import unpatchify
from megasora.data.shard_format import MANIFEST, read_manifest
from megasora.data.shard_reader import ShardSplit
from megasora.errors import MegaSoraError
from megasora.ingest import ingest
from megasora.ingest.sources import find_clips


def make_video(path: Path, shade: int = 100, frames: int = 5, height: int = 16, width: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 80, width, dtype=np.uint8)[None, None, :, None]
    video = np.full((frames, height, width, 3), shade, np.uint8) + ramp
    write_video(video.astype(np.uint8), 12, path)
    return path


def make_still(path: Path, shade: int = 100, caption: str | None = "a still") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(np.full((16, 16, 3), shade, np.uint8), path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def settings(*overrides: str) -> Config:
    return load(None, ["codec.channels=24", "ingest.workers=1", *overrides])


def captions(folder: Path, split: str = "train") -> list[str]:
    shards = ShardSplit.open(folder, split)
    return [shards.read(i, lambda text: torch.zeros(1, 1)).caption for i in range(len(shards))]


def sources(folder: Path, split: str = "train") -> dict[str, int]:
    """Source name -> sample id."""
    shards = ShardSplit.open(folder, split)
    return {shards.read_meta(i)["source"]: shards.index[i].sample_id for i in range(len(shards))}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def paths_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


# ---------------------------------------------------------------- captions


def test_captions_come_from_txt_json_and_jsonl(tmp_path):
    clips = tmp_path / "clips"
    make_still(clips / "a.png", caption="\ufeff from  a\ttext \n file\n")
    make_still(clips / "b.png", caption=None)
    (clips / "b.json").write_text(json.dumps({"caption": "from a\njson file", "id": 3}))
    make_still(clips / "c.png", caption=None)
    make_still(clips / "deep" / "d.png", caption=None)
    make_still(clips / "deep" / "e.png", caption=None)
    lines = [
        {"file": "c.png", "caption": "from  the table"},
        {"file": "deep/d.png", "caption": "from the table above"},
        {"file": "deep/e.png", "caption": "hidden by the nearer table"},
        {"file": "a.png", "caption": "hidden by the text file"},
    ]
    (clips / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    near = json.dumps({"file": "e.png", "caption": "from\u2028the nearer table"}, ensure_ascii=False)
    (clips / "deep" / "captions.jsonl").write_text(near, encoding="utf-8")
    captions = {clip.media.path.name: clip.caption for clip in find_clips(clips).clips}
    assert captions == {
        "a.png": "from a text file",
        "b.png": "from a json file",
        "c.png": "from the table",
        "d.png": "from the table above",
        "e.png": "from the nearer table",
    }


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.json", b"{", "a.png: its caption cannot be read: a.json: "),
        ("a.json", b'{"text": "a cat"}', "a.png has no caption"),
        ("a.json", b'{"caption": null}', "a.png has no caption"),
        ("a.json", b'["a cat"]', "a.json: no JSON object"),
        ("a.json", b'{"caption": "\\ud800"}', "a.png: its caption is not UTF-8 text: a.json: "),
        ("a.txt", "un café".encode("latin-1"), "a.png: its caption is not UTF-8 text: a.txt: "),
        ("captions.jsonl", b'{"file": "a.png", "caption": "a cat"}\nnot json\n', "captions.jsonl:2 is not"),
        ("captions.jsonl", b'{"file": "a.png"}\n', "captions.jsonl:1 is not"),
        ("captions.jsonl", b'{"file": "a.png", "caption": null}\n', "captions.jsonl:1 is not"),
        ("captions.jsonl", b'{"file": ["a.png"], "caption": "a cat"}\n', "captions.jsonl:1 is not"),
        ("captions.jsonl", b"\xff\n", "captions.jsonl:1 is not"),
        ("captions.jsonl", b"[" * 100_000, "captions.jsonl:1 is not"),
        ("captions.jsonl", b'{"file": "a.png", "caption": 1' + b"0" * 5000 + b"}", "captions.jsonl:1 is not"),
    ],
)
def test_a_caption_that_is_not_text_is_an_error_with_file_and_line(name, data, words, tmp_path):
    make_still(tmp_path / "clips" / "a.png", caption=None)
    (tmp_path / "clips" / name).write_bytes(data)
    with pytest.raises(MegaSoraError, match=words):
        ingest(tmp_path / "clips", tmp_path / "shards", settings())
    assert paths_below(tmp_path) == sorted(["clips", "clips/a.png", f"clips/{name}"])


@pytest.fixture
def partly_captioned(tmp_path) -> Path:
    """Three clips: one without a caption, one whose caption is white space."""
    make_still(tmp_path / "clips" / "a.png", caption="a caption")
    make_still(tmp_path / "clips" / "b.png", caption=None)
    make_still(tmp_path / "clips" / "c.png", caption=" \n")
    return tmp_path / "clips"


def test_a_missing_caption_is_an_error_with_the_count_and_the_remedies(partly_captioned, tmp_path):
    with pytest.raises(MegaSoraError) as error:
        ingest(partly_captioned, tmp_path / "shards", settings())
    for words in ("b.png has no caption (2 of 3", "b.txt", "ingest.missing_caption=skip", "=empty"):
        assert words in str(error.value)
    assert not (tmp_path / "shards").exists()


def test_a_missing_caption_is_skipped_or_empty_as_configured(partly_captioned, tmp_path):
    manifest = ingest(partly_captioned, tmp_path / "skip", settings("ingest.missing_caption=skip"))
    assert captions(tmp_path / "skip") == ["a caption"]
    assert manifest.rejected == {"no caption": 2}
    manifest = ingest(partly_captioned, tmp_path / "empty", settings("ingest.missing_caption=empty"))
    assert captions(tmp_path / "empty") == ["a caption", "", ""]
    assert manifest.rejected == {}


def test_a_caption_that_is_too_long_rejects_only_its_clip(tmp_path):
    make_still(tmp_path / "clips" / "a.png", caption="five words are too many")
    make_still(tmp_path / "clips" / "b.png", caption="four words are fine")
    manifest = ingest(tmp_path / "clips", tmp_path / "shards", settings("text.max_tokens=4"))
    assert manifest.rejected == {"caption too long": 1}
    assert captions(tmp_path / "shards") == ["four words are fine"]


# ---------------------------------------------------------------- records


def test_decoded_patches_are_the_frames_of_the_clip(tmp_path):
    """An image with all coefficients: decoded patches equal its pixels; sides of 13 x 21 are padded, not cropped."""
    pixels = np.random.default_rng(0).integers(0, 255, (13, 21, 3), dtype=np.uint8)
    (tmp_path / "clips").mkdir()
    write_image(pixels, tmp_path / "clips" / "a.png")
    (tmp_path / "clips" / "a.txt").write_text("noise")
    config = settings("codec.channels=768")
    ingest(tmp_path / "clips", tmp_path / "shards", config)
    record = ShardSplit.open(tmp_path / "shards", "train").read(0, lambda text: torch.zeros(1, 1))
    assert record.grid == (1, 2, 3) and record.native_size == (13.0, 21.0, 1.0, 0.0)
    frame = build_codec(config.codec).decode(unpatchify(record.patches_LP.float(), record.grid, (1, 1, 1)))[0]
    decoded = (frame.permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(decoded[:13, :21] - pixels).max() < 1.0  # float16
    assert np.abs(decoded[13:, :21] - pixels[-1:]).max() < 1.0


def test_records_have_native_size_length_and_rate_and_the_folder_val_is_the_validation_split(tmp_path):
    clips = tmp_path / "clips"
    make_video(clips / "train" / "a.mp4", frames=9, height=16, width=24)
    make_video(clips / "b.mp4", frames=6, height=24, width=16)
    make_video(clips / "val" / "c.mp4", frames=5)
    make_video(clips / "train" / "val" / "d.mp4", frames=5)  # `val` counts only directly below the source
    manifest = ingest(clips, tmp_path / "shards", settings("ingest.missing_caption=empty"))
    train, val = (ShardSplit.open(tmp_path / "shards", split) for split in ("train", "val"))
    assert sources(tmp_path / "shards") == {"b.mp4": 0, "train/a.mp4": 1, "train/val/d.mp4": 2}
    assert sources(tmp_path / "shards", "val") == {"val/c.mp4": 3}
    assert [e.native_size for e in train.index] == [(24, 16, 6, 12), (16, 24, 9, 12), (16, 24, 5, 12)]
    assert [e.grid for e in train.index] == [(3, 3, 2), (3, 2, 3), (2, 2, 3)]
    assert [e.grid for e in val.index] == [(2, 2, 3)]
    assert manifest.splits["train"]["clips"] == 3 and manifest.splits["val"]["clips"] == 1
    assert manifest.splits["train"]["frames"] == 20 and manifest.splits["train"]["tokens"] == 18 + 18 + 12


def test_shards_do_not_depend_on_the_number_of_workers(clips, tmp_path):
    for name, workers in (("one", 1), ("two", 3)):
        ingest(clips, tmp_path / name, settings("ingest.missing_caption=empty", f"ingest.workers={workers}"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_tar_that_reaches_shard_mib_is_closed(tmp_path):
    clips = tmp_path / "clips"
    for i in range(3):
        make_video(clips / f"{i}.mp4", height=128, width=256, frames=29)
    config = settings("ingest.missing_caption=empty", "ingest.shard_mib=1", "codec.channels=192")
    manifest = ingest(clips, tmp_path / "shards", config)
    assert list(manifest.splits["train"]["shards"]) == [f"train-000000-00{i}.tar" for i in range(3)]
    assert list(sources(tmp_path / "shards")) == ["0.mp4", "1.mp4", "2.mp4"]


def test_file_names_may_have_spaces_quotes_brackets_and_emoji(tmp_path, capsys):
    names = [
        "a red one.png",
        'it\'s "quoted".png',
        "🦊 [red] 狐.png",
        "100%.png",
        "-dash.png",
        "a.b.png",
        "two..dots.png",
        "new\nline.png",
    ]
    for name in names:
        make_still(tmp_path / "my clips [/x]" / name, caption=f"this is {name}")
    (tmp_path / "my clips [/x]" / "broken [red].png").write_bytes(b"no image")
    (tmp_path / "my clips [/x]" / "broken [red].txt").write_text("broken")
    ingest(tmp_path / "my clips [/x]", tmp_path / "my shards", settings())
    assert sorted(sources(tmp_path / "my shards")) == sorted(names)
    assert sorted(captions(tmp_path / "my shards")) == sorted(" ".join(f"this is {name}".split()) for name in names)
    shown = capsys.readouterr().out.replace("\n", "").replace(" ", "").replace("│", "")
    assert "broken[red].png" in shown  # brackets are not read as markup


def test_paths_may_contain_parent_folders(tmp_path):
    make_still(tmp_path / "clips" / "a.png", caption="above the list")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_text("../clips/a.png\n")
    ingest(tmp_path / "lists" / ".." / "lists" / "list.txt", tmp_path / "lists" / ".." / "shards", settings())
    assert captions(tmp_path / "shards") == ["above the list"]
    assert sources(tmp_path / "shards") == {"../clips/a.png": 0}


def test_hidden_files_and_other_files_are_not_clips(tmp_path):
    make_still(tmp_path / "clips" / "a.png")
    make_still(tmp_path / "clips" / ".b.png")
    (tmp_path / "clips" / "notes.md").write_text("# notes")
    (tmp_path / "clips" / "folder.mp4").mkdir()
    assert [clip.media.path.name for clip in find_clips(tmp_path / "clips").clips] == ["a.png"]


# ---------------------------------------------------------------- rejections and errors


def four_videos(folder: Path) -> Path:
    for i in range(4):
        make_video(folder / f"{i}.mp4", shade=40 * i).with_suffix(".txt").write_text(f"clip {i}")
    return folder


def test_a_damaged_clip_is_counted_with_its_reason_and_the_others_are_written(tmp_path, capsys):
    clips = four_videos(tmp_path / "clips")
    (clips / "1.mp4").write_text("this is text\n" * 100)
    (clips / "2.mp4").write_bytes(b"")
    manifest = ingest(clips, tmp_path / "shards", settings())
    assert manifest.rejected == {"wrong suffix": 1, "empty file": 1}
    assert read_manifest(tmp_path / "shards").rejected == manifest.rejected
    assert captions(tmp_path / "shards") == ["clip 0", "clip 3"]
    shown = capsys.readouterr().out
    assert "wrong suffix" in shown and "empty file" in shown
    files = ["blocks", "blocks/000000.json", MANIFEST, "ingest.json"]
    assert paths_below(tmp_path / "shards") == [*files, "train-000000-000.index.npy", "train-000000-000.tar"]


def test_sample_ids_do_not_change_when_another_clip_is_damaged(tmp_path):
    clips = four_videos(tmp_path / "clips")
    ingest(clips, tmp_path / "complete", settings())
    (clips / "1.mp4").write_bytes((clips / "1.mp4").read_bytes()[:400])
    ingest(clips, tmp_path / "damaged", settings())
    complete, damaged = sources(tmp_path / "complete"), sources(tmp_path / "damaged")
    assert complete == {"0.mp4": 0, "1.mp4": 1, "2.mp4": 2, "3.mp4": 3}
    assert damaged == {name: sample_id for name, sample_id in complete.items() if name != "1.mp4"}


def nothing_usable(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for i in range(3):
        (tmp_path / "clips" / f"{i}.mp4").write_text("text\n")
        (tmp_path / "clips" / f"{i}.txt").write_text("a caption")
    return tmp_path / "clips"


def empty_folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "readme.txt").write_text("nothing here")
    return tmp_path / "clips"


def no_folder(tmp_path: Path) -> Path:
    return tmp_path / "nowhere"


def a_file(tmp_path: Path) -> Path:
    return make_still(tmp_path / "a.png")


SOURCES = [
    (nothing_usable, "none of the 3 clips in .*clips could be used; the first: .*0.mp4"),
    (empty_folder, "no clip in .*clips: looked for .mp4"),
    (no_folder, "nowhere is not a folder"),
    (a_file, "a.png is not a folder"),
]


@pytest.mark.parametrize(("make", "words"), SOURCES, ids=lambda v: getattr(v, "__name__", ""))
def test_a_source_without_a_usable_clip_is_an_error_and_leaves_no_files(make, words, tmp_path):
    source = make(tmp_path)
    before = paths_below(tmp_path)
    for out in (tmp_path / "shards", tmp_path / "new" / "folders" / "shards"):
        with pytest.raises(MegaSoraError, match=words):
            ingest(source, out, settings())
        assert paths_below(tmp_path) == before


def test_an_output_folder_with_other_files_is_an_error_and_is_not_changed(tmp_path):
    make_still(tmp_path / "clips" / "a.png")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "other.txt").write_text("other")
    (tmp_path / "file").write_text("other")
    before = paths_below(tmp_path)
    for out in ("shards", "file"):
        with pytest.raises(MegaSoraError, match=f"{out} exists and is not empty; remove it or give another --out"):
            ingest(tmp_path / "clips", tmp_path / out, settings())
    assert paths_below(tmp_path) == before


def test_an_empty_output_folder_may_be_a_link_or_the_working_folder(tmp_path, monkeypatch):
    make_still(tmp_path / "clips" / "a.png")
    for name in ("empty", "target", "current"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    ingest(tmp_path / "clips", tmp_path / "empty", settings())
    ingest(tmp_path / "clips", tmp_path / "link", settings())
    monkeypatch.chdir(tmp_path / "current")
    ingest(tmp_path / "clips", Path("."), settings())
    for name in ("empty", "target", "current"):
        assert captions(tmp_path / name) == ["a still"]
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_an_error_and_leaves_no_files(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    make_still(tmp_path / "clips" / "a.png")
    before = paths_below(tmp_path)
    monkeypatch.setattr("megasora.data.shard_writer.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        ingest(tmp_path / "clips", tmp_path / "shards", settings())
    assert paths_below(tmp_path) == before


def test_an_ingest_interrupted_in_its_first_block_leaves_no_files(tmp_path, monkeypatch):
    make_still(tmp_path / "clips" / "a.png")
    before = paths_below(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("megasora.data.shard_writer.BlockWriter.commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ingest(tmp_path / "clips", tmp_path / "shards", settings())
    assert paths_below(tmp_path) == before
    ingest(tmp_path / "clips", tmp_path / "shards", settings())
    assert captions(tmp_path / "shards") == ["a still"]


def interrupt(*_):
    raise KeyboardInterrupt

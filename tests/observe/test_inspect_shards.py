"""`megasora shards` prints and draws what the folder holds, and names damage with exit code 2."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megasora.cli import main
from megasora.codec import build_codec
from megasora.config import CodecConfig
from megasora.data.folder import open_folder
from megasora.data.manifest_writer import write_manifest
from megasora.data.pack import Record
from megasora.data.patches import frames_to_float, pad_frames, patchify
from megasora.data.shard_format import MANIFEST
from megasora.data.shard_writer import BlockWriter
from megasora.data.verify import verify
from megasora.observe.inspect_shards import decode_clip, expected_padding, preview

CAPTION = 'a "red" circle — 赤 \x1b[31m'


def ramp(frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [F, H, W, 3]: smooth, brighter with time, so that a codec keeps it."""
    across = np.linspace(40, 120, width)[None, None, :, None] + np.linspace(0, 60, frames)[:, None, None, None]
    return np.broadcast_to(across, (frames, height, width, 3)).round().astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Clips 0 to 5 of two blocks: videos of 13 x 21 pixels and an image; clip 4 is held out."""
    folder = tmp_path_factory.mktemp("my data") / "shards 🦊"
    config = CodecConfig(channels=96)
    codec = build_codec(config)
    for block in range(2):
        with BlockWriter(folder, block, 1 << 20) as writer:
            for i in range(3 * block, 3 * block + 3):
                frames = ramp(1 if i == 2 else 5 + 4 * i, 13, 21)
                padded = pad_frames(frames_to_float(torch.from_numpy(frames)), (8, 8))
                patches, grid = patchify(codec.encode(padded), (1, 1, 1))
                native = (13.0, 21.0, float(len(frames)), 12.0 if len(frames) > 1 else 0.0)
                record = Record(i, patches, grid, torch.zeros(1, 1), native, CAPTION)
                writer.add("val" if i == 4 else "train", record, {"source": f"{i}.mp4", "sha256": f"{i:064x}"})
            writer.commit({"too dark": 2}, {})
    write_manifest(folder, codec.fingerprint, "bytes-16", [1, 1, 1], 2, asdict(config))
    return folder


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """A copy of the folder with one bit of clip 3 flipped."""
    import shutil

    shutil.copytree(folder, tmp_path / "damaged")
    path = tmp_path / "damaged" / "train-000001-000.tar"
    data = bytearray(path.read_bytes())
    data[3000] ^= 4
    path.write_bytes(data)
    return path.parent


def test_counts_of_each_split_and_of_rejected_clips_are_printed(folder, capsys):
    assert main(["shards", str(folder)]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    tokens = [2 * 3 * (2 + i) if i != 2 else 6 for i in range(6)]
    train = [n for i, n in enumerate(tokens) if i != 4]
    assert f"train 5 1 {5 + 9 + 1 + 17 + 25} {sum(train)} {max(train)} 2" in shown
    assert f"val 1 0 21 {tokens[4]} {tokens[4]} 1" in shown
    assert "left out: too dark 4" in shown and "dct-4x8x8-96" in shown


def test_padding_is_that_of_the_planned_packs(folder, capsys):
    assert (
        main(["shards", str(folder), "--tokens-per-pack", "48"]) == 0
    )  # 12, 18, 6, 30 and 42 tokens: 42 + 6, 30 + 18, 12
    assert "packs of 48 tokens: 3 per epoch, padding 25.00%\n" in capsys.readouterr().out
    assert main(["shards", str(folder), "--tokens-per-pack", "36"]) == 0
    shown = capsys.readouterr().out
    assert (
        "packs of 36 tokens: 2 per epoch, padding 8.33%; longer clips, left out here: 1 (the longest has 42)" in shown
    )
    assert expected_padding(np.array([100]), 8).startswith("packs of 8 tokens: none; longer clips, left out here: 1")
    assert main(["shards", str(folder), "--tokens-per-pack", "0"]) == 2


def test_undamaged_shards_have_no_faults_and_a_damaged_record_is_named_with_exit_code_2(folder, damaged, capsys):
    assert main(["shards", str(folder), "--verify"]) == 0
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert capsys.readouterr().out == f"6 clips, {size:,} bytes: no faults\n"
    assert main(["shards", str(damaged), "--verify"]) == 2
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("train-000001-000.tar: byte ") and "of sample 3 is damaged" in first
    assert last == f"6 clips, {size:,} bytes: 1 fault"


def test_wrong_counts_and_a_wrong_codec_in_the_manifest_are_faults(damaged, folder, capsys):
    path = damaged / MANIFEST
    values = json.loads((folder / MANIFEST).read_text())
    values["splits"]["train"]["frames"] += 1
    values["splits"]["train"]["token_histogram"][1] += 1
    values["codec_fingerprint"] = values["codec_fingerprint"].replace("96", "95")
    path.write_text(json.dumps(values))
    assert main(["shards", str(damaged), "--verify"]) == 2
    shown = capsys.readouterr().out
    assert "says frames 58 of train, its indices 57" in shown and "says token_histogram" in shown
    assert "says codec dct-4x8x8-95" in shown and "4 faults" in shown


def test_a_folder_without_shards_is_an_error(tmp_path, capsys):
    for option in ([], ["--verify"], ["--show", "0", str(tmp_path / "x.png")]):
        assert main(["shards", str(tmp_path), *option]) == 2
        assert f"no {MANIFEST} in {tmp_path}" in capsys.readouterr().err


def test_a_clip_is_decoded_at_its_native_size(folder):
    for i, split in ((1, "train"), (2, "train"), (4, "val")):
        frames, metadata = decode_clip(folder, i)
        expected = ramp(1 if i == 2 else 5 + 4 * i, 13, 21)
        assert frames.shape == expected.shape and np.abs(frames.astype(int) - expected).max() <= 8
        assert (metadata["split"], metadata["caption"], metadata["source"]) == (split, CAPTION, f"{i}.mp4")
        assert metadata["frames_shown"] == len(frames)


def test_only_the_first_frames_of_a_large_clip_are_decoded(folder, monkeypatch):
    whole, _ = decode_clip(folder, 5)
    monkeypatch.setattr("megasora.observe.inspect_shards.MAX_DECODED_PIXELS", 3 * 4 * 16 * 24)
    frames, metadata = decode_clip(folder, 5)
    assert len(frames) == metadata["frames_shown"] == 9 and metadata["frames"] == len(whole) == 25
    assert np.array_equal(frames, whole[:9])


def test_a_clip_is_drawn_with_its_caption_and_metadata(folder, tmp_path, capsys):
    out = tmp_path / "clip.png"
    assert main(["shards", str(folder), "--show", "3", str(out)]) == 0
    shown = capsys.readouterr().out
    with Image.open(out) as sheet:
        metadata = json.loads(sheet.text["Comment"])
        assert sheet.width > 8 * 21 * (160 // 13)
    assert metadata["caption"] == CAPTION and metadata["sample_id"] == 3 and metadata["shard"] == "train-000001-000.tar"
    assert '"a \\"red\\" circle — 赤 \\u001b[31m"' in shown and "\x1b" not in shown  # no escape codes
    assert f"{3:064x}" in shown and str(out) in shown


@pytest.mark.parametrize(
    ("show", "words"),
    [
        (["9", "x.png"], "has no sample 9; it has 6 clips"),
        (["one", "x.png"], "give a sample id, a whole number"),
        (["1", "x.jpg"], "the name of a .png file"),
        (["1", "nowhere/x.png"], "there is no folder nowhere"),
    ],
)
def test_a_clip_that_cannot_be_drawn_is_an_error(show, words, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["shards", str(folder), "--show", *show]
    assert main(arguments) == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_codec_with_other_settings_is_an_error(damaged, capsys, tmp_path):
    path = damaged / MANIFEST
    values = json.loads(path.read_text())
    for settings, words in (
        ({"channels": 95}, "its settings here make dct"),
        ({"wings": 2}, "unknown to this version"),
    ):
        path.write_text(json.dumps({**values, "codec_settings": settings}))
        assert main(["shards", str(damaged), "--show", "0", str(tmp_path / "x.png")]) == 2
        assert words in capsys.readouterr().err


def test_preview_frames_are_evenly_spaced_and_at_most_of_the_given_height():
    video = np.stack([np.full((320, 480, 3), i, np.uint8) for i in range(100)])
    tiles, zoom = preview(video)
    assert tiles.shape == (8, 160, 240, 3) and zoom == 1
    assert tiles[0].max() == 0 and tiles[-1].min() == 99 and (np.diff(tiles[:, 0, 0, 0].astype(int)) >= 14).all()
    tiles, zoom = preview(video[:3, :40, :40])
    assert tiles.shape == (3, 40, 40, 3) and zoom == 4


def test_faults_of_a_remote_folder_are_those_of_the_local_one(damaged):
    assert [fault.sample_id for fault in verify(open_folder(f"file://{damaged}"))] == [3]

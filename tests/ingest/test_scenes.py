"""Scene detection, frame hashes and near-duplicates, and the tool that lists scenes."""

from __future__ import annotations

import json
import os
import runpy
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from megasora.config import IngestConfig, load
from megasora.data.clip_reader import read_clip
from megasora.data.clip_writer import write_image, write_video
from megasora.data.shard_reader import ShardSplit
from megasora.ingest import ingest
from megasora.ingest.duplicates import DuplicateIndex, frame_hash
from megasora.ingest.scenes import SceneDetector, color_cells
from megasora.ingest.sources import find_clips

TOOL = Path(__file__).resolve().parents[2] / "tools" / "list_clips.py"


def texture(seed: int, height: int = 96, width: int = 160) -> np.ndarray:
    """Smooth blobs, float [H, W, 3] in 0 to 255, the same picture at every size."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in g.uniform([-3, -3, 0], [3, 3, 6], (8, 3))]
    mix = np.tensordot(g.normal(size=(3, 8)), np.array(waves), 1)
    return np.clip(128 + 40 * mix, 0, 255).transpose(1, 2, 0)


def pan(seed: int, count: int, step: int) -> list[np.ndarray]:
    """A camera that pans over a picture by `step` pixels per frame."""
    wide = texture(seed, 96, 160 + count * step)
    return [wide[:, i * step : i * step + 160].astype(np.uint8) for i in range(count)]


def detect_scenes(frames: list[np.ndarray], threshold: float = 20.0, min_frames: int = 4) -> list[tuple[int, int]]:
    detector = SceneDetector(threshold, min_frames)
    for frame in frames:
        detector.add_frame(color_cells(frame))
    return detector.scenes()


def test_cells_are_mean_colours():
    frame = np.zeros((160, 320, 3), np.uint8)
    frame[:10, 300:] = (10, 20, 30)
    cells = color_cells(frame)
    assert cells.shape == (16, 16, 3) and cells[0, 15].tolist() == [10, 20, 30] and cells.sum() == 60
    assert color_cells(np.full((1, 3, 3), 7, np.uint8)).tolist() == np.full((16, 16, 3), 7).tolist()


def test_scenes_begin_exactly_at_the_cuts():
    frames = [*pan(0, 12, 1), *pan(1, 9, 3), *pan(2, 20, 0)]
    assert detect_scenes(frames) == [(0, 12), (12, 21), (21, 41)]


def test_fast_motion_noise_and_fades_are_not_cuts():
    g = np.random.default_rng(0)
    noisy = [np.clip(f + g.normal(0, 20, f.shape), 0, 255).astype(np.uint8) for f in pan(0, 20, 2)]
    fading = [(f * (i / 40)).astype(np.uint8) for i, f in enumerate(pan(1, 40, 0))]
    for frames in (pan(0, 30, 16), noisy, fading):
        assert detect_scenes(frames) == [(0, len(frames))]


def test_a_flash_is_not_a_scene_and_a_short_end_joins_the_previous_scene():
    still, other = pan(0, 20, 0), pan(1, 1, 0)
    assert detect_scenes([*still[:10], *other, *still[10:]]) != [(0, 10), (10, 11), (11, 21)]
    assert all(end - first >= 4 for first, end in detect_scenes([*still[:10], *other, *still[10:]]))
    assert detect_scenes([*still, *pan(1, 3, 0)]) == [(0, 23)]
    assert detect_scenes([*still, *pan(1, 4, 0)]) == [(0, 20), (20, 24)]
    assert detect_scenes(still[:1]) == [(0, 1)]


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return (frame_hash(color_cells(a)) ^ frame_hash(color_cells(b))).bit_count()


def test_hashes_are_close_under_size_brightness_and_grain_and_far_for_other_pictures():
    for seed in range(6):
        one = texture(seed)
        brighter = one * 0.8 + 40
        grainy = np.clip(one + np.random.default_rng(0).normal(0, 6, one.shape), 0, 255)
        for same in (texture(seed, 270, 480), brighter, grainy):
            assert distance(one.astype(np.uint8), same.astype(np.uint8)) <= 4
        assert distance(one.astype(np.uint8), texture(seed + 10).astype(np.uint8)) >= 12


@pytest.mark.parametrize("bits", [0, 1, 4, 16])
def test_near_duplicates_are_those_of_an_all_pairs_comparison(bits):
    g = np.random.default_rng(bits)
    pairs: list[tuple[int, int]] = []
    for _ in range(300):
        pair = [int(v) for v in g.integers(0, 1 << 63, 2)]
        if pairs and g.random() < 0.5:
            pair = [
                value ^ sum(1 << int(b) for b in set(g.integers(0, 64, g.integers(0, bits + 2)))) for value in pairs[-1]
            ]
        pairs.append((pair[0], pair[1]))
    index, distinct = DuplicateIndex(bits), []
    for pair in pairs:
        expected = [
            n for n, d in enumerate(distinct) if all((a ^ b).bit_count() <= bits for a, b in zip(pair, d, strict=True))
        ]
        assert index.find_or_add(pair) == (expected[0] if expected else None)
        distinct += [] if expected else [pair]
    assert 0 < len(distinct) < len(pairs)


def test_an_ingested_list_of_scenes_has_the_frames_between_the_cuts(tmp_path, capsys):
    frames = [*pan(0, 15, 1), *pan(1, 13, 1), *pan(2, 14, 1)]
    clips = tmp_path / "clips"
    clips.mkdir()
    write_video(np.stack(frames), 12, clips / "a.mp4")
    write_video(np.stack(frames[15:28]), 12, clips / "b again.mp4", crf="20")  # the second scene once more
    write_image(frames[0], clips / "c.png")
    (clips / "d.mp4").write_text("broken")
    for name in "a", "b again", "c", "d":
        (clips / f"{name}.txt").write_text(f"this is {name} 🦊")
    run = runpy.run_path(str(TOOL))["main"]
    arguments = [str(clips), "--out", str(tmp_path / "list.jsonl"), "--scenes", "--unique", "--min-seconds", "0.5"]
    assert run([*arguments, "ingest.workers=1"]) == 0
    assert "5 clips in" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    common = {"file": "clips/a.mp4", "split": "train", "caption": "this is a 🦊"}
    assert lines[:3] == [
        {**common, "end": 1.25},
        {**common, "start": 1.25, "end": 2.333333},
        {**common, "start": 2.333333},
    ]
    assert [line["file"] for line in lines[3:]] == ["clips/c.png", "clips/d.mp4"]
    ingest(tmp_path / "list.jsonl", tmp_path / "out", load(None, ["ingest.workers=1", "codec.channels=768"]))
    shards = ShardSplit.open(tmp_path / "out", "train")
    assert [entry.native_size[2] for entry in shards.index] == [15, 13, 14, 1]
    means = [shards.read(i, lambda text: torch.zeros(1, 1)).patches_LP.float()[0, 0] for i in range(3)]
    frames_FHWC = read_clip(clips / "a.mp4", IngestConfig()).frames_FHWC.astype(float)
    # the first coefficient of the first block of the first frame of each scene
    expected = [(frames_FHWC[i][:8, :8].mean() / 127.5 - 1) / 0.5 for i in (0, 15, 28)]
    assert np.allclose(means, expected, atol=5e-3)


def test_a_list_of_scenes_in_tars_gives_the_records_of_the_files(tmp_path):
    frames = [*pan(0, 15, 1), *pan(1, 13, 1)]
    clips, tars = tmp_path / "clips", tmp_path / "tars"
    clips.mkdir()
    tars.mkdir()
    write_video(np.stack(frames), 12, clips / "a b.mp4")
    write_image(frames[20], clips / "c.png")
    (clips / "d.mp4").write_text("broken")
    with tarfile.open(tars / "raw.tar", "w") as tar:
        for path in sorted(clips.iterdir()):
            (clips / "caption").write_text(f"this is {path.stem} 🦊", encoding="utf-8")
            tar.add(path, f"in/{path.name}")
            tar.add(clips / "caption", f"in/{path.stem}.txt")
    for path in sorted(clips.glob("*.*")):
        path.with_suffix(".txt").write_text(f"this is {path.stem} 🦊", encoding="utf-8")
    run = runpy.run_path(str(TOOL))["main"]
    records = {}
    for source in (clips, tars):
        table = tmp_path / f"{source.name}.jsonl"
        options = ["--scenes", "--min-seconds", "0.5", "ingest.workers=1"]
        assert run([str(source), "--out", str(table), *options]) == 0
        ingest(table, tmp_path / f"of {source.name}", load(None, ["ingest.workers=1", "codec.channels=24"]))
        shards = ShardSplit.open(tmp_path / f"of {source.name}", "train")
        assert shards.manifest.rejected == {"wrong suffix": 1}
        records[source.name] = []
        for i in range(len(shards)):
            r, meta = shards.read(i, lambda text: torch.zeros(1, 1)), shards.read_meta(i)
            facts = (r.caption, r.native_size, r.grid, r.patches_LP.tolist(), meta["sha256"], meta.get("start"))
            records[source.name].append(facts)
    assert records["clips"] == records["tars"] and len(records["tars"]) == 3
    line = json.loads((tmp_path / "tars.jsonl").read_text().splitlines()[1])
    assert line == {
        "file": "tars/raw.tar", "split": "train", "member": "in/a b.mp4", "caption": "this is a b 🦊", "start": 1.25,
    }  # fmt: skip


def test_a_list_has_the_clips_of_linked_folders_and_says_what_else_there_was(tmp_path, capfd):
    (tmp_path / "clips").mkdir()
    (tmp_path / "outside").mkdir()
    odd = os.fsdecode(b"caf\xe9\x1b[31m.png")  # a control character, and a byte that is no UTF-8
    for path in (tmp_path / "clips" / odd, tmp_path / "outside" / "b.png"):
        write_image(np.full((16, 16, 3), 9, np.uint8), path)
    (tmp_path / "clips" / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "clips" / "loop").symlink_to(tmp_path / "clips")
    (tmp_path / "clips" / "c\x1b[31m.heic").write_text("x")
    run = runpy.run_path(str(TOOL))["main"]
    assert run([str(tmp_path / "clips"), "--out", str(tmp_path / "list.jsonl"), "ingest.workers=1"]) == 0
    shown = capfd.readouterr()
    assert "1 file with another suffix (1 .heic), 1 link to a folder seen before (loop)" in shown.out
    assert shown.err == "" and "\x1b" not in shown.out
    clips = find_clips(tmp_path / "list.jsonl").clips
    assert [clip.name for clip in clips] == [f"clips/{odd}", "clips/linked/b.png"]
    config = load(None, ["ingest.missing_caption=empty", "ingest.workers=1"])
    assert ingest(tmp_path / "list.jsonl", tmp_path / "out", config).rejected == {}
    assert run([str(tmp_path / "clips" / "c\x1b[31m.heic"), "--out", str(tmp_path / "list.jsonl")]) == 2
    assert "\x1b" not in capfd.readouterr().err

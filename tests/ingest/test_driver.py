"""The ingest driver: the same shards for any parts, stops and restarts; captions, sources, filters; bounded memory."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megasora.config import Config, load
from megasora.data.clip_writer import write_image, write_video
from megasora.data.shard_format import MANIFEST
from megasora.data.shard_reader import ShardSplit
from megasora.errors import MegaSoraError
from megasora.ingest import ingest
from megasora.ingest.output_folder import SPEC_FILE
from megasora.ingest.parts import Part

BLOCKS_OF_3 = "ingest.clips_per_block=3"


def settings(*overrides: str) -> Config:
    return load(None, ["codec.channels=24", "ingest.workers=1", BLOCKS_OF_3, *overrides])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def ids(folder: Path, split: str = "train") -> list[int]:
    return ShardSplit.open(folder, split).index.sample_ids.tolist()


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Eleven clips in four blocks of three: two damaged, one for validation, one with a caption that is too long."""
    folder = tmp_path_factory.mktemp("source") / "clips"
    (folder / "val").mkdir(parents=True)
    for number in range(10):
        frames = np.random.default_rng(number).integers(0, 256, (2 + number % 3, 16, 24, 3), dtype=np.uint8)
        write_video(frames, 12, folder / f"{number}.mp4")
        (folder / f"{number}.txt").write_text(f"clip {number} 🦊")
    shutil.copy(folder / "0.mp4", folder / "val" / "v.mp4")
    (folder / "val" / "v.txt").write_text("held out")
    (folder / "4.mp4").write_text("no video\n" * 100)
    (folder / "5.mp4").write_bytes(b"")
    (folder / "7.txt").write_text("word " * 20_000)  # 100 KB
    return folder


@pytest.fixture(scope="module")
def reference(clips) -> Path:
    """The clips ingested by one process without interruption."""
    ingest(clips, clips.parent / "reference", settings())
    return clips.parent / "reference"


def test_blocks_hold_their_clips_and_rejections(reference):
    manifest = json.loads((reference / MANIFEST).read_text())
    assert list(manifest["splits"]["train"]["shards"]) == [f"train-00000{b}-000.tar" for b in range(4)]
    assert list(manifest["splits"]["val"]["shards"]) == ["val-000003-000.tar"]
    assert manifest["rejected"] == {"caption too long": 1, "empty file": 1, "wrong suffix": 1}
    assert ids(reference) == [0, 1, 2, 3, 6, 8, 9] and ids(reference, "val") == [10]
    assert not list(reference.glob(".*"))


def test_three_parts_in_any_order_write_the_bytes_of_one_process(clips, reference, tmp_path, capsys):
    results = [ingest(clips, tmp_path / "parts", settings(), Part(index, 3)) for index in (2, 0, 1)]
    assert [manifest is not None for manifest in results] == [False, False, True]
    assert capsys.readouterr().out.splitlines()[:2] == [
        "part 3/3 has nothing left to do; 3 of 4 blocks are missing: run the other parts",
        "part 1/3 has nothing left to do; 1 of 4 blocks is missing: run the other parts",
    ]
    assert contents(tmp_path / "parts") == contents(reference)


def test_a_complete_ingest_that_is_repeated_decodes_and_writes_nothing(clips, reference, tmp_path, monkeypatch):
    out = shutil.copytree(reference, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    monkeypatch.setattr("megasora.ingest.driver.WorkerPool", None)  # nothing may be decoded
    assert ingest(clips, out, settings()).splits["train"]["clips"] == 7
    assert contents(out) == contents(reference)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}


def test_a_removed_block_is_written_again_with_the_same_bytes(clips, reference, tmp_path):
    out = shutil.copytree(reference, tmp_path / "out")
    (out / "blocks" / "000002.json").unlink()
    (out / "train-000002-000.tar").unlink()
    ingest(clips, out, settings())
    assert contents(out) == contents(reference)


def test_an_ingest_killed_at_any_time_resumes_to_the_same_bytes(clips, reference, tmp_path):
    """The command is killed with SIGKILL at each of several points, then runs to its end."""
    arguments = ["ingest", str(clips), "--out", str(tmp_path / "out"), "codec.channels=24", "ingest.workers=1"]
    command = [sys.executable, "-m", "megasora.cli", *arguments, BLOCKS_OF_3]
    killed = 0
    for file in ("ingest.json", ".staging/000000", "blocks/000000.json", "blocks/000002.json"):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while process.poll() is None and not (tmp_path / "out" / file).exists():
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
        complete = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "blocks").glob("*.json")}
    assert killed >= 2
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(reference)
    assert not list((tmp_path / "out").glob(".*"))
    assert all(path.stat().st_mtime_ns == made for path, made in complete.items())


LISTING, HASH = "names, sizes or captions of the clips", "[0-9a-f]{8}"
CHANGES = [
    (["ingest.max_fps=6"], {}, "ingest.max_fps: 0.0 -> 6.0"),
    (["codec.channels=25"], {}, "codec: dct-4x8x8-24-.* -> dct-4x8x8-25-"),
    (["data.patch=[1,2,1]"], {}, "data.patch: .1, 1, 1. -> .1, 2, 1."),
    (["text.max_tokens=9"], {}, "text.max_tokens: 64 -> 9"),
    (["ingest.clips_per_block=4"], {}, "ingest.clips_per_block: 3 -> 4"),
    ([], {"0.txt": "another caption"}, f"{LISTING}: {HASH} -> {HASH}"),
    ([], {"new.mp4": "x", "new.txt": "x"}, f"clips: 11 -> 12; {LISTING}: {HASH} -> {HASH}"),
]


@pytest.mark.parametrize(("overrides", "files", "words"), CHANGES)
def test_another_ingest_into_the_same_folder_is_an_error_with_the_keys_that_differ(
    overrides, files, words, clips, reference, tmp_path
):
    out, source = shutil.copytree(reference, tmp_path / "out"), shutil.copytree(clips, tmp_path / "clips")
    for name, text in files.items():
        (source / name).write_text(text)
    with pytest.raises(
        MegaSoraError, match=rf"out was made from other clips or settings \({words}.*\); .*choose another --out"
    ):
        ingest(source, out, settings(*overrides))
    assert contents(out) == contents(reference)


def test_settings_that_change_only_the_speed_may_differ(clips, reference, tmp_path):
    out = shutil.copytree(reference, tmp_path / "out")
    ingest(clips, out, settings("ingest.workers=2", "ingest.worker_memory_mib=5000", "ingest.decode_timeout_seconds=7"))
    assert contents(out) == contents(reference)


def test_a_damaged_ingest_json_is_an_error_with_its_name(clips, tmp_path):
    for text in ("{", "[]", "\udcff"):
        (tmp_path / SPEC_FILE).write_text(text, errors="surrogateescape")
        with pytest.raises(MegaSoraError, match=f"{SPEC_FILE} is damaged"):
            ingest(clips, tmp_path, settings())


@pytest.mark.parametrize("change", [{"listing": "0a"}, {"format": 1}, {}])
def test_an_ingest_json_of_another_version_is_an_error(change, clips, reference, tmp_path):
    spec = json.loads((reference / SPEC_FILE).read_text())
    (tmp_path / SPEC_FILE).write_text(json.dumps(spec | change if change else {}))
    with pytest.raises(MegaSoraError, match=f"{SPEC_FILE} was written by another version .*; choose another --out"):
        ingest(clips, tmp_path, settings())


def test_an_error_after_the_first_block_preserves_complete_blocks(clips, reference, tmp_path, monkeypatch):
    from megasora.data.shard_writer import BlockWriter

    commit = BlockWriter.commit

    def fail_in_the_third(self, *arguments):
        if self.block == 2:
            raise OSError(28, "No space left on device")
        return commit(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "commit", fail_in_the_third)
        with pytest.raises(OSError, match="No space left"):
            ingest(clips, tmp_path / "out", settings())
    assert sorted(p.name for p in (tmp_path / "out" / "blocks").iterdir()) == ["000000.json", "000001.json"]
    assert not (tmp_path / "out" / MANIFEST).exists() and not list((tmp_path / "out").glob(".*/*"))
    with pytest.raises(MegaSoraError, match=f"no {MANIFEST}"):
        ShardSplit.open(tmp_path / "out", "train")
    ingest(clips, tmp_path / "out", settings())
    assert contents(tmp_path / "out") == contents(reference)


def test_an_output_folder_that_is_not_an_ingest_is_not_changed(clips, tmp_path):
    for name in ("blocks", ".staging", ".patches"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "other").write_text("other")
    before = contents(tmp_path)
    with pytest.raises(MegaSoraError, match="is not empty"):
        ingest(clips, tmp_path, settings())
    assert contents(tmp_path) == before


def test_a_part_that_another_process_is_writing_is_an_error(clips, tmp_path):
    from megasora.data.shard_writer import LOCK_DIR
    from megasora.locks import locked

    with (
        locked(tmp_path / LOCK_DIR / "part-1-of-1", "the part"),
        pytest.raises(MegaSoraError, match=f"part 1/1 of {tmp_path} is being written by process {os.getpid()}"),
    ):
        ingest(clips, tmp_path, settings())


# ---------------------------------------------------------------- captions


class Encoder:
    """A fake encoder: features are the bytes of the caption, at most ten; records the captions of each call."""

    precomputed, fingerprint = True, "bytes as features"

    def __init__(self, overflowing: str = ""):
        """`overflowing`: a caption whose features are Inf."""
        self.calls, self.overflowing = [], overflowing

    def encode(self, captions: list[str]) -> list[torch.Tensor]:
        self.calls.append(captions)
        if long := [caption for caption in captions if len(caption) > 10]:
            raise MegaSoraError(f"{long[0]} is too long")
        values = [[float("inf")] if c == self.overflowing else list(c.encode()) or [0] for c in captions]
        return [torch.tensor(v, dtype=torch.float32)[:, None] for v in values]


@pytest.fixture
def stills(tmp_path) -> Path:
    """Seventy images for blocks of 48; 11 and 57 have captions that are too long, and 20 has none."""
    (tmp_path / "clips").mkdir()
    for number in range(70):
        write_image(np.full((8, 8, 3), number, np.uint8), tmp_path / "clips" / f"{number:02d}.png")
        caption = {11: "eleven characters", 57: "fifty-seven", 20: ""}.get(number, f"clip {number:02d}")
        (tmp_path / "clips" / f"{number:02d}.txt").write_text(caption)
    return tmp_path / "clips"


def ingest_encoded(source: Path, out: Path, encoder: Encoder, monkeypatch, part: Part | None = None):
    monkeypatch.setattr("megasora.ingest.driver.build_text_encoder", lambda config: encoder)
    return ingest(source, out, settings("ingest.clips_per_block=48", "ingest.missing_caption=skip"), part)


def test_captions_of_a_block_are_encoded_in_batches_and_stored_with_their_clips(stills, tmp_path, monkeypatch):
    encoder = Encoder()
    manifest = ingest_encoded(stills, tmp_path / "out", encoder, monkeypatch)
    assert manifest.rejected == {"caption too long": 2, "no caption": 1}
    batches = [call for call in encoder.calls if len(call) > 16]
    assert [(batch[0], batch[-1], len(batch)) for batch in batches] == [
        ("clip 00", "clip 31", 31),
        ("clip 48", "clip 69", 22),
    ]
    assert max(map(len, encoder.calls)) <= 32
    shards = ShardSplit.open(tmp_path / "out", "train")
    assert ids(tmp_path / "out") == [n for n in range(70) if n not in (11, 20, 57)]
    for i in range(len(shards)):
        record = shards.read(i, None)
        assert bytes(record.text_SE[:, 0].int().tolist()).decode() == record.caption == f"clip {record.sample_id:02d}"


def test_caption_batches_do_not_depend_on_parts_and_restarts(stills, tmp_path, monkeypatch):
    one, parts, again = Encoder(), Encoder(), Encoder()
    ingest_encoded(stills, tmp_path / "one", one, monkeypatch)
    for index in (1, 0):
        ingest_encoded(stills, tmp_path / "parts", parts, monkeypatch, Part(index, 2))
    assert contents(tmp_path / "one") == contents(tmp_path / "parts")
    assert sorted(map(tuple, one.calls + [[""]])) == sorted(map(tuple, parts.calls))
    shutil.copytree(tmp_path / "one", tmp_path / "again")
    (tmp_path / "again" / "blocks" / "000001.json").unlink()
    ingest_encoded(stills, tmp_path / "again", again, monkeypatch)
    assert contents(tmp_path / "one") == contents(tmp_path / "again")
    of_block_1 = {"fifty-seven", *(f"clip {n}" for n in range(48, 70))}
    assert again.calls == [[""], *(call for call in one.calls if of_block_1.issuperset(call))]


def test_features_that_are_not_finite_in_float16_reject_only_their_clip(stills, tmp_path, monkeypatch):
    manifest = ingest_encoded(stills, tmp_path / "out", Encoder(overflowing="clip 30"), monkeypatch)
    assert manifest.rejected == {"caption too long": 2, "features not finite": 1, "no caption": 1}
    assert ids(tmp_path / "out") == [n for n in range(70) if n not in (11, 20, 30, 57)]


def test_an_encoder_that_cannot_be_loaded_is_an_error_and_rejects_no_clip(stills, tmp_path, monkeypatch):
    def unreadable(captions):
        raise MegaSoraError("text.path=nowhere cannot be loaded")

    encoder = Encoder()
    encoder.encode = unreadable
    with pytest.raises(MegaSoraError, match="^text.path=nowhere cannot be loaded"):
        ingest_encoded(stills, tmp_path / "out", encoder, monkeypatch)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- sources, filters and memory


def test_lists_and_tars_give_the_same_records_as_files(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (24, 16, 24, 3), dtype=np.uint8)
    write_video(frames, 12, tmp_path / "a.mp4")
    table = tmp_path / "list.jsonl"
    table.write_text(
        '{"file": "a.mp4", "caption": "first", "start": 0, "end": 1}\n'
        '{"file": "a.mp4", "caption": "second", "start": 1, "end": 2, "split": "val"}\n'
    )
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(tmp_path / "a.mp4", "x/clip.mp4")
        for name, text in (("x/clip.json", b'{"caption": "whole"}'), ("y.mp4", b""), ("y.txt", b"\xff")):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    ingest(table, tmp_path / "listed", settings())
    manifest = ingest(tmp_path / "b.tar", tmp_path / "tarred", settings("ingest.record_quality=true"))
    assert manifest.rejected == {"caption not utf-8": 1}
    first, second, tarred = (
        ShardSplit.open(tmp_path / where, split)
        for where, split in (("listed", "train"), ("listed", "val"), ("tarred", "train"))
    )
    records = [shards.read(0, lambda text: torch.zeros(1, 1)) for shards in (first, second, tarred)]
    assert [(r.caption, r.sample_id, r.native_size) for r in records] == [
        ("first", 0, (16.0, 24.0, 12.0, 12.0)),
        ("second", 1, (16.0, 24.0, 12.0, 12.0)),
        ("whole", 0, (16.0, 24.0, 24.0, 12.0)),
    ]
    assert torch.equal(records[0].patches_LP[: 3 * 6], records[2].patches_LP[: 3 * 6])  # frames 0 to 8
    metas = [shards.read_meta(0) for shards in (first, second, tarred)]
    assert [(m["start"], m["end"]) for m in metas[:2]] == [(0.0, 1.0), (1.0, 2.0)]
    assert metas[2]["source"] == "b.tar/x/clip.mp4" and len({m["sha256"] for m in metas}) == 1
    assert metas[2]["quality"]["brightness"] == pytest.approx(127, abs=8) and "quality" not in metas[0]


def test_the_summary_shows_accepted_and_rejected_clips_per_filter(tmp_path, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, level in (("black", 0), ("grey", 128)):
        write_image(np.full((32, 32, 3), level, np.uint8), folder / f"{name}.png")
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], (32, 1, 3))
    write_image(ramp, folder / "ramp.png")
    write_video(np.stack([ramp] * 6), 12, folder / "still.mp4")
    write_video(np.stack([np.roll(ramp, 4 * i, 1) for i in range(6)]), 12, folder / "moving.mp4")
    write_video(np.stack([ramp, ramp]), 12, folder / "short.mp4")
    (folder / "broken.mp4").write_text("text")
    filters = ["ingest.min_seconds=0.4", "ingest.min_motion=1", "ingest.min_contrast=5", "ingest.clips_per_block=4"]
    manifest = ingest(folder, tmp_path / "out", settings("ingest.missing_caption=empty", *filters))
    assert manifest.rejected == {"blank": 2, "static": 1, "too few seconds": 1, "wrong suffix": 1}
    out = ShardSplit.open(tmp_path / "out", "train")
    assert [out.read_meta(i)["source"] for i in range(len(out))] == ["moving.mp4", "ramp.png"]
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["decode", "7", "6", "1", "wrong suffix: 1"] in rows
    assert ["duration", "6", "5", "1", "too few seconds: 1"] in rows
    assert any(row[:4] == ["motion and contrast", "5", "2", "3"] for row in rows)


def test_memory_does_not_grow_with_the_length_of_a_clip(tmp_path):
    """80 more frames of 1080p are 480 MiB decoded; parent and worker together use less than 150 MiB more."""
    still = np.random.default_rng(0).integers(0, 256, (68, 120, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)[:1080]

    def peak_of(frames: int) -> int:
        folder = tmp_path / str(frames)
        (folder / "clips").mkdir(parents=True)
        write_video(np.broadcast_to(still, (frames, 1080, 1920, 3)), 24, folder / "clips" / "a.mp4", crf="35")
        command = [sys.executable, "-m", "megasora.cli", "ingest", str(folder / "clips"), "--out", str(folder / "out")]
        settings = ["ingest.missing_caption=empty", "ingest.workers=1"]
        done, peak = subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL), 0
        while done.poll() is None:
            peak = max(peak, resident(done.pid) + sum(map(resident, children(done.pid))))
            time.sleep(0.02)
        assert done.returncode == 0 and ids(folder / "out") == [0]
        return peak

    short, long = peak_of(20), peak_of(100)
    assert 100 < long < short + 150, f"{short} MiB, then {long} MiB"


def resident(pid: int) -> int:
    """Resident memory of a process, MiB; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def children(pid: int) -> list[int]:
    """Child processes; not those between fork and exec, which share the memory of their parent."""
    try:
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return [int(child) for child in pids if Path(f"/proc/{child}/cmdline").read_bytes() != command]
    except (FileNotFoundError, ProcessLookupError):
        return []

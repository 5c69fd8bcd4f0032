"""Shards give back what was put in, say at once what is damaged or missing, and are plain WebDataset tars."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megasora.data.pack import Record
from megasora.data.shards import MANIFEST, Manifest, Shards, ShardWriter, check_fingerprints, read_manifest
from megasora.errors import MegaSoraError

CAPTIONS = [
    "a red circle moves right",
    "",
    "赤い丸が右に動く",
    "красный круг",
    "دائرة حمراء",
    "👩‍🚀 'quotes' \"both\" \\ and\u2028a line separator",
]
GRIDS = [(1, 2, 3), (3, 2, 2), (2, 1, 1), (1, 1, 1), (4, 3, 1), (1, 2, 2)]
PATCH_DIM, TEXT_DIM = 5, 4


def records() -> list[Record]:
    g = torch.Generator().manual_seed(0)
    made = []
    for i, (caption, grid) in enumerate(zip(CAPTIONS, GRIDS, strict=True)):
        t, h, w = grid
        patches = torch.randn(t * h * w, PATCH_DIM, generator=g)
        native = (8.0 * h, 8.0 * w, float(1 + 4 * (t - 1)), 30_000 / 1001 if t > 1 else 0.0)
        made.append(Record(3 * i, patches, grid, torch.randn(1 + i % 3, TEXT_DIM, generator=g), native, caption))
    return made


def write(folder: Path, made: list[Record], max_bytes: int = 1 << 20, features: bool = False, split="train") -> Path:
    """Records to shards with their manifest, as ingest writes them."""
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, split, max_bytes)
    for record in made:
        writer.add(record, f"clip-{record.sample_id}.mp4", record.text_SE if features else None)
    writer.close()
    splits = {split: {**writer.counts, "shards": writer.shards}}
    text_dim = TEXT_DIM if features else 0
    manifest = Manifest("codec-a", "text-a", [1, 1, 1], PATCH_DIM, splits, {}, text_dim)
    (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest)))
    return folder


def count_letters(caption: str) -> torch.Tensor:
    return torch.tensor([[len(caption)]])


def test_records_come_back_with_patches_in_half_precision_and_all_else_exact(tmp_path):
    made = records()
    shards = Shards.open(write(tmp_path / "shards", made), "train")
    assert len(shards) == len(made)
    for i, record in enumerate(made):
        read = shards.read(i, count_letters)
        assert torch.equal(read.patches_LP, record.patches_LP.half())
        assert (read.sample_id, read.grid, read.native) == (record.sample_id, record.grid, record.native)
        assert read.caption == record.caption
        assert read.text_SE.tolist() == [[len(record.caption)]]
        assert shards.meta(i)["source"] == f"clip-{record.sample_id}.mp4"
        assert shards.meta(i)["fps"] == record.native[3]


def test_stored_text_features_come_back_in_half_precision(tmp_path):
    made = records()
    shards = Shards.open(write(tmp_path / "shards", made, features=True), "train")
    for i, record in enumerate(made):
        read = shards.read(i, None)
        assert torch.equal(read.text_SE, record.text_SE.half().float())
        assert torch.equal(read.patches_LP, record.patches_LP.half())


def test_counts_are_those_of_the_records(tmp_path):
    manifest = read_manifest(write(tmp_path / "shards", records()))
    counts = dict(manifest.splits["train"])
    assert counts.pop("shards") == ["train-000000.tar"]
    assert counts == {
        "clips": 6,
        "images": 3,
        "frames": 1 + 9 + 5 + 1 + 13 + 1,
        "tokens": 6 + 12 + 2 + 1 + 12 + 4,
        "longest": 12,
    }


def test_a_tar_is_closed_when_it_reaches_its_size_and_reading_does_not_notice(tmp_path):
    made = records()
    one = Shards.open(write(tmp_path / "one", made), "train")
    many = Shards.open(write(tmp_path / "many", made, max_bytes=6000), "train")
    assert 1 < len(many.names) < len(made)
    assert all((tmp_path / "many" / name).stat().st_size >= 6000 for name in many.names[:-1])
    assert many.tokens().tolist() == one.tokens().tolist() == [6, 12, 2, 1, 12, 4]
    for i in range(len(made)):
        a, b = one.read(i, count_letters), many.read(i, count_letters)
        assert torch.equal(a.patches_LP, b.patches_LP) and (a.sample_id, a.caption) == (b.sample_id, b.caption)


def test_the_same_records_make_the_same_bytes(tmp_path):
    a, b = (write(tmp_path / name, records(), max_bytes=6000) for name in "ab")
    files = sorted(p.name for p in a.iterdir())
    assert files == sorted(p.name for p in b.iterdir())
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in files)


def test_webdataset_reads_the_same_tar(tmp_path):
    import webdataset

    made = records()
    folder = write(tmp_path / "shards", made)
    samples = list(webdataset.WebDataset(str(folder / "train-000000.tar"), shardshuffle=False))
    assert [s["caption.txt"].decode() for s in samples] == [r.caption for r in made]
    for sample, record in zip(samples, made, strict=True):
        meta = json.loads(sample["meta.json"])
        patches = np.frombuffer(sample["patches.f16"], "<f2").reshape(meta["shape"])
        assert np.array_equal(patches, record.patches_LP.half().numpy())
        assert meta["sample_id"] == int(sample["__key__"]) == record.sample_id


@pytest.mark.parametrize("member", ["patches.f16", "caption.txt", "meta.json", "text.f16"])
def test_one_flipped_bit_is_refused_with_the_tar_the_sample_and_the_place(member, tmp_path):
    folder = write(tmp_path / "shards", records(), features=True)
    number = 2
    offset, size, _ = Shards.open(folder, "train").entries[number].members[member]
    with open(folder / "train-000000.tar", "r+b") as tar:
        byte = os.pread(tar.fileno(), 1, offset + size - 1)[0]
        os.pwrite(tar.fileno(), bytes([byte ^ 1]), offset + size - 1)
    shards = Shards.open(folder, "train")
    with pytest.raises(MegaSoraError) as refusal:
        shards.read(number, None)
        shards.meta(number)
    for word in ("train-000000.tar", member, "sample 6", f"byte {offset}", "damaged", "ingest again"):
        assert word in str(refusal.value)
    shards.read(number + 1, None)  # its neighbours are whole


def test_a_tar_that_was_cut_is_refused_with_how_much_is_left(tmp_path):
    folder = write(tmp_path / "shards", records())
    offset, size, _ = Shards.open(folder, "train").entries[5].members["patches.f16"]
    os.truncate(folder / "train-000000.tar", offset + 7)
    shards = Shards.open(folder, "train")
    shards.read(0, count_letters)
    with pytest.raises(MegaSoraError, match=f"sample 15 .*damaged .7 of {size} bytes"):
        shards.read(5, count_letters)


@pytest.mark.parametrize("lost", ["train-000000.tar", "train-000000.index.jsonl"])
def test_a_missing_file_is_named_with_who_asked_for_it(lost, tmp_path):
    folder = write(tmp_path / "shards", records())
    (folder / lost).unlink()
    with pytest.raises(MegaSoraError, match=f"{lost} is missing, .*{MANIFEST} names it; ingest again"):
        Shards.open(folder, "train")


def test_an_index_that_lost_a_line_is_refused_with_both_counts(tmp_path):
    folder = write(tmp_path / "shards", records())
    index = folder / "train-000000.index.jsonl"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(MegaSoraError, match="hold 5 clips, .*says 6"):
        Shards.open(folder, "train")


def test_an_index_whose_grid_was_changed_is_refused_with_both_counts(tmp_path):
    folder = write(tmp_path / "shards", records())
    index = folder / "train-000000.index.jsonl"
    index.write_text(index.read_text().replace("[1, 2, 3]", "[1, 2, 4]"))
    with pytest.raises(MegaSoraError, match="hold 39 tokens, .*says 37"):
        Shards.open(folder, "train")


@pytest.mark.parametrize(
    "text", ["{", "[]\n", '{"sample_id": 1}\n', "\x00\x00\n", '{"sample_id":1,"grid":[1],"members":{}}\n']
)
def test_an_unreadable_index_is_refused_with_file_and_line(text, tmp_path):
    folder = write(tmp_path / "shards", records())
    index = folder / "train-000000.index.jsonl"
    index.write_text(index.read_text().splitlines()[0] + "\n" + text)
    with pytest.raises(MegaSoraError, match="train-000000.index.jsonl:2 is damaged: .*ingest again"):
        Shards.open(folder, "train")


def test_a_folder_without_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(MegaSoraError, match=f"no {MANIFEST} in {tmp_path}; .*megasora ingest"):
        Shards.open(tmp_path, "train")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 2}', "has format 2, this version reads 1"),
        ('{"codec": "a"}', "has format None, this version reads 1"),
        ('{"format": 1, "codec": "a"}', "is damaged"),
        ("{", "is damaged"),
        ("[1]", "is damaged"),
        ("\udcff", "is damaged"),
    ],
)
def test_another_format_and_a_damaged_manifest_are_refused(text, words, tmp_path):
    (tmp_path / MANIFEST).write_text(text, errors="surrogateescape")
    with pytest.raises(MegaSoraError, match=f"{MANIFEST} {words}.*ingest again"):
        read_manifest(tmp_path)


def test_a_split_that_was_never_written_is_empty(tmp_path):
    assert len(Shards.open(write(tmp_path / "shards", records()), "val")) == 0


@pytest.mark.parametrize(
    ("key", "theirs", "ours"),
    [("codec", "codec-a", "codec-b"), ("text", "text-a", "text-b"), ("data.patch", "[1, 1, 1]", "[1, 2, 2]")],
)
def test_shards_made_for_another_run_are_refused_with_both_values(key, theirs, ours, tmp_path):
    manifest = read_manifest(write(tmp_path / "shards", records()))
    run = {"codec": "codec-a", "text": "text-a", "data.patch": [1, 1, 1]}
    check_fingerprints(manifest, tmp_path, *run.values())
    run[key] = json.loads(ours) if ours.startswith("[") else ours
    with pytest.raises(MegaSoraError) as refusal:
        check_fingerprints(manifest, tmp_path, *run.values())
    assert f"made with {key} {theirs}, this run has {ours}; ingest again" in str(refusal.value)

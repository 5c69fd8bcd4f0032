"""Whatever a clip cannot be read for is damage: an error with tar, byte and sample, or the clip alone is left out."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rewrite_shards import rewrite_clip

from megasora.config import DataConfig
from megasora.data.folder import LocalFolder
from megasora.data.loader import PLACEHOLDER_ID, PackLoader
from megasora.data.manifest_writer import write_manifest
from megasora.data.mixture import open_mixture
from megasora.data.pack import Record
from megasora.data.shard_damage import first_non_finite
from megasora.data.shard_reader import ShardSplit
from megasora.data.shard_writer import BlockWriter
from megasora.data.tar import DamagedTar
from megasora.errors import DataError

CLIPS, FAULTY, TEXT_DIM = 12, 5, 3
CONFIG = DataConfig(tokens_per_pack=32, packs_per_step=2, packing_window=20, reader_threads=2)


@pytest.fixture
def folder(tmp_path):
    """Three tars of four clips with stored text features."""
    made = tmp_path / "shards"
    for block in range(3):
        with BlockWriter(made, block, 1 << 20) as writer:
            for i in range(4 * block, 4 * block + 4):
                patches, native = torch.full((6, 2), float(i)), (8.0, 48.0, 1.0, 0.0)
                record = Record(i, patches, (1, 1, 6), torch.ones(2, TEXT_DIM), native, f"clip {i}")
                writer.add("train", record, {"source": f"{i}.png", "sha256": "0" * 64}, record.text_SE)
            writer.commit({}, {})
    write_manifest(made, "codec", "text", [1, 1, 1], TEXT_DIM, {"name": "none"})
    return made


def rewrite(folder: Path, change) -> None:
    """As `rewrite_clip`, the faulty clip."""
    rewrite_clip(folder, "train", FAULTY, change)


def put(member, at, content):
    def change(data, row):
        offset = int(row[member]["offset"]) + at
        data[offset : offset + len(content)] = content

    return change


def span(member, **values):
    """Sets the byte range of a file in the index; `add_offset`, `add_size`: relative to what it is."""

    def change(data, row):
        for key, value in values.items():
            name = key.removeprefix("add_")
            row[member][name] = int(row[member][name]) + value if key.startswith("add_") else value

    return change


def start_of(row, member="record", at=0):
    return int(row[member]["offset"]) + at


NAN, MINUS_INF = np.float16(np.nan).tobytes(), np.float16(-np.inf).tobytes()
FAULTS = {  # name: (change, member and byte that the error names, its words)
    "caption that is no UTF-8": (put("caption", 2, b"\xff"), ("caption", 2), r"caption.txt \(not UTF-8 text\)"),
    "text features of half a token": (span("text", add_size=-2), ("text", 0), r"text.f16 \(10 bytes, no text tokens"),
    "no text features": (span("text", size=0), ("text", 0), r"text.f16 \(0 bytes, no text tokens"),
    "text features outside": (span("text", offset=8), ("record", 0), "the index says that sample 5 has"),
    "caption of exabytes": (span("caption", size=1 << 62), ("record", 0), "the index says that sample 5 has"),
    "caption outside": (span("caption", offset=0), ("record", 0), "the index says that sample 5 has"),
    "record of terabytes": (span("record", size=1 << 42), ("record", 0), "the index says that sample 5 has"),
    "patches of exabytes": (span("patches", size=1 << 62), ("record", 0), "the index says that sample 5 has"),
    "patches far away": (span("patches", offset=1 << 62), ("record", 0), "the index says that sample 5 has"),
}
NON_FINITE = {
    "NaN in the patches": (put("patches", 4, NAN), ("patches", 4), "a number, infinite or NaN, in the patches"),
    "infinite patches": (put("patches", 6, MINUS_INF * 3), ("patches", 6), "a number, infinite or NaN, in the patches"),
    "NaN in the text": (put("text", 8, NAN), ("text", 8), "a number, infinite or NaN, in the text features"),
}


def read_all(folder: Path, fraction: float) -> tuple[set[int], dict[int, DamagedTar]]:
    """The sample ids of an epoch, and the errors of the clips that were left out."""
    config = dataclasses.replace(CONFIG, shards=str(folder), max_damaged_fraction=fraction)
    loader = PackLoader(open_mixture(config, "train"), config, 7, None, 30)
    steps = list(itertools.takewhile(lambda step: step.next_cursor.epoch < 2, loader.steps()))
    seen = {i for step in steps for pack in step.packs for i in pack.sample_ids_G.tolist()} - {PLACEHOLDER_ID}
    return seen, {error.sample_id: error for step in steps for error in step.damaged}


def check_left_out(folder: Path, clips: set[int], words: str) -> dict[int, DamagedTar]:
    """Asserts that exactly `clips` are left out in tolerant mode, with errors that name them."""
    seen, errors = read_all(folder, 0.5)
    assert seen == set(range(CLIPS)) - clips and set(errors) == clips
    assert all(re.search(words, str(error)) for error in errors.values()), errors
    return errors


@pytest.mark.parametrize("fault", [*FAULTS, *NON_FINITE])
def test_the_faulty_clip_alone_is_left_out_or_ends_the_run_with_its_name(fault, folder):
    change, (member, at), words = (FAULTS | NON_FINITE)[fault]
    row = ShardSplit.open(folder, "train").index.rows[FAULTY].copy()
    offset = start_of(row, member, at)
    rewrite(folder, change)
    error = check_left_out(folder, {FAULTY}, words)[FAULTY]
    assert (error.path, error.offset) == (f"{folder}/train-000001-000.tar", offset)
    assert "sample 5" in str(error) and "ingest again" in str(error) and error.exit_code == 3
    if fault in FAULTS:
        with pytest.raises(DamagedTar, match=words):
            read_all(folder, 0.0)
    else:  # the loss shows it: its step is skipped, see tests/runs/test_non_finite.py
        assert read_all(folder, 0.0) == (set(range(CLIPS)), {})


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_clip_that_the_system_cannot_read_is_damage(number, folder, monkeypatch):
    read_into, opened = LocalFolder.read_into, ShardSplit.open(folder, "train")
    at = opened.shard_name(FAULTY), start_of(opened.index.rows[FAULTY])

    def failing(self, name, offset, buffers):
        if (name, offset) == at:
            raise OSError(number, os.strerror(number))
        return read_into(self, name, offset, buffers)

    monkeypatch.setattr(LocalFolder, "read_into", failing)
    error = check_left_out(folder, {FAULTY}, f"it cannot be read: {os.strerror(number)}; restore it")[FAULTY]
    assert error.offset == at[1]
    with pytest.raises(DamagedTar, match=os.strerror(number)):
        read_all(folder, 0.0)


def test_a_process_without_free_descriptors_is_no_damage(folder, monkeypatch):
    def failing(self, name, offset, buffers):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(LocalFolder, "read_into", failing)
    with pytest.raises(OSError, match="Too many open files"):
        read_all(folder, 0.9)


@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling link"])
def test_what_is_in_place_of_a_tar_and_is_no_file_is_damage_of_its_clips(kind, folder):
    tar = folder / "train-000001-000.tar"
    tar.unlink()
    {"folder": tar.mkdir, "fifo": lambda: os.mkfifo(tar), "dangling link": lambda: tar.symlink_to("nowhere")}[kind]()
    check_left_out(folder, {4, 5, 6, 7}, "cannot be read: not a regular file|the file is missing")
    with pytest.raises(DataError, match="train-000001-000.tar: byte 0: "):
        read_all(folder, 0.0)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 60])
def test_meta_json_that_is_no_object_is_damage(content, folder):
    def change(data, row):
        offset, size, _ = row["meta"].item()
        data[offset : offset + size] = content.ljust(size)

    rewrite(folder, change)
    with pytest.raises(DamagedTar, match="meta.json .* of sample 5 is damaged"):
        ShardSplit.open(folder, "train").read_meta(FAULTY)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_of_the_65536_numbers_is_finite_as_in_torch(dtype):
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    finite = torch.isfinite(numbers.view(dtype))
    assert first_non_finite(numbers[finite].numpy().data.cast("B"), dtype) is None
    for i in torch.nonzero(~finite).view(-1).tolist()[::97]:
        data = torch.cat([numbers[finite][:11], numbers[i : i + 1], numbers[finite][:5]]).numpy().data.cast("B")
        assert first_non_finite(data, dtype) == 22
    assert first_non_finite(memoryview(b""), dtype) is None


def test_a_stale_handle_is_opened_again_once(folder, monkeypatch):
    opened, failed = LocalFolder(folder), []
    preadv = os.preadv
    tar = "train-000001-000.tar"
    first = opened.open_file(tar).file.fileno()

    def stale(handle, *arguments):
        if handle == first and not failed:
            failed.append(handle)
            raise OSError(errno.ESTALE, "Stale file handle")
        return preadv(handle, *arguments)

    monkeypatch.setattr(os, "preadv", stale)
    data = bytearray(512)
    assert opened.read_into(tar, 0, [memoryview(data)]) == 512 and failed
    assert bytes(data) == (folder / tar).read_bytes()[:512]

"""`verify` reports patches that are not finite, by tar, clip, byte and count, although every checksum is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megasora.data.folder import open_folder
from megasora.data.manifest_writer import write_manifest
from megasora.data.pack import Record
from megasora.data.shard_reader import ShardSplit
from megasora.data.shard_writer import BlockWriter, PatchFile
from megasora.data.verify import verify

LENGTH, WIDTH = 6, 4
NAN = {"f16": (0x7C01, 0xFE00, 0x7FFF), "bf16": (0x7F81, 0xFFC0, 0x7FFF)}
INF = {"f16": (0x7C00, 0xFC00), "bf16": (0x7F80, 0xFF80)}
LARGEST = {"f16": (0x7BFF, 0xFBFF), "bf16": (0x7F7F, 0xFF7F)}


def write(folder: Path, clips: list[np.ndarray], dtype: str) -> Path:
    """Shards of clips of these bits, uint16 [LENGTH * WIDTH], written without the check for finite values."""
    folder.mkdir()
    with BlockWriter(folder, 0, 1 << 20, dtype) as writer:
        for number, bits in enumerate(clips):
            bits.astype("<u2").tofile(folder.parent / "raw")
            raw = PatchFile(folder.parent / "raw", (LENGTH, WIDTH))
            record = Record(number, raw, (1, 2, 3), torch.zeros(1, 1), (16.0, 24.0, 1.0, 0.0), f"clip {number}")
            writer.add("train", record, {"source": f"{number}.png", "sha256": "0" * 64})
        writer.commit({}, {})
    write_manifest(folder, "codec", "text", [1, 1, 1], 1, {})
    return folder


@pytest.mark.parametrize("chunk", [1 << 20, 512, 518])  # 518: chunks end within the patches
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_nan_and_inf_in_patches_are_counted_with_clip_and_offset(dtype, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("megasora.data.verify.CHUNK_BYTES", chunk)
    clips = [np.resize(np.array(LARGEST[dtype]), LENGTH * WIDTH) for _ in range(3)]
    clips[1][[5, 9, 22]] = NAN[dtype]
    clips[1][[7, 23]] = INF[dtype]
    clips[2][0] = INF[dtype][1]
    folder = write(tmp_path / "shards", clips, dtype)
    found = list(verify(open_folder(folder)))
    starts = [e.members[f"patches.{dtype}"][0] for e in ShardSplit.open(folder, "train").index]
    assert [(f.file, f.offset, f.sample_id) for f in found] == [
        ("train-000000-000.tar", starts[1] + 10, 1),
        ("train-000000-000.tar", starts[2], 2),
    ]
    assert "sample 1: its patches have 3 NaN and 2 Inf; leave its clip out" in found[0].problem
    assert "sample 2: its patches have 0 NaN and 1 Inf" in found[1].problem


def test_the_largest_finite_values_are_no_fault(tmp_path):
    folder = write(tmp_path / "shards", [np.resize(np.array(LARGEST["f16"]), LENGTH * WIDTH)], "f16")
    assert list(verify(open_folder(folder))) == []


def test_text_whose_bytes_would_be_nan_is_no_fault(tmp_path):
    """`||` is 0x7C7C."""
    folder = tmp_path / "shards"
    with BlockWriter(folder, 0, 1 << 20) as writer:
        record = Record(0, torch.zeros(6, 4), (1, 2, 3), torch.zeros(1, 1), (16.0, 24.0, 1.0, 0.0), "|" * 2000)
        writer.add("train", record, {"source": "||||.png", "sha256": "0" * 64})
        writer.commit({}, {})
    write_manifest(folder, "codec", "text", [1, 1, 1], 1, {})
    assert list(verify(open_folder(folder))) == []


def test_a_damaged_record_with_inf_is_reported_as_damaged_only(tmp_path):
    clips = [np.full(LENGTH * WIDTH, INF["f16"][0])]
    folder = write(tmp_path / "shards", clips, "f16")
    offset = ShardSplit.open(folder, "train").index[0].members["patches.f16"][0]
    tar = folder / "train-000000-000.tar"
    data = bytearray(tar.read_bytes())
    data[offset] ^= 1
    tar.write_bytes(data)
    (fault,) = verify(open_folder(folder))
    assert "patches.f16" in fault.problem and "is damaged" in fault.problem

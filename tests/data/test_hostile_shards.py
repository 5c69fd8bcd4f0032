"""Values that no ingest writes, in dataset.json, an index, a block or ingest.json: one line of error, soon, no harm."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megasora.config import load
from megasora.data.folder import open_folder
from megasora.data.manifest_writer import read_block, write_manifest
from megasora.data.pack import Record
from megasora.data.shard_format import INDEX_DTYPE, MANIFEST, index_bytes
from megasora.data.shard_reader import ShardSplit
from megasora.data.shard_writer import BlockWriter
from megasora.data.verify import verify
from megasora.errors import MegaSoraError, describe
from megasora.ingest.output_folder import SPEC_FILE, claim_output
from megasora.observe.inspect_shards import describe_shards, verify_shards

TAR, INDEX_FILE = "train-000000-000.tar", "train-000000-000.index.npy"
DEEP, LONG = "[" * 10_000 + "]" * 10_000, "1" * 5000
U64 = (1 << 64) - 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "shards"
    with BlockWriter(folder, 0, 1 << 20) as writer:
        for i in range(3):
            record = Record(i, torch.randn(4, 8), (1, 2, 2), torch.zeros(0), (16.0, 16.0, 1.0, 0.0), f"clip {i}")
            writer.add("train", record, {"source": f"{i}.png", "sha256": "0" * 64})
        writer.commit({}, {})
    write_manifest(folder, "noise", "bytes-16", [1, 1, 1], 1, {})
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "shards")


def encode(caption: str) -> torch.Tensor:
    return torch.zeros(1, 1)


def read_all(folder: Path) -> None:
    """Everything that reads shards, up to the first error."""
    shards = ShardSplit.open(folder, "train")
    for i in range(len(shards)):
        shards.read(i, encode)
        shards.read_meta(i)
    describe_shards(folder, tokens_per_pack=16)


def assert_one_line(read: Callable[[], object], name: str) -> None:
    with pytest.raises((MegaSoraError, OSError)) as caught:
        read()
    text = describe(caught.value)
    assert name in text and "\n" not in text and len(text) < 500, text


def set_values(folder: Path, *keys: str, value: object) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    place = values
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / MANIFEST).write_text(json.dumps(values))


WRONG = [-1, 1 << 63, True, None, [[]], float("nan"), "\x1b[31m\n" * 1000]
COUNTS = [
    ("patch_dim",), ("text_dim",), ("rejected", "a reason"), ("splits", "train", "clips"),
    ("splits", "train", "tokens"), ("splits", "train", "max_tokens"), ("splits", "train", "shards", TAR, "bytes"),
    ("splits", "train", "shards", TAR, "index_crc32"), ("splits", "train", "shards", TAR, "clips"),
]  # fmt: skip


@pytest.mark.parametrize("keys", COUNTS, ids=".".join)
@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_a_count_of_the_manifest_that_is_no_count_is_an_error(keys, value, folder):
    set_values(folder, *keys, value=value)
    assert_one_line(lambda: read_all(folder), MANIFEST)
    assert_one_line(lambda: list(verify(open_folder(folder))), MANIFEST)


SHAPES = [("patch",), ("splits",), ("splits", "train"), ("splits", "train", "shards"), ("codec_fingerprint",),
          ("codec_settings",), ("dtype",), ("format",), ("splits", "train", "token_histogram")]  # fmt: skip


@pytest.mark.parametrize("keys", SHAPES, ids=".".join)
@pytest.mark.parametrize(
    "value", [3, None, "\x1b[31m" * 1000, [None], [[[]]], {"\x1b[31m": {"\n": []}}], ids=lambda value: repr(value)[:12]
)
def test_a_manifest_of_another_shape_is_an_error(keys, value, folder):
    if (keys[0], type(value)) in (("codec_fingerprint", str), ("codec_settings", dict)):
        pytest.skip("a value of this type")
    set_values(folder, *keys, value=value)
    assert_one_line(lambda: read_all(folder), MANIFEST)


@pytest.mark.parametrize("text", [DEEP, f'{{"format": {DEEP}}}', f'{{"format": 2, "patch_dim": {LONG}}}'], ids=len)
def test_deep_json_and_long_integers_are_errors(text, folder, tmp_path):
    (folder / MANIFEST).write_text(text)
    assert_one_line(lambda: read_all(folder), MANIFEST)
    (folder / "blocks" / "000000.json").write_text(text)
    assert_one_line(lambda: read_block(folder, 0), "000000.json")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SPEC_FILE).write_text(text)
    assert_one_line(lambda: claim_output(tmp_path / "out", {"format": 2}), SPEC_FILE)


def forge(folder: Path, field: str, value: object) -> None:
    """Sets a field of the second clip in the index, and the checksum of the index in the manifest."""
    rows = np.load(folder / INDEX_FILE).copy()
    rows[field][1] = value
    write_index(folder, index_bytes(rows))


def write_index(folder: Path, data: bytes) -> None:
    (folder / INDEX_FILE).write_bytes(data)
    set_values(folder, "splits", "train", "shards", TAR, "index_crc32", value=zlib.crc32(data))


ROWS = [
    ("sample_id", -5), ("sample_id", 1 << 41), ("grid", (-1, -2, 2)), ("grid", (0, 2, 2)),
    ("grid", (2**31 - 1, 2**31 - 1, 2**31 - 1)),
    ("native_size", (np.nan, 16, 1, 0)), ("native_size", (16, np.inf, 1, 0)),
    ("native_size", (16, 16, -1, 0)), ("native_size", (16, 16, 1e300, 0)), ("record", (U64, U64, 0)),
    ("record", (0, U64, 0)), ("record", (1 << 62, 1 << 62, 0)), ("patches", (U64 - 5, 64, 0)), ("patches", (1, U64, 0)),
    ("caption", (U64, 1, 0)), ("meta", (1 << 63, 5, 0)), ("meta", (700, 1 << 60, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), ROWS, ids=lambda value: str(value)[:40])
def test_a_value_of_an_index_that_no_ingest_writes_is_an_error_and_a_fault(field, value, folder, capsys):
    forge(folder, field, value)
    assert_one_line(lambda: read_all(folder), "train-")
    assert verify_shards(folder) >= 1
    assert len(capsys.readouterr().out.splitlines()) < 12


def test_an_index_of_another_dtype_is_an_error(folder):
    for rows in (np.zeros(3), np.zeros(3, [("sample_id", "<i4")]), np.zeros(3, INDEX_DTYPE.newbyteorder(">"))):
        write_index(folder, index_bytes(rows))
        assert_one_line(lambda: read_all(folder), INDEX_FILE)
    write_index(folder, index_bytes(np.zeros(2, INDEX_DTYPE))[:-1])
    assert_one_line(lambda: read_all(folder), INDEX_FILE)


@pytest.mark.parametrize("name", [MANIFEST, INDEX_FILE, TAR])
def test_a_fifo_in_place_of_a_file_is_an_error_and_is_not_waited_for(name, folder):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert_one_line(lambda: read_all(folder), name)
    if name == TAR:
        shards = ShardSplit.open(folder, "train", strict=False)
        assert_one_line(lambda: shards.read(0, encode), name)
        assert [fault.file for fault in verify(open_folder(folder))] == [TAR]


def test_an_ingest_into_a_folder_with_a_hostile_ingest_json_is_an_error(tmp_path):
    os.mkfifo(tmp_path / SPEC_FILE)
    from megasora.ingest import ingest

    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.png").write_bytes(b"x")
    config = load(None, ["ingest.missing_caption=empty"])
    assert_one_line(lambda: ingest(tmp_path / "clips", tmp_path, config), SPEC_FILE)

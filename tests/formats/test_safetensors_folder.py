"""Weights in parts: every tensor in one file, files of bounded size, a folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megasora.errors import MegaSoraError
from megasora.formats.safetensors_folder import new_folder, split_parts, write_parts

TENSORS = {f"t{i}": torch.arange(float(size)).reshape(-1, 1) - 3 for i, size in enumerate((5, 1, 40, 2, 3, 10, 10, 1))}
SHAPES = {name: value.shape for name, value in TENSORS.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [1, 23, 24, 80, 160, 200, 10**6])
def test_every_tensor_is_in_the_file_that_the_index_names_and_no_file_is_too_large(shard_bytes, dtype, tmp_path):
    with new_folder(tmp_path / "out") as folder:
        write_parts(folder, "model", SHAPES, TENSORS.__getitem__, dtype, shard_bytes, {"a": "b"})
    files = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    found = {name: (file, value) for file, tensors in files.items() for name, value in tensors.items()}
    assert sorted(found) == sorted(name for tensors in files.values() for name in tensors) == sorted(TENSORS)
    assert all(torch.equal(found[name][1], value.to(dtype)) for name, value in TENSORS.items())
    for tensors in files.values():
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= shard_bytes
    index = tmp_path / "out" / "model.safetensors.index.json"
    if len(files) == 1:
        assert list(files) == ["model.safetensors"] and not index.exists()
        return
    total = sum(value.numel() for value in TENSORS.values()) * dtype.itemsize
    weight_map = {name: file for name, (file, _) in found.items()}
    assert json.loads(index.read_text()) == {"metadata": {"total_size": total}, "weight_map": weight_map}
    assert sorted(files) == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]


def test_parts_are_as_few_as_consecutive_tensors_allow():
    parts = split_parts(SHAPES, 4, 80)
    assert [list(part) for part in parts] == [["t0", "t1"], ["t2"], ["t3", "t4", "t5"], ["t6", "t7"]]


def test_tensors_that_cannot_be_rounded_to_the_dtype_are_named(tmp_path):
    for value, dtype, words in (
        (65520.0, torch.float16, "t2 has weights up to 6.55e.04, too large for F16, which ends at 65504; use"),
        (float("nan"), torch.float32, "t2 has weights that are NaN or infinite"),
        (float("-inf"), torch.bfloat16, "t2 has weights that are NaN or infinite"),
    ):
        tensors = TENSORS | {"t2": TENSORS["t2"].clone()}
        tensors["t2"][7] = value
        with pytest.raises(MegaSoraError, match=words), new_folder(tmp_path / "out") as folder:
            write_parts(folder, "model", SHAPES, tensors.__getitem__, dtype)
        assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
    found = os.statvfs(tmp_path)
    fields = (found.f_bsize, 100, 5, 2, 2, *tuple(found)[5:])  # two blocks of 100 bytes are free
    monkeypatch.setattr(os, "statvfs", lambda folder: os.statvfs_result(fields))
    with (
        pytest.raises(OSError, match="No space left on device: a folder of 8 tensors needs"),
        new_folder(tmp_path / "out") as folder,
    ):
        write_parts(folder, "model", SHAPES, lambda name: pytest.fail("was read"))
    assert not list(tmp_path.iterdir())
    tensors = dict(list(SHAPES.items())[3:5])
    with new_folder(tmp_path / "out") as folder:
        write_parts(folder, "model", tensors, TENSORS.__getitem__)


def test_a_folder_is_new_and_what_was_left_of_a_killed_export_is_replaced(tmp_path):
    out = tmp_path / "out"
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "old").touch()
    with new_folder(out) as folder:
        (folder / "a").touch()
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["a"] and list(tmp_path.iterdir()) == [out]
    with pytest.raises(MegaSoraError, match="out exists; remove it"), new_folder(out):
        pass
    assert [path.name for path in out.iterdir()] == ["a"]


def test_an_error_names_the_file_of_the_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError) as caught, new_folder(tmp_path / "out") as folder:
        open(folder / "part" / "file", "wb")
    assert caught.value.filename == str(tmp_path / "out" / "part" / "file")
    with pytest.raises(MegaSoraError, match="there is no folder .*/a; make it first"), new_folder(tmp_path / "a" / "b"):
        pass
    (tmp_path / "file").touch()
    for name in ("..", ".", "/", "file"):
        with pytest.raises(MegaSoraError, match="exists"), new_folder(Path(name)):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(MegaSoraError, match="may not write"), new_folder(tmp_path / "out"):
        pass

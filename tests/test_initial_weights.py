"""Files of initial weights (run.start=init:FILE) that are damaged or hostile are one error of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megasora.config import load
from megasora.errors import MegaSoraError
from megasora.parallelize import initial_weights

SHAPE = torch.Size([2, 2])


def read(path: Path, name: str = "a") -> torch.Tensor:
    return initial_weights(load(None, [f"run.dir={path.parent}/run", f"run.start=init:{path}"]))(name, SHAPE)


def header_file(header: object, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(64)


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HEADERS = {
    "empty": b"",
    "huge header": header_file({}, 1 << 62),
    "no JSON": header_file(b"<html>"),
    "deep": header_file(b"[" * 100_000),
    "overlapping": header_file({"a": F32, "b": {**F32, "data_offsets": [8, 24]}}),
    "beyond the file": header_file({"a": {**F32, "data_offsets": [0, 1 << 40], "shape": [1 << 38]}}),
    "unknown dtype": header_file({"a": {**F32, "dtype": "Q7"}}),
    "a shape that does not fit": header_file({"a": {**F32, "shape": [5]}}),
    "a product that overflows": header_file({"a": {**F32, "shape": [1 << 62, 1 << 62]}}),
    "a pickle": b"\x80\x04\x95" + b"a" * 200,
}


def check_error(path: Path, words: str) -> None:
    with pytest.raises(MegaSoraError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(f"run.start=init:{path}") and words in text and text.isprintable() and len(text) < 500


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_file_cannot_be_read(name, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(HEADERS[name])
    check_error(path, "cannot be read")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value, tmp_path):
    weight = torch.zeros(SHAPE)
    weight[1, 1] = value
    save_file({"a": weight}, tmp_path / "weights.safetensors")
    check_error(tmp_path / "weights.safetensors", ": a is float32, or some of its weights are NaN or infinite")


def test_weights_are_floating_point_numbers(tmp_path):
    path = tmp_path / "weights.safetensors"
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file({"a": torch.zeros(SHAPE).to(dtype)}, path)
        check_error(path, f"a is {str(dtype)[6:]}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weight = torch.arange(4.0).reshape(SHAPE).to(dtype)
        save_file({"a": weight}, path)
        assert torch.equal(read(path), weight)


def test_a_missing_weight_and_another_shape_are_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"b": torch.zeros(SHAPE)}, path)
    check_error(path, "a is [2, 2], the file has none")
    save_file({"a": torch.zeros(3)}, path)
    check_error(path, "a is [2, 2], the file has [3]")

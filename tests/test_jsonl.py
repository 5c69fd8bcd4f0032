"""JSONL lines stay separate."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megasora.jsonl import JsonlWriter, parse_json


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_jsonl_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for step in range(3):
        writer.write({"step": step, "loss": 1 / (step + 1), "mfu": None, "text": "a\nb — ü"})
        assert len(read_jsonl(tmp_path / "metrics.jsonl")) == step + 1
    assert read_jsonl(tmp_path / "metrics.jsonl")[2] == {"step": 2, "loss": 1 / 3, "mfu": None, "text": "a\nb — ü"}
    writer.close()


def test_a_fifo_in_place_of_a_jsonl_file_is_an_error_that_names_it(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="not a regular file") as caught:
        JsonlWriter(tmp_path / "metrics.jsonl")
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")


def test_a_new_jsonl_writer_appends(tmp_path):
    for step in (1, 2):
        writer = JsonlWriter(tmp_path / "metrics.jsonl")
        writer.write({"step": step})
        writer.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_an_incomplete_jsonl_line_does_not_merge_with_the_next_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    writer = JsonlWriter(path)
    writer.write({"step": 2})
    writer.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2, "lo\n{"step": 2}\n'


@pytest.mark.parametrize("text", ["", "[", "nul", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, b"\xff\xfe", "[1] 2"])
def test_a_text_that_is_not_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_a_number_that_json_does_not_have_is_not_written(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            writer.write({"loss": value})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_full_disk_names_the_jsonl_file():
    writer = JsonlWriter(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        writer.write({"step": 1})
    writer.close()


def test_a_line_of_which_the_disk_takes_a_part_is_completed(tmp_path):
    class Slow:
        """A file that takes at most 3 bytes at a time."""

        def __init__(self, file):
            self.file, self.name = file, file.name

        def write(self, data):
            return self.file.write(data[:3])

        def close(self):
            self.file.close()

    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.file = Slow(writer.file)
    writer.write({"step": 12, "loss": 0.5})
    writer.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 12, "loss": 0.5}]

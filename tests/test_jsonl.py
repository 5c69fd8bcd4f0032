"""JSONL lines stay separate."""

from __future__ import annotations

import json
from pathlib import Path

from megasora.jsonl import JsonlWriter


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_jsonl_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for step in range(3):
        writer.write({"step": step, "loss": 1 / (step + 1), "mfu": None, "text": "a\nb — ü"})
        assert len(read_jsonl(tmp_path / "metrics.jsonl")) == step + 1
    assert read_jsonl(tmp_path / "metrics.jsonl")[2] == {"step": 2, "loss": 1 / 3, "mfu": None, "text": "a\nb — ü"}
    writer.close()


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

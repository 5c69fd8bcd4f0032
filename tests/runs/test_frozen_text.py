"""A run with captions encoded by a frozen text encoder at ingest: ingest, training, sampling."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="pip install megasora[encoders]")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "text")]
from conftest import train_arguments  # noqa: E402
from test_pretrained import save_t5  # noqa: E402


def test_a_run_on_stored_t5_features_trains_and_samples(clips, launch, tiny, tmp_path):
    encoder = save_t5(tmp_path / "t5")
    text = ["text.name=t5", f"text.path={encoder}", "text.max_tokens=32"]
    shards = tmp_path / "shards"
    code, output = launch("megasora.cli", "ingest", clips, "--out", shards, *tiny, *text)
    assert code == 0, output
    assert json.loads((shards / "dataset.json").read_text())["text_dim"] == 12

    code, output = launch("megasora.train", *train_arguments(tmp_path / "run", shards, tiny), *text)
    assert code == 0, output
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.97 * sum(losses[:5])

    out = tmp_path / "out.mp4"
    code, output = launch(
        "megasora.cli", "sample", tmp_path / "run", "--prompt", "a red circle moves right", "--out", out
    )
    assert code == 0, output
    assert out.stat().st_size > 0

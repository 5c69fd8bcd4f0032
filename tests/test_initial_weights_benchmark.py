"""The benchmark of first weights in tiny settings: it counts the weights of a rank."""

import json

import torch

from benchmarks import initial_weights
from megasora.build import build_model, patch_dim
from megasora.config import load


def test_initial_weights_counts_the_weights_of_a_rank(tmp_path):
    out, threads = tmp_path / "record.json", str(torch.get_num_threads())
    arguments = ["--count", "4096", "--rounds", "1", "--threads", threads, "--out", str(out)]
    initial_weights.main([*arguments, "--presets", "dit_s.yaml:1", "dit_s.yaml:2"])
    record = json.loads(out.read_text())
    whole, half = record["ranks"]
    config = load(initial_weights.CONFIGS / "dit_s.yaml", ["text.name=bytes", "text.path=", "run.dir=none"])
    with torch.device("meta"):
        model = build_model(config, patch_dim(config))
    assert whole["local"] == whole["whole"] == half["whole"] == sum(p.numel() for p in model.parameters())
    assert 0.5 < half["local"] / whole["local"] < 0.65  # the text embedder is on all ranks
    assert [(rate["numbers"], rate["counter_per_s"] > 0) for rate in record["rates"]] == [("uniform", 1), ("normal", 1)]

"""A run resumed in another layout at every launch equals the uninterrupted run: the same clips, losses and weights."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import full_tensors, read_jsonl, train, train_arguments

from megasora.run_log.ledger import read_ledger
from megasora.testing.spawn import run_ranks

SETTINGS = [  # packs that 4, 3 and 2 data ranks can share
    "data.packs_per_step=12", "run.steps=10", "checkpoint.every=100", "validation.every=100", "run.ledger=true",
]  # fmt: skip
LAUNCHES = [  # (last step, processes, settings)
    (2, 4, ["data.reader_threads=1"]),
    (4, 2, ["parallel.zero_stage=3", "data.reader_threads=4"]),
    (6, 3, ["parallel.zero_stage=1", "data.reader_threads=0"]),
    (8, 2, ["parallel.tensor=2", "data.reader_threads=1"]),
    (10, 2, ["parallel.pipeline=2", "model.recompute=full", "data.reader_threads=4"]),
]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_resumed_in_five_layouts_equals_the_uninterrupted_run(shards, tiny, tmp_path):
    single, chain = tmp_path / "single", tmp_path / "chain"
    assert run_ranks(train, 1, [*train_arguments(single, shards, tiny), *SETTINGS]) == [None]
    for last, processes, settings in LAUNCHES:
        ends = run_ranks(train, processes, [*train_arguments(chain, shards, tiny), *SETTINGS, *settings], last)
        assert all(end is None or end.startswith(f"StopRequested: saved after step {last};") for end in ends)
        assert (chain / "checkpoints" / "latest").read_text() == f"step-{last:08d}\n"

    ledger = read_ledger(single)
    assert read_ledger(chain) == ledger and sorted(ledger) == list(range(1, 11))
    seen = Counter(i for ids in ledger.values() for i in ids)
    assert len(seen) == 60 and max(seen.values()) - min(seen.values()) <= 1  # epochs, and part of one

    metrics, expected_metrics = read_jsonl(chain), read_jsonl(single)
    assert [line["step"] for line in metrics] == [line["step"] for line in expected_metrics] == list(range(1, 11))
    for a, b in zip(metrics, expected_metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5), a["step"]
    tensors, expected = full_tensors(chain, 10), full_tensors(single, 10)
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        scale = float(values.abs().max())
        torch.testing.assert_close(tensors[name], values, rtol=0, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")

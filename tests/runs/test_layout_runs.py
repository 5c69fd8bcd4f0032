"""Whole runs in other layouts: the same metrics and saved tensors as on one process, and a bitwise resume."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import check_resume_repeats, full_tensors, read_jsonl, train, train_arguments

from megasora.testing.spawn import run_ranks

LAYOUTS = {  # settings: processes
    ("parallel.tensor=2", "parallel.context=2", "run.debug_parallel=true", "run.debug_every=5"): 4,
    ("parallel.context=2", "parallel.ulysses=2", "parallel.zero_stage=3", "model.recompute=keep_attention"): 2,
    ("parallel.tensor=2", "parallel.pipeline=2"): 4,
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("settings", LAYOUTS, ids=",".join)
def test_a_run_in_another_layout_equals_one_process_and_resumes_bit_for_bit(settings, trained, shards, tiny, tmp_path):
    run = tmp_path / "run"
    arguments = [*train_arguments(run, shards, tiny), *settings]
    assert not any(run_ranks(train, LAYOUTS[settings], arguments))
    metrics, expected_metrics = read_jsonl(run), read_jsonl(trained)
    assert len(metrics) == len(expected_metrics) == 20
    for a, b in zip(metrics, expected_metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["step"]
        assert a["padding_fraction"] == b["padding_fraction"] and a["lr"] == b["lr"]
        assert ("context_mib_sent" in a) == any("context" in s for s in settings)
    for a, b in zip(read_jsonl(run, "validation.jsonl"), read_jsonl(trained, "validation.jsonl"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
    tensors, expected = full_tensors(run, 20), full_tensors(trained, 20)
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(tensors[name], values, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")

    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-00000020")
    (again / "checkpoints" / "latest").write_text("step-00000010\n")
    assert not any(run_ranks(train, LAYOUTS[settings], [*train_arguments(again, shards, tiny), *settings]))
    check_resume_repeats(run, again)

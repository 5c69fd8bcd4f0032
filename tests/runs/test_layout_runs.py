"""Whole runs in other layouts: the same lines of metrics, the same saved weights, and a resume that changes nothing."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import check_repeats, lines, saved, train, train_arguments

from megasora.testing.spawn import run_ranks

LAYOUTS = {  # settings: processes
    ("parallel.tensor=2", "parallel.context=2", "run.debug_parallel=true", "run.debug_every=5"): 4,
    ("parallel.context=2", "parallel.ulysses=2", "parallel.zero_stage=3", "model.recompute=keep_attention"): 2,
    ("parallel.tensor=2", "parallel.pipeline=2"): 4,
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("settings", LAYOUTS, ids=",".join)
def test_a_run_in_another_layout_is_the_same_run_and_resumes_bit_for_bit(settings, trained, shards, tiny, tmp_path):
    run = tmp_path / "run"
    arguments = [*train_arguments(run, shards, tiny), *settings]
    assert not any(run_ranks(train, LAYOUTS[settings], arguments))
    ours, theirs = lines(run), lines(trained)
    assert len(ours) == len(theirs) == 20
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["step"]
        assert a["padding_fraction"] == b["padding_fraction"] and a["lr"] == b["lr"]
        assert ("context_mib_sent" in a) == any("context" in s for s in settings)
    for a, b in zip(lines(run, "validation.jsonl"), lines(trained, "validation.jsonl"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
    mine, single = saved(run, 20), saved(trained, 20)
    assert mine.keys() == single.keys()
    for name, values in single.items():
        torch.testing.assert_close(mine[name], values, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")

    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-00000020")
    (again / "checkpoints" / "latest").write_text("step-00000010\n")
    assert not any(run_ranks(train, LAYOUTS[settings], [*train_arguments(again, shards, tiny), *settings]))
    check_repeats(run, again)

"""benchmarks/float8.py without a GPU: what it compares, and that it runs."""

import json

import pytest

from benchmarks import float8
from benchmarks.float8 import SETTLED, SMOOTHING, Curve, compare


def test_curves_are_compared_smoothed_over_the_steps_that_both_have():
    steps = SETTLED + 40
    none = Curve("none", [2.0] * steps, {0: 5.0, 50: 4.0, 100: 1.0})
    losses = [2.0] * steps
    losses[SETTLED - SMOOTHING - 1] = 99  # in no window that counts
    losses[SETTLED + 3] = 2.0 + 2.0 * SMOOTHING * 0.03  # smoothed: 3 % in the windows that have it
    losses[-1] = 2.0 - 2.0 * SMOOTHING * 0.01
    longer = Curve("rowwise", [*losses, 7.0], {0: 9.0, 50: 4.1})
    difference = compare(longer, none)
    assert difference.steps == steps and difference.validation_step == 50
    assert (difference.largest, difference.final, difference.validation) == pytest.approx((0.03, 0.01, 0.025))
    assert compare(none, none).largest == 0


def test_without_a_gpu_it_runs_in_tiny_shapes_says_so_and_writes_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REHEARSE", "1")
    float8.main(["--out", str(tmp_path / "float8.json")])
    record, output = json.loads((tmp_path / "float8.json").read_text()), capsys.readouterr().out
    assert "the times mean nothing" in output and record["emulated"] is True
    assert {(r["linear"], r["variant"]) for r in record["linears"]} == {
        (linear, variant) for linear in float8.linears_of(32, 48) for variant in float8.VARIANTS
    }
    assert all(r["error"] is None and r["forward_ms"] > 0 for r in record["linears"])

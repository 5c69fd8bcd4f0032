"""`megasora checkpoint inspect`, `verify` and `diff`: numbers against torch, exit codes, and one line for bad input."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from saved_runs import flip
from verb_runs import SHAPES, TRAINING, checkpoint, make_run, random_value, step_folder

from megasora.checkpoint.full_tensors import save_full_tensors
from megasora.checkpoint.store import CheckpointStore
from megasora.commands.tensor_statistics import Statistics, statistics_of


def error_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# ---------------------------------------------------------------- inspect


def test_inspect_has_the_statistics_of_each_tensor(tmp_path, capsys):
    assert checkpoint("inspect", make_run(tmp_path / "run"), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["step"] == 20 and shown["parameters"] == sum(s.numel() for s in SHAPES.values())
    assert shown["kinds"] == sorted(TRAINING) and shown["layout"] == {"processes": 4, "tensor": 2}
    assert shown["bytes"] == sum(p.stat().st_size for p in step_folder(tmp_path / "run", 20).rglob("[!m]*.*"))
    for name, values in shown["tensors"].items():
        x = random_value("weights", name, 20).double()
        assert values["shape"] == list(SHAPES[name]) and values["non_finite"] == 0
        assert values["norm"] == pytest.approx(float(x.norm()), rel=1e-9)
        assert values["mean"] == pytest.approx(float(x.mean()), rel=1e-9)
        assert values["std"] == pytest.approx(float(x.std(correction=0)), rel=1e-6, abs=1e-7)
        assert values["max"] == float(x.abs().max())
    assert shown["tensors"].keys() == SHAPES.keys()


def test_inspect_prints_a_row_per_module_or_per_tensor_that_fits(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert checkpoint("inspect", run) == 0
    shown = capsys.readouterr().out
    assert "4 processes, tensor 2" in shown and "step            20" in shown
    row = next(line for line in shown.splitlines() if "blocks.*.mlp.up" in line)
    assert [cell.strip() for cell in row.split("│")[1:4]] == ["blocks.*.mlp.up", "3", "72"]
    assert checkpoint("inspect", step_folder(run, 10), "--tensors", "blocks.1.*", "--weights", "ema") == 0
    shown = capsys.readouterr().out
    assert shown.count("blocks.1.mlp.up.") == 2 and "null_text" not in shown
    expected = random_value("ema", "blocks.1.mlp.up.bias", 10).norm()
    assert f"{float(expected):.4g}" in shown


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    x = torch.randn(1000) * 3 + 1
    parts = sum(map(statistics_of, x.split(300)), Statistics())
    whole = statistics_of(x)
    assert (parts.count, parts.max) == (whole.count, whole.max)
    assert (parts.norm, parts.mean, parts.std) == pytest.approx((whole.norm, whole.mean, whole.std), rel=1e-9)


def test_values_that_are_not_finite_are_counted_and_left_out():
    s = statistics_of(torch.tensor([1.0, float("nan"), -3.0, float("inf")]))
    assert (s.count, s.non_finite, s.max, s.mean) == (4, 2, 3.0, -1.0)
    assert statistics_of(torch.tensor([float("nan")])).non_finite == 1
    assert statistics_of(torch.zeros(0)).norm == 0


def test_inspect_of_nothing_that_fits_is_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "run", (10,))
    assert checkpoint("inspect", run, "--tensors", "no.such") == 2
    assert "fits none of 5 parameters" in error_line(capsys)
    assert checkpoint("inspect", run, "--weights", "ema_0.5") == 2
    assert error_line(capsys).endswith("has no average ema_0.5; --weights may be raw, ema")


# ---------------------------------------------------------------- verify


def test_verify_reads_all_checkpoints_with_any_number_of_threads(tmp_path, capsys):
    run = make_run(tmp_path / "run", (10, 20, 30))
    flip(step_folder(run, 20) / "fragments" / "rank-00000.safetensors", 2000)
    for threads in (0, 1, 7):
        assert checkpoint("verify", run, "--threads", threads) == 2
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("  ")[1].split(":")[0] == "whole" for line in lines] == [True, False, True]
        assert "rank-00000.safetensors is damaged" in lines[1]
    assert checkpoint("verify", run, "--threads", 100000) == 2
    assert "--threads 100000 must be from 0 to 256" in error_line(capsys)


# ---------------------------------------------------------------- diff


def test_diff_of_equal_checkpoints_is_0_whatever_the_number_of_files(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    assert checkpoint("reshape", run, "--processes", 4, "--out", tmp_path / "b") == 0
    shutil.copytree(step_folder(run, 10), step_folder(tmp_path / "b", 10))
    assert checkpoint("diff", run, tmp_path / "b") == 0
    assert checkpoint("diff", step_folder(run, 10), step_folder(tmp_path / "b", 10)) == 0
    assert "differ" not in capsys.readouterr().out


def test_diff_says_which_tensors_differ_and_by_how_much(tmp_path, capsys):
    def changed(kind: str, name: str, step: int) -> torch.Tensor:
        x = random_value(kind, name, step).clone()
        if (kind, name) == ("ema", "null_text"):
            x[2:5] += torch.tensor([0.5, -0.25, 0.125])
        return x

    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", value_of=changed)
    assert checkpoint("diff", a, b, "--json") == 1
    shown = json.loads(capsys.readouterr().out)
    (tensor,) = shown["tensors"]
    x, y = random_value("ema", "null_text", 20), changed("ema", "null_text", 20)
    assert (tensor["kind"], tensor["name"], tensor["elements"], tensor["count"]) == ("ema", "null_text", 3, 7)
    assert tensor["largest"] == pytest.approx(0.5, abs=1e-6)
    assert tensor["relative"] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-6)
    assert shown["state"] == {} and shown["only_in"] == {str(step_folder(p, 20)): [] for p in (a, b)}
    assert checkpoint("diff", a, b) == 1
    said = capsys.readouterr().out
    assert "ema             1 of 5 tensors differ" in said and "weights         equal" in said


def test_diff_names_kinds_and_state_of_only_one(tmp_path, capsys):
    a = make_run(tmp_path / "a", (10,), state=lambda step: {"task": {"cursor": {"epoch": 1}}})
    b = make_run(tmp_path / "b", (10,), ("weights", "ema_0.5"), state=lambda step: {"task": {"cursor": {"epoch": 2}}})
    assert checkpoint("diff", a, b, "--weights", "raw") == 1
    said = capsys.readouterr().out
    assert f"ema, exp_avg, exp_avg_sq only in {step_folder(a, 10)}" in said
    assert f"ema_0.5         only in {step_folder(b, 10)}" in said
    assert "state task.cursor.epoch: 1 -> 2" in said and "weights         equal" in said


def test_how_a_checkpoint_was_saved_is_no_difference(tmp_path, capsys):
    a = make_run(tmp_path / "a", (10,))
    b = make_run(tmp_path / "b", (10,), state=lambda step: {"parallel": {"processes": 1}, "code": "4567"})
    assert checkpoint("diff", a, b) == 0
    assert "state parallel.processes: 4 -> 1" in capsys.readouterr().out


def test_nan_equals_nan_and_differs_from_a_number(tmp_path, capsys):
    def with_nan(kind: str, name: str, step: int) -> torch.Tensor:
        x = random_value(kind, name, step).clone()
        return x.index_fill_(0, torch.tensor([0]), float("nan")) if name == "null_text" else x

    a, b = (make_run(tmp_path / name, (10,), value_of=with_nan) for name in "ab")
    assert checkpoint("diff", a, b) == 0
    c = make_run(tmp_path / "c", (10,))
    assert checkpoint("diff", a, c, "--json") == 1
    shown = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert {(t["name"], t["elements"], t["largest"]) for t in shown["tensors"]} == {("null_text", 1, None)}


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_checkpoint_is_compared_with_an_exported_file(weights, tmp_path, capsys):
    run, out = make_run(tmp_path / "run"), tmp_path / "x.safetensors"
    assert checkpoint("export", run, "--out", out, "--weights", weights) == 0
    assert checkpoint("diff", run, out, "--weights", weights) == 0
    other = {"ema": "raw", "raw": "ema"}[weights]
    assert checkpoint("diff", out, run, "--weights", other) == 1
    assert "5 of 5 tensors differ" in capsys.readouterr().out


def test_another_model_is_one_line_and_exit_code_2(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    shapes = {name: shape for name, shape in SHAPES.items() if name != "scale"} | {"null_text": torch.Size((9,))}
    other = CheckpointStore(tmp_path / "other" / "checkpoints")
    save_full_tensors(other, 20, shapes, ("weights",), lambda kind, name: torch.zeros(shapes[name]), {})
    for arguments in (
        ("diff", run, tmp_path / "other"),
        ("average", run, tmp_path / "other", "--out", tmp_path / "new"),
    ):
        assert checkpoint(*arguments) == 2
        line = error_line(capsys)
        assert "are of different models: 1 parameters are only in" in line and "(scale)" in line
        assert "1 have other shapes (e.g. null_text [7] and [9])" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "run"]


def test_a_damaged_file_to_compare_with_is_one_line(tmp_path, capsys):
    run, file = make_run(tmp_path / "run", (10,)), tmp_path / "x.safetensors"
    save_file({name: random_value("ema", name, 10) for name in SHAPES}, file)
    file.write_bytes(file.read_bytes()[:-9])
    assert checkpoint("diff", run, file) == 2
    assert f"{file} cannot be read: " in error_line(capsys)

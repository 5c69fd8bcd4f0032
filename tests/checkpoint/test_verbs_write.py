"""`megasora checkpoint reshape`, `average` and `prune`: what they write and delete."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from saved_runs import flip
from verb_runs import SHAPES, TRAINING, checkpoint, make_run, random_value, step_folder

from megasora.checkpoint.history import read_history
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import CheckpointStore, find_checkpoint, names, read_state
from megasora.config import load_run_config
from megasora.locks import locked
from megasora.optim.ema import ShardedEMA
from megasora.optim.ema_decays import power_decay
from megasora.optim.update import Update
from megasora.run_log.launches import LOCK


def error_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# ---------------------------------------------------------------- reshape


@pytest.mark.parametrize("files", [1, 3, 5])
def test_reshape_keeps_every_value_and_the_state_in_so_many_files(files, tmp_path, capsys):
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    (run / "run.json").write_text('{"max_frames": 9}')
    assert checkpoint("reshape", step_folder(run, 10), "--processes", files, "--out", out) == 0
    assert f"step-00000010 of {run} in {files} files in {out}" in capsys.readouterr().out
    made, original = (ShardedCheckpoint(step_folder(path, 10)) for path in (out, run))
    assert made.shapes == original.shapes and made.kinds == set(TRAINING)
    for kind in TRAINING:
        for name in SHAPES:
            assert torch.equal(made.full_tensor(kind, name), random_value(kind, name, 10))
    assert read_state(step_folder(out, 10)) == read_state(step_folder(run, 10))
    assert len(list((step_folder(out, 10) / "fragments").iterdir())) == files
    assert load_run_config(out).run.dir == str(out) and (out / "run.json").read_text() == '{"max_frames": 9}'
    assert names(CheckpointStore(out / "checkpoints").complete()) == read_history(out).saved == ["step-00000010"]


@pytest.mark.parametrize("files", [0, 6, -1])
def test_reshape_into_too_many_files_or_none_is_refused(files, tmp_path, capsys):
    run = make_run(tmp_path / "run", (10,))
    assert checkpoint("reshape", run, "--processes", files, "--out", tmp_path / "out") == 2
    assert f"--processes {files} must be from 1 to 5, the number of tensors" in error_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# ---------------------------------------------------------------- average


@pytest.mark.parametrize(("weights", "kind"), [("ema", "ema"), ("raw", "weights")])
def test_an_average_is_the_mean_of_the_weights(weights, kind, tmp_path):
    runs = [make_run(tmp_path / name, (step,)) for name, step in (("a", 10), ("b", 20), ("c", 30))]
    assert checkpoint("average", *runs, "--weights", weights, "--out", tmp_path / "out") == 0
    made = ShardedCheckpoint(find_checkpoint(tmp_path / "out", report=lambda text: None))
    assert made.kinds == {"weights"}
    for name in SHAPES:
        mean = sum(random_value(kind, name, step).double() for step in (10, 20, 30)) / 3
        assert torch.equal(made.full_tensor("weights", name), mean.float())
    assert "average of" in read_state(step_folder(tmp_path / "out", 0))["imported"]


def test_coefficients_weigh_the_checkpoints(tmp_path, capsys):
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    places = [step_folder(run, 10), step_folder(run, 20)]
    assert checkpoint("average", *places, "--out", out, "--coefficients", "1.5", "-0.5") == 0
    made, name = ShardedCheckpoint(step_folder(out, 0)), "null_text"
    expected = 1.5 * random_value("ema", name, 10).double() - 0.5 * random_value("ema", name, 20).double()
    assert torch.equal(made.full_tensor("weights", name), expected.float())
    for numbers, words in (
        (["1"], "--coefficients has 1 numbers for 2 checkpoints"),
        (["0.5", "0.6"], "must be numbers whose sum is 1"),
        (["nan", "1"], "must be numbers whose sum is 1"),
        (["inf", "1"], "must be numbers whose sum is 1"),
    ):
        capsys.readouterr()
        assert checkpoint("average", *places, "--out", tmp_path / "new", "--coefficients", *numbers) == 2
        assert words in error_line(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_the_average_of_a_checkpoint_with_itself_is_the_checkpoint(tmp_path):
    run, out = make_run(tmp_path / "run", (10,)), tmp_path / "out"
    assert checkpoint("average", run, run, run, "--out", out, "--weights", "raw") == 0
    made = ShardedCheckpoint(step_folder(out, 0))
    assert all(torch.equal(made.full_tensor("weights", name), random_value("weights", name, 10)) for name in SHAPES)


def trained_averages(sigmas: tuple[float, ...], steps: int) -> dict[str, dict[int, dict[str, torch.Tensor]]]:
    """Power-function averages of a training of the parameters, by kind, update and name."""
    weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    ema = ShardedEMA(list(weights.values()), {f"ema_sigma_{s}": power_decay(s) for s in sigmas})
    saved: dict[str, dict[int, dict[str, torch.Tensor]]] = {kind: {} for kind in ema.averages}
    for step in range(1, steps + 1):
        for name, w in weights.items():
            w.copy_(random_value("goal", name, 0) * (1 - np.exp(-5 * step / steps)))
            w.add_(random_value("noise", name, step), alpha=0.05)
        ema.update(Update(lr=0.0, number=ema.updates))
        ema.updates += 1
        for kind, tensors in ema.averages.items():
            saved[kind][step] = {name: x.clone() for name, x in zip(weights, tensors, strict=True)}
    return saved


def test_a_post_hoc_average_agrees_with_the_one_that_was_tracked(tmp_path, capsys):
    sigmas, steps = (0.05, 0.1, 0.08, 0.14), range(10, 101, 10)
    tracked = trained_averages(sigmas, 100)
    kinds = ("weights", "ema_sigma_0.05", "ema_sigma_0.1")

    def value_of(kind: str, name: str, step: int) -> torch.Tensor:
        return tracked[kind][step][name] if kind in tracked else random_value(kind, name, step)

    run = make_run(tmp_path / "run", steps, kinds, value_of)
    for sigma in (0.05, 0.08, 0.14):
        out = tmp_path / f"out{sigma}"
        assert checkpoint("average", run, "--sigma", sigma, "--out", out) == 0
        assert "from 20 saved averages" in capsys.readouterr().out
        made = ShardedCheckpoint(step_folder(out, 0))
        for name in SHAPES:
            expected = tracked[f"ema_sigma_{sigma}"][100][name]
            distance = torch.linalg.norm(made.full_tensor("weights", name) - expected)
            nearest = torch.linalg.norm(tracked["ema_sigma_0.1"][100][name] - expected)
            assert distance < 0.01 * torch.linalg.norm(expected)
            assert sigma != 0.14 or name == "scale" or distance < 0.5 * nearest


def test_a_post_hoc_average_needs_averages_and_a_run(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    for arguments, words in (
        ([run, "--sigma", "0.1"], "has an average ema_sigma_*; train with optim.ema_sigmas=[0.05,0.1]"),
        ([run, "--sigma", "0.5"], "--sigma 0.5 must be from 0.001 to 0.25"),
        ([run, "--sigma", "nan"], "--sigma nan must be from 0.001 to 0.25"),
        ([run, run, "--sigma", "0.1"], "--sigma is of one run, not of 2 checkpoints"),
        ([step_folder(run, 10), "--sigma", "0.1"], "is a checkpoint of MegaSora, and no run folder"),
        ([run], "give at least two checkpoints, or one run and --sigma"),
    ):
        assert checkpoint("average", *arguments, "--out", tmp_path / "new") == 2
        assert words in error_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_damaged_checkpoint_is_left_out_of_a_post_hoc_average(tmp_path, capsys):
    run = make_run(tmp_path / "run", (10, 20, 30), ("weights", "ema_sigma_0.05"))
    flip(step_folder(run, 20) / "fragments" / "rank-00000.safetensors", 1500)
    assert checkpoint("average", run, "--sigma", "0.05", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "from 2 saved averages" in said and "; left out" in said


# ---------------------------------------------------------------- prune


def losses(step: int) -> dict[str, float]:
    return {"validation_loss": {10: 0.9, 20: 0.1, 30: 0.5}.get(step, 1.0)}


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (["--keep", 1], [50]),
        (["--keep", 2, "--keep-every", 30], [30, 40, 50]),
        (["--keep", 1, "--keep-best", 2], [20, 30, 50]),
        (["--keep", 9], [10, 20, 30, 40, 50]),
    ],
)
def test_prune_deletes_what_no_rule_keeps(rules, kept, tmp_path, capsys):
    run = make_run(tmp_path / "run", range(10, 60, 10), ("weights",), state=losses)
    before = sorted(run.rglob("*"))
    size = sum(p.stat().st_size for s in range(10, 60, 10) if s not in kept for p in step_folder(run, s).rglob("*.*"))
    assert checkpoint("prune", run, *rules, "--dry-run") == 0
    dry = capsys.readouterr().out
    assert dry.splitlines()[-1] == f"{5 - len(kept)} of 5 checkpoints would be deleted, {size:,} bytes"
    assert sorted(run.rglob("*")) == before
    assert checkpoint("prune", run, *rules) == 0
    assert capsys.readouterr().out == dry.replace("would be deleted", "deleted")
    store = CheckpointStore(run / "checkpoints")
    assert names(store.complete()) == [f"step-{step:08d}" for step in kept] == read_history(run).saved
    assert sorted(p.name for p in store.folder.iterdir()) == ["latest", *names(store.complete())]


def test_prune_leaves_a_run_alone_that_trains(tmp_path, capsys):
    run = make_run(tmp_path / "run", (10, 20))
    with locked(run / LOCK, "the test"):
        assert checkpoint("prune", run, "--keep", 1) == 2
    assert f"run folder {run} is being written by process " in error_line(capsys)
    assert len(CheckpointStore(run / "checkpoints").complete()) == 2


def test_damaged_checkpoints_do_not_count_as_the_newest_and_stay(tmp_path, capsys):
    run = make_run(tmp_path / "run", (5, 10, 20, 30, 40), ("weights",))
    flip(step_folder(run, 40) / "state.json")
    for step in (20, 30):
        file = step_folder(run, step) / "fragments" / "rank-00000.safetensors"
        if step == 20:
            flip(file, -100)  # a value
        else:
            file.write_bytes(file.read_bytes()[:-1])
    assert checkpoint("prune", run, "--keep", 1) == 0
    left = names(CheckpointStore(run / "checkpoints").complete())
    assert left == [f"step-{step:08d}" for step in (10, 20, 30, 40)]  # 10 is the newest that is whole
    assert capsys.readouterr().out.count("kept, not counted") == 3


def test_a_checkpoint_that_is_a_link_is_neither_counted_nor_deleted(tmp_path):
    run, other = make_run(tmp_path / "run", (10, 20), ("weights",)), make_run(tmp_path / "other", (5,), ("weights",))
    step_folder(run, 5).symlink_to(step_folder(other, 5))
    assert checkpoint("prune", run, "--keep", 1) == 0
    assert step_folder(run, 5).is_symlink() and step_folder(other, 5).is_dir() and not step_folder(run, 10).exists()


@pytest.mark.parametrize("rules", [["--keep", 0], ["--keep", 1, "--keep-every", -1], ["--keep", 1, "--keep-best", -2]])
def test_rules_that_make_no_sense_are_refused(rules, tmp_path, capsys):
    run = make_run(tmp_path / "run", (10, 20), ("weights",))
    assert checkpoint("prune", run, *rules) == 2
    assert "must be at least" in error_line(capsys)
    assert len(CheckpointStore(run / "checkpoints").complete()) == 2


# ---------------------------------------------------------------- errors leave nothing


@pytest.mark.parametrize(
    "verb",
    [
        ["reshape", "run", "--processes", "2", "--out", "@"],
        ["average", "run", "run", "--out", "@"],
        ["export", "run", "--format", "dcp", "--out", "@"],
    ],
)
def test_what_is_to_be_written_must_be_new(verb, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", (10,))
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for out, words in (("run", "exists"), ("file", "exists"), ("no/such", "there is no folder")):
        assert checkpoint(*(word.replace("@", out) for word in verb)) == 2
        assert words in error_line(capsys)
    assert sorted(tmp_path.rglob("*")) == before and read_state(step_folder(run, 10))["step"] == 10


def test_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    from megasora.checkpoint import full_tensors

    run = make_run(tmp_path / "run", (10,))

    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / ".out.part" / "checkpoints" / "x"))

    monkeypatch.setattr(full_tensors, "write_fragment_file", full)
    for verb in (["reshape", run, "--processes", 2], ["average", run, run]):
        assert checkpoint(*verb, "--out", tmp_path / "out") == 2
        assert "No space left on device" in error_line(capsys)
        assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_options_of_another_format_are_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run", (10,))
    for options, words in (
        (["--zero-stage", 2], "--zero-stage is of --format deepspeed, not of safetensors; leave it out"),
        (["--format", "deepspeed", "--everything"], "--everything is of --format dcp, not of deepspeed"),
        (["--format", "deepspeed", "--weights", "ema"], "has the moments of the raw weights; leave --weights out"),
        (["--format", "megasora", "--shard-bytes", 0], "--shard-bytes 0 must be at least 1"),
    ):
        name = "out" if "--format" in options else "out.safetensors"
        assert checkpoint("export", run, "--out", tmp_path / name, *options) == 2
        assert words in error_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_json_of_inspect_of_an_average_says_where_it_is_from(tmp_path, capsys):
    run = make_run(tmp_path / "run", (10, 20), ("weights",))
    assert checkpoint("average", step_folder(run, 10), step_folder(run, 20), "--out", tmp_path / "out") == 0
    capsys.readouterr()
    assert checkpoint("inspect", tmp_path / "out", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["imported"].startswith("average of ema weights: 0.5 ") and shown["step"] == 0

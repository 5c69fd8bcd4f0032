"""Whole training runs: data parallel, resumed and bf16 runs against one process, and launches that are errors."""

from __future__ import annotations

import re
import shutil

import pytest
from conftest import check_resume_repeats, read_jsonl, train_arguments
from saved_runs import flip


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_two_processes_train_as_one(zero_stage, trained, shards, launch, tiny, tmp_path):
    arguments = [*train_arguments(tmp_path / "two", shards, tiny), f"parallel.zero_stage={zero_stage}"]
    code, output = launch("megasora.train", *arguments, processes=2)
    assert code == 0, output
    one, two = read_jsonl(trained), read_jsonl(tmp_path / "two")
    assert len(one) == len(two) == 20
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), a["step"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-5), a["step"]
        assert b["lr"] == a["lr"] and b["padding_fraction"] == a["padding_fraction"]
    for a, b in zip(
        read_jsonl(trained, "validation.jsonl"), read_jsonl(tmp_path / "two", "validation.jsonl"), strict=True
    ):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(trained, shards, launch, tiny, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(trained, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000020")  # `latest` still names it
    (resumed / "checkpoints" / ".step-00000020.part").mkdir()  # as a kill during a save leaves it
    code, output = launch("megasora.train", *train_arguments(resumed, shards, tiny))
    assert code == 0, output
    assert "from step 10" in output
    check_resume_repeats(trained, resumed)
    assert not list((resumed / "checkpoints").glob(".*"))


def test_the_loss_falls_and_each_line_has_all_metrics(trained):
    metrics = read_jsonl(trained)
    assert sum(m["loss"] for m in metrics[-5:]) < 0.97 * sum(m["loss"] for m in metrics[:5])
    times = ("time_data", "time_wait", "time_forward", "time_backward", "time_optimizer")
    for line in metrics:
        assert {"step", "loss", "grad_norm", "lr", "tokens_per_second", "padding_fraction", "mfu", *times} <= set(line)
        assert sum(line[name] for name in times) == pytest.approx(line["time_step"], rel=1e-3)
        assert 0 <= line["padding_fraction"] < 1  # the last pack of a short epoch may be half empty
    assert [v["step"] for v in read_jsonl(trained, "validation.jsonl")] == [0, 10, 20]


ERRORS = {  # override -> words of the one-line message
    "model.hedas=3": ["model.hedas", "model.heads"],
    "model.heads=3": ["model.heads=3", "model.width=32", "2, 4"],
    "codec.channels=48": ["codec", "dct-4x8x8-24", "dct-4x8x8-48", "ingest again"],
    "optim.lr=5e-3": ["run.dir", "optim.lr: 0.001 -> 0.005", "choose another run.dir"],
    "data.tokens_per_pack=16": ["data.tokens_per_pack=16", "tokens of sample"],
    "data.shards=nowhere": ["nowhere", "megasora ingest"],
    "model.attention_backend=flash4": ["model.attention_backend=flash4", "no kernel for device cpu", "or 'auto'"],
}


@pytest.mark.parametrize("override", ERRORS)
def test_an_invalid_launch_is_an_error_of_one_line(override, trained, shards, tiny, capsys, tmp_path):
    from megasora.train import main

    run = trained if override.startswith("optim") else tmp_path / "new"
    assert main([*train_arguments(run, shards, tiny), override]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    for word in ERRORS[override]:
        assert word in message
    assert not (tmp_path / "new").exists()


def test_under_torchrun_the_error_is_printed_once(shards, launch, tiny, tmp_path):
    arguments = [*train_arguments(tmp_path / "run", shards, tiny), "model.hedas=3"]
    code, output = launch("megasora.train", *arguments, processes=2)
    assert code != 0
    assert output.count("did you mean 'model.heads'?") == 1
    assert not (tmp_path / "run").exists()


def test_packs_that_do_not_divide_over_the_processes_are_an_error(shards, tiny, capsys, monkeypatch, tmp_path):
    from megasora.train import main

    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["--check", *train_arguments(tmp_path / "run", shards, tiny)]) == 2
    assert "data.packs_per_step=2 must be a multiple of the 3 data-parallel" in capsys.readouterr().err


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one_bit_for_bit(trained, shards, launch, tiny, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    file = run / "checkpoints" / "step-00000020" / "fragments" / "rank-00000.safetensors"
    flip(file, -1000)
    code, output = launch("megasora.train", *train_arguments(run, shards, tiny))
    assert code == 0, output
    damage = re.escape(f"{file} is damaged: ") + "[a-z0-9 ]+ differ from their digest; step-00000020 is now damaged-"
    assert re.search(damage, output)
    check_resume_repeats(trained, run)
    assert sorted(path.name for path in (run / "checkpoints").glob("*step-*")) == [
        "damaged-step-00000020", "step-00000010", "step-00000020",
    ]  # fmt: skip


def test_a_run_resumes_in_another_layout_and_prints_both(trained, shards, launch, tiny, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    layout = ["parallel.tensor=2", "model.recompute=keep_attention", "run.start=resume:step-00000010"]
    code, output = launch("megasora.train", *train_arguments(run, shards, tiny), *layout, processes=2)
    assert code == 0, output
    assert "since the checkpoint of step 10: processes 1 -> 2, tensor 1 -> 2" in output
    assert "resuming from step-00000010; later checkpoints are now superseded-step-00000020" in output
    first, again = read_jsonl(trained), read_jsonl(run)[20:]
    assert [line["step"] for line in again] == list(range(11, 21))
    for a, b in zip(first[10:], again, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), a["step"]


def test_bfloat16_follows_float32(trained, shards, launch, tiny, tmp_path):
    arguments = [*train_arguments(tmp_path / "half", shards, tiny), "run.dtype=bfloat16", "run.steps=20"]
    code, output = launch("megasora.train", *arguments)
    assert code == 0, output
    half = read_jsonl(tmp_path / "half")
    assert half[9]["loss"] != read_jsonl(trained)[9]["loss"]
    for a, b in zip(read_jsonl(trained), half, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02), a["step"]

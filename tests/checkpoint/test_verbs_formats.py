"""`megasora checkpoint export` and the imports, as typed: every value comes back, and one line for what cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import full_tensors
from safetensors.torch import load_file
from verb_runs import checkpoint, step_folder

from megasora.config import load_run_config

ROUND_TRIPS = {  # name -> (options of the export, verb and options of the import, kinds that come back)
    "dcp weights": (["--format", "dcp"], ["import-dcp", "--config", "CONFIG"], {"weights": "ema"}),
    "dcp bf16": (["--format", "dcp", "--dtype", "bf16"], ["import-dcp", "--config", "CONFIG"], {"weights": "ema"}),
    "dcp everything": (
        ["--format", "dcp", "--everything"],
        ["import-dcp"],
        {kind: kind for kind in ("weights", "ema", "exp_avg", "exp_avg_sq")},
    ),
    "deepspeed": (
        ["--format", "deepspeed", "--zero-stage", "2", "--processes", "3"],
        ["import-deepspeed", "--config", "CONFIG"],
        {kind: kind for kind in ("weights", "exp_avg", "exp_avg_sq")},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_every_value_comes_back(name, trained, tmp_path):
    options, (verb, *settings), kinds = ROUND_TRIPS[name]
    folder, back = tmp_path / "folder", tmp_path / "back"
    assert checkpoint("export", trained, *options, "--out", folder) == 0
    settings = [str(trained / "config.yaml") if word == "CONFIG" else word for word in settings]
    assert checkpoint(verb, folder, "--run", back, *settings) == 0
    from megasora.checkpoint.sharded import ShardedCheckpoint

    step = 0 if kinds == {"weights": "ema"} else 20
    made, expected = ShardedCheckpoint(step_folder(back, step)), full_tensors(trained, 20)
    assert made.kinds == kinds.keys() and len(made.shapes) > 50
    for kind, source in kinds.items():
        for parameter in made.shapes:
            values = expected[f"{source}/{parameter}"]
            values = values.bfloat16().float() if "bf16" in name else values
            assert torch.equal(made.full_tensor(kind, parameter), values)
    config, original = load_run_config(back), load_run_config(trained)
    assert config.run.dir == str(back) and config.model == original.model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_file_has_the_weights_in_the_dtype_that_is_asked_for(dtype, trained, tmp_path):
    out = tmp_path / "a.safetensors"
    assert checkpoint("export", trained, "--out", out, "--dtype", dtype, "--weights", "raw") == 0
    wanted, expected = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype], full_tensors(trained, 20)
    for name, values in load_file(out).items():
        assert values.dtype == wanted and torch.equal(values, expected[f"weights/{name}"].to(wanted))


@pytest.mark.slow
def test_our_own_folder_is_written_in_parts_of_bounded_size(trained, tmp_path):
    out = tmp_path / "model"
    assert checkpoint("export", trained, "--format", "megasora", "--out", out, "--shard-bytes", 300_000) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    expected = full_tensors(trained, 20)
    assert len(set(index.values())) > 2
    for file in set(index.values()):
        for name, values in load_file(out / file).items():
            assert index[name] == file and torch.equal(values, expected[f"ema/{name}"])


def test_what_cannot_be_exported_or_imported_is_one_line(trained, tmp_path, capsys):
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "latest").write_text("global_step20")
    (tmp_path / "ds" / "global_step20").mkdir()
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    export = ["export", trained, "--out", out, "--format"]
    for arguments, words in (
        ([*export, "deepspeed", "--zero-stage", 4], "--zero-stage 4 must be 1, 2 or 3"),
        ([*export, "deepspeed", "--processes", 0], "--processes 0 must be from 1 to 65536"),
        ([*export, "deepspeed", "--dtype", "fp16"], "--dtype fp16: --format deepspeed has bf16 and fp32"),
        ([*export, "diffusers"], "is of no Wan model"),
        ([*export, "dcp", "--weights", "ema_0.5"], "has no average ema_0.5; --weights may be raw, ema"),
        (["import-deepspeed", tmp_path / "ds", "--run", out], "needs the settings of the model: give --config"),
        (["import-deepspeed", tmp_path / "ds", "--run", out, "model.depth=1"], "global_step20"),
        (["import-dcp", trained, "--run", out], "is a run folder of MegaSora, and no checkpoint of torch.distributed"),
    ):
        assert checkpoint(*arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and words in lines[0], lines
        assert sorted(tmp_path.rglob("*")) == before

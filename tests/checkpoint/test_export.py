"""Exporting the weights of a run to one file, and starting another run from that file or from the checkpoint."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import full_tensors
from safetensors.torch import load_file

from megasora.cli import main
from megasora.config import load
from megasora.errors import MegaSoraError


@pytest.mark.parametrize(("weights", "kind"), [("ema", "ema"), ("raw", "weights")])
def test_an_export_has_the_weights_of_the_newest_checkpoint_or_of_the_given_one(
    weights, kind, trained, tmp_path, capsys
):
    earlier = trained / "checkpoints" / "step-00000010"
    for source, step in ((trained, 20), (earlier, 10)):
        out = tmp_path / f"{step}.safetensors"
        assert main(["checkpoint", "export", str(source), "--out", str(out), "--weights", weights]) == 0
        printed = capsys.readouterr()
        assert str(out) in printed.out and f"step-{step:08d}" in printed.out and printed.err == ""
        exported, expected = load_file(out), full_tensors(trained, step)
        assert len(exported) > 50
        assert all(torch.equal(values, expected[f"{kind}/{name}"]) for name, values in exported.items())
    assert len(list(tmp_path.iterdir())) == 2


def test_the_ema_weights_are_exported_by_default(trained, tmp_path):
    assert main(["checkpoint", "export", str(trained), "--out", str(tmp_path / "a.safetensors")]) == 0
    name = "patch_in.weight"
    assert torch.equal(load_file(tmp_path / "a.safetensors")[name], full_tensors(trained, 20)[f"ema/{name}"])


def test_initial_weights_from_a_checkpoint_equal_those_from_its_raw_export(trained, tmp_path):
    from megasora.checks import check_parallel
    from megasora.parallelize import initial_weights

    out, checkpoint = tmp_path / "a.safetensors", trained / "checkpoints" / "step-00000010"
    assert main(["checkpoint", "export", str(checkpoint), "--out", str(out), "--weights", "raw"]) == 0
    expected = full_tensors(trained, 10)
    for weights in (out, checkpoint):
        config = load(None, [f"model.init_from={weights}"])
        check_parallel(config)
        weight_of = initial_weights(config)
        for name, values in load_file(out).items():
            assert torch.equal(weight_of(name, values.shape), expected[f"weights/{name}"])
        with pytest.raises(MegaSoraError, match=r"this model's null_text is \[7\], the file has \[\d+\]"):
            weight_of("null_text", torch.Size([7]))
    for path in (trained, tmp_path / "none"):
        with pytest.raises(MegaSoraError, match="is neither a file nor a checkpoint"):
            check_parallel(load(None, [f"model.init_from={path}"]))


def test_an_impossible_export_prints_one_line_and_writes_nothing(trained, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "a.safetensors"
    shutil.copytree(trained, run)
    file = run / "checkpoints" / "step-00000020" / "fragments" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    other_version = run / "checkpoints" / "step-00000010"
    (other_version / "fragments").rename(other_version / "slices")
    manifest = other_version / "manifest.json"
    manifest.write_text(manifest.read_text().replace("fragments/", "slices/"))
    for source, target, words in (
        (run, out, f"{file} is damaged: its SHA-256 differs from manifest.json; to resume from step-00000010: echo "),
        (other_version, out, f"{other_version} was saved by a version of MegaSora that this one cannot read"),
        (tmp_path, out, "is no checkpoint"),
        (run, tmp_path / "a.bin", "must end in .safetensors"),
        (run, tmp_path / "no" / "a.safetensors", "there is no folder"),
        (run, file, "exists"),
    ):
        assert main(["checkpoint", "export", str(source), "--out", str(target)]) == 2
        message = capsys.readouterr().err
        assert words in message and len(message.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [run]

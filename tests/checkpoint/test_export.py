"""Weights leave a run in one file, and another run starts from that file or from the checkpoint itself."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import saved
from safetensors.torch import load_file

from megasora.cli import main
from megasora.config import load
from megasora.errors import MegaSoraError


@pytest.mark.parametrize(("weights", "kind"), [("ema", "ema"), ("raw", "weights")])
def test_an_export_holds_the_weights_of_the_newest_checkpoint_or_of_the_one_that_is_named(
    weights, kind, trained, tmp_path, capsys
):
    earlier = trained / "checkpoints" / "step-00000010"
    for source, step in ((trained, 20), (earlier, 10)):
        out = tmp_path / f"{step}.safetensors"
        assert main(["checkpoint", "export", str(source), "--out", str(out), "--weights", weights]) == 0
        shown = capsys.readouterr()
        assert str(out) in shown.out and f"step-{step:08d}" in shown.out and shown.err == ""
        found, expected = load_file(out), saved(trained, step)
        assert len(found) > 50
        assert all(torch.equal(values, expected[f"{kind}/{name}"]) for name, values in found.items())
    assert len(list(tmp_path.iterdir())) == 2


def test_the_averaged_weights_are_exported_unless_the_last_ones_are_asked_for(trained, tmp_path):
    assert main(["checkpoint", "export", str(trained), "--out", str(tmp_path / "a.safetensors")]) == 0
    name = "patch_in.weight"
    assert torch.equal(load_file(tmp_path / "a.safetensors")[name], saved(trained, 20)[f"ema/{name}"])


def test_a_run_starts_from_a_checkpoint_as_from_its_exported_last_weights(trained, tmp_path):
    from megasora.parallelize import initial_weights
    from megasora.checks import check_parallel

    out, checkpoint = tmp_path / "a.safetensors", trained / "checkpoints" / "step-00000010"
    assert main(["checkpoint", "export", str(checkpoint), "--out", str(out), "--weights", "raw"]) == 0
    expected = saved(trained, 10)
    for weights in (out, checkpoint):
        config = load(None, [f"model.init_from={weights}"])
        check_parallel(config)
        weight_of = initial_weights(config)
        for name, values in load_file(out).items():
            assert torch.equal(weight_of(name, values.shape), expected[f"weights/{name}"])
        with pytest.raises(MegaSoraError, match=r"this model's null_text is \[7\], the file has \[\d+\]"):
            weight_of("null_text", torch.Size([7]))
    for nothing in (trained, tmp_path / "none"):
        with pytest.raises(MegaSoraError, match="is no file and no checkpoint"):
            check_parallel(load(None, [f"model.init_from={nothing}"]))


def test_what_cannot_be_exported_is_refused_in_one_line_and_nothing_is_written(trained, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "a.safetensors"
    shutil.copytree(trained, run)
    file = run / "checkpoints" / "step-00000020" / "fragments" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    for source, target, words in (
        (run, out, f"{file} is damaged"),
        (tmp_path, out, "is no checkpoint"),
        (run, tmp_path / "a.bin", "must end in .safetensors"),
        (run, tmp_path / "no" / "a.safetensors", "there is no folder"),
        (run, file, "exists"),
    ):
        assert main(["checkpoint", "export", str(source), "--out", str(target)]) == 2
        message = capsys.readouterr().err
        assert words in message and len(message.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [run]

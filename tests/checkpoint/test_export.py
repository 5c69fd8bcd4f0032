"""Exporting the weights of a run to one file, and starting another run from that file or from the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import full_tensors
from safetensors.torch import load_file
from saved_runs import build_saver, flip, names, save, store_of

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
        config = load(None, [f"run.start=init:{weights}", f"run.dir={tmp_path / 'new'}"])
        check_parallel(config)
        source = initial_weights(config)
        for name, values in load_file(out).items():
            weight = torch.empty(values.shape)
            source.fill(weight, name)
            assert torch.equal(weight, expected[f"weights/{name}"])
        with pytest.raises(MegaSoraError, match=r"this model's null_text is \[7\], the file has \[\d+\]"):
            source.fill(torch.empty(7), "null_text")
    for path in (trained, tmp_path / "none"):
        with pytest.raises(MegaSoraError, match="and no safetensors file"):
            check_parallel(load(None, [f"run.start=init:{path}", f"run.dir={tmp_path / 'new'}"]))


def offset_of(file: Path, tensor: str) -> int:
    """Byte of a safetensors file at which a tensor begins."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return 8 + length + json.loads(stream.read(length))[tensor]["data_offsets"][0]


def test_damage_of_what_is_not_exported_does_not_matter(trained, tmp_path, capsys):
    """Every byte that is read is verified, and no other; `verify` reads all of them."""
    run, out = tmp_path / "run", tmp_path / "a.safetensors"
    shutil.copytree(trained, run)
    file = run / "checkpoints" / "step-00000020" / "fragments" / "rank-00000.safetensors"
    flip(file, offset_of(file, "exp_avg/text.word.0.weight"))
    assert main(["checkpoint", "export", str(run), "--out", str(out)]) == 0
    assert "step-00000020" in capsys.readouterr().out
    name = "patch_in.weight"
    assert torch.equal(load_file(out)[name], full_tensors(trained, 20)[f"ema/{name}"])
    assert main(["checkpoint", "verify", str(run)]) == 2


def test_an_impossible_export_prints_one_line_and_writes_nothing(trained, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "a.safetensors"
    shutil.copytree(trained, run)
    newest, earlier = (run / "checkpoints" / f"step-{step:08d}" for step in (20, 10))
    file = newest / "fragments" / "rank-00000.safetensors"
    flip(file, offset_of(file, "ema/patch_out.weight"))
    manifest = json.loads((earlier / "manifest.json").read_text())
    (earlier / "manifest.json").write_text(json.dumps({"step": 10, "files": manifest["files"]}, indent=1))
    for source, target, words in (
        (newest, out, f"{file} is damaged: bytes "),
        (newest, out, " differ from their digest; use an earlier checkpoint"),
        (earlier, out, f"{earlier} was saved by another version of MegaSora (checkpoint format 0, "),
        (tmp_path, out, "is a folder of something else (run), and no run folder of megasora train or "),
        (run, tmp_path / "a.bin", "must end in .safetensors"),
        (run, tmp_path / "no" / "a.safetensors", "there is no folder"),
        (run, file, "exists"),
    ):
        assert main(["checkpoint", "export", str(source), "--out", str(target)]) == 2
        message = capsys.readouterr().err
        assert words in message and len(message.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [run]


def test_verify_names_what_is_whole_and_what_is_damaged(tmp_path, capsys):
    store = store_of(tmp_path)
    save(build_saver(store), 10, 20)
    lines = []
    for step in (10, 20):
        size = sum(p.stat().st_size for p in store.path(step).rglob("*.*") if p.name != "manifest.json")
        lines.append(f"step-{step:08d}  whole: 2 files, {size:,} bytes\n")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "".join(lines)
    file = store.path(20) / "fragments" / "rank-00000.safetensors"
    flip(file)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2
    damaged = f"step-00000020  {file} is damaged: its digests differ from the manifest\n"
    assert capsys.readouterr().out == lines[0] + damaged
    assert [main(["checkpoint", "verify", str(store.path(step))]) for step in (10, 20)] == [0, 2]
    assert main(["checkpoint", "verify", str(tmp_path / "none")]) == 2
    assert names(store) == ["latest", "step-00000010", "step-00000020"]


def test_a_damaged_newest_checkpoint_is_left_out_of_an_export_with_a_line(trained, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "a.safetensors"
    shutil.copytree(trained, run)
    file = run / "checkpoints" / "step-00000020" / "fragments" / "rank-00000.safetensors"
    flip(file, offset_of(file, "ema/patch_out.weight"))
    assert main(["checkpoint", "export", str(run), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"{file} is damaged: bytes ") and len(said.err.splitlines()) == 1
    assert said.err.endswith(" differ from their digest; reading step-00000010 instead\n")
    assert f"step-00000010 in {out}" in said.out
    name = "patch_in.weight"
    assert torch.equal(load_file(out)[name], full_tensors(trained, 10)[f"ema/{name}"])

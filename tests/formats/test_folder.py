"""A model exported as a folder: its files, its card, and the sampler in the card, which runs without MegaSora."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from saved_models import DIALECTS, build, save, velocity

from megasora.commands.checkpoint_export import in_dtype
from megasora.config import load
from megasora.diffusion.samplers import integrate, timestep_grid
from megasora.diffusion.timesteps import shift_factor
from megasora.errors import MegaSoraError
from megasora.formats import standalone
from megasora.formats.folder_card import model_card
from megasora.formats.folder_export import export_megasora, folder_config
from megasora.formats.source import ExportSource

SAMPLE = ["sample.size=24x40", "sample.frames=9", "sample.fps=8", "sample.guidance_scale=3"]


def export(tmp_path, overrides=(), **settings):
    config, model = build([*overrides, *SAMPLE])
    source = save(config, model, tmp_path / "run")
    export_megasora(source, tmp_path / "out", **settings)
    return source, model


def code_blocks(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("name", DIALECTS)
def test_a_folder_has_the_weights_bit_for_bit(name, tmp_path):
    written = []
    source, model = export(tmp_path, DIALECTS[name], on_written=written.append)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors", "modeling_megasora.py"]
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(exported[name], parameter) for name, parameter in model.named_parameters())
    assert sum(written) == in_dtype(source, "fp32")
    assert (tmp_path / "out" / "modeling_megasora.py").read_text() == Path(standalone.__file__).read_text()
    assert not list(tmp_path.glob(".*"))


def test_large_weights_are_in_parts(tmp_path):
    source, model = export(tmp_path, dtype=torch.bfloat16, shard_bytes=50_000)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    parts = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(parts) > 3 and parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    assert index["metadata"]["total_size"] == in_dtype(source, "bf16")
    for name, parameter in model.named_parameters():
        with safe_open(out / index["weight_map"][name], framework="pt") as file:
            assert torch.equal(file.get_tensor(name), parameter.to(torch.bfloat16))
    loaded = standalone.load_model(out)
    assert all(
        torch.equal(p, dict(model.named_parameters())[n].bfloat16().float()) for n, p in loaded.named_parameters()
    )


def sample_with_megasora(source, model, steps=50):
    """Euler steps with guidance, from the noise of the card with seed 0."""
    config = source.config
    torch.manual_seed(0)
    noise = torch.randn(config.codec.channels, 3, *{1: (3, 5), 2: (4, 6)}[config.data.patch[1]])
    tokens = noise[0].numel() // (config.data.patch[1] * config.data.patch[2])
    factor = shift_factor(torch.tensor(tokens), config.objective)
    caption = "a red circle moves right" if config.text.name == "bytes" else torch.zeros(8, 12)
    native = (8 * noise.shape[2], 8 * noise.shape[3], 9, 8.0)

    def guided(x, t):
        full, free = (velocity(config, model, x, float(t), text, native) for text in (caption, None))
        return free + 3.0 * (full - free)

    grid = [t.float() for t in timestep_grid(steps, factor)]
    return integrate(guided, noise, grid, "euler")


@pytest.mark.parametrize("name", ["default", "wan"])
def test_the_sampler_of_the_card_runs_without_megasora_and_gives_the_same_latents(name, tmp_path):
    source, model = export(tmp_path, [*DIALECTS[name], "objective.shift=3", "objective.shift_tokens=10"])
    out = tmp_path / "out"
    sampler, decoder = code_blocks(out)
    code = "import sys; sys.path.insert(0, '.'); sys.modules['megasora'] = None\nimport torch; torch.manual_seed(0)\n"
    code += sampler + f"\ntorch.save(x, {str(tmp_path / 'x.pt')!r})"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=out, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    x = torch.load(tmp_path / "x.pt", weights_only=True)
    expected = sample_with_megasora(source, model)
    assert x.shape == expected.shape and float((x - expected).abs().max() / expected.abs().max()) < 1e-4
    if name == "default":  # the codec has no weights
        names = {"x": x}
        exec(decoder, names)
        assert names["frames"].shape == (9, 3, 24, 40)


def test_the_card_says_what_the_model_is(tmp_path):
    source, _ = export(tmp_path, ["data.packs_per_step=4", "data.tokens_per_pack=512"])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    parameters = sum(shape.numel() for shape in source.sharded.shapes.values())
    for words in (
        f"| parameters | {parameters:,} |",
        "2 blocks of width 48 with 2 heads, MLP 192",
        "EMA of the weights, float32",
        "1,200 steps of 4 packs of 512 tokens: up to 2,457,600 tokens",
        "`dct` of MegaSora, a fixed transform; 6 channels, a latent is 4 x 8 x 8 pixels",
        "UTF-8 bytes, at most 64 words",
        "modulation `block`, QK-norm `per_head`, conditioning `full`",
    ):
        assert words in card, words
    assert "$" not in card and "icense" not in card and str(tmp_path) not in card


def test_the_card_of_imported_weights_and_of_codecs_with_weights(tmp_path):
    source, _ = export(tmp_path, [*DIALECTS["wan"], "text.pad=true", "text.max_tokens=512"])
    source.config.codec.name, source.config.codec.path = "wan", "/home/someone/secret/models--wan`|x\n"
    source = ExportSource(
        source.folder, source.config, {"step": 0, "imported": "Wan, /a/b/folder"}, source.sharded, "ema"
    )
    card = model_card(source, folder_config(source), "weights", torch.bfloat16)
    for words in (
        "weights as trained, bfloat16", "imported: Wan, folder",
        "`AutoencoderKLWan` of diffusers of `models--wan' x\\n`",
        "features of `t5`, 12 of each token, at most 512 tokens, padded with zeros", "codec.path=FOLDER",
        "a negative one",
    ):  # fmt: skip
        assert words in card, words
    assert "secret" not in card
    source.config.codec.name, source.config.codec.path = "vae", "runs/vae"
    assert "| latents | `vae` of `runs/vae`;" in model_card(source, folder_config(source), "weights", torch.float32)


def test_an_impossible_export_leaves_nothing(tmp_path, monkeypatch):
    config, model = build([])
    source = save(config, model, tmp_path / "run")
    for out, words in ((tmp_path / "run", "exists"), (tmp_path / "no" / "out", "there is no folder")):
        with pytest.raises(MegaSoraError, match=words):
            export_megasora(source, out)
    model.null_text.data[2] = float("nan")
    damaged = save(config, model, tmp_path / "run2")
    with pytest.raises(MegaSoraError, match="null_text has weights that are NaN or infinite"):
        export_megasora(damaged, tmp_path / "out")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        export_megasora(source, tmp_path / "out")
    assert str(error.value.filename).startswith(str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run2"]


def test_the_settings_of_the_table_build_the_model_again(tmp_path):
    """As `run.start=init:FOLDER` needs it."""
    source, model = export(tmp_path, DIALECTS["other"])
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    m = load(None, [f"model.{key}={value}" for key, value in values["model"].items() if key != "mlp_hidden"]).model
    assert (m.width, m.depth, m.qk_norm, m.rope_ntk_factor) == (32, 2, "across_heads", [1.5, 2, 1])
    assert values["model"]["mlp_hidden"] == source.config.model.mlp_hidden == 54

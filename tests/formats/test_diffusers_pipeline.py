"""A run that was imported from a pipeline of Wan is exported as a pipeline that diffusers loads and runs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.commands.import_wan import import_wan_to_run
from megasora.config import load_run_config
from megasora.formats.diffusers_folder import export_diffusers
from megasora.formats.source import ExportSource
from megasora.testing.wan import make_tiny_pipeline

diffusers = pytest.importorskip("diffusers", reason="pip install megasora[encoders]")

PROMPT, SHIFT = "a red circle moves right", 3.0
HEIGHT, WIDTH, FRAMES = 32, 48, 5
TOKENS = 2 * 2 * 3  # of such a clip: 2 latent frames of 4 x 6 latents, in patches of 2 x 2


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("wan"), PROMPT, SHIFT)


@pytest.fixture(scope="module")
def run(wan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "wan"
    settings = [f"sample.size={HEIGHT}x{WIDTH}", f"sample.frames={FRAMES}", f"objective.shift_tokens={TOKENS}"]
    import_wan_to_run(wan[1], folder, settings)
    return folder


def sample(pipeline, noise: torch.Tensor) -> torch.Tensor:
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 2}
    return pipeline(prompt="", negative_prompt=" ", latents=noise, output_type="latent", **size).frames


def export_source(run: Path, **config) -> ExportSource:
    folder = run / "checkpoints" / "step-00000000"
    return ExportSource(
        folder, dataclasses.replace(load_run_config(run), **config), {}, ShardedCheckpoint(folder), "weights"
    )


def load_pipeline(out: Path, monkeypatch) -> diffusers.WanPipeline:
    if find_spec("accelerate") is None:  # diffusers needs it to keep some weights of 16 bits in fp32
        monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keep_in_fp32_modules", None)
    return diffusers.WanPipeline.from_pretrained(out, local_files_only=True)


@pytest.mark.parametrize("how", ["link", "copy"])
def test_a_run_becomes_the_pipeline_that_it_was_imported_from(how, wan, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = export_diffusers(export_source(run), out, pipeline=how)
    assert words == f"{out}: diffusers.WanPipeline.from_pretrained('{out}') loads it"
    pipeline = load_pipeline(out, monkeypatch)
    assert pipeline.config.expand_timesteps is False and pipeline.scheduler.config.shift == SHIFT
    for name in ("transformer", "vae", "text_encoder"):
        loaded, expected = getattr(pipeline, name).state_dict(), getattr(wan[0], name).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected), name
    assert pipeline.tokenizer(PROMPT).input_ids == wan[0].tokenizer(PROMPT).input_ids
    pipeline.scheduler, noise = wan[0].scheduler, torch.randn(1, 16, 2, 4, 6)
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(sample(pipeline, noise), sample(wan[0], noise))
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert not [name for name in files if not name.endswith((".json", ".safetensors"))], files
    same = {name for name in files if (wan[1] / name).exists() and (out / name).samefile(wan[1] / name)}
    weights = {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert same == (weights if how == "link" else set())


def test_an_exported_pipeline_takes_image_prompts_as_its_run_does(run, tmp_path, monkeypatch):
    config = load_run_config(run)
    config.objective.frame_conditioning.first = 1
    config.objective.shift = 4.5
    export_diffusers(export_source(run, objective=config.objective), tmp_path / "out")
    pipeline = load_pipeline(tmp_path / "out", monkeypatch)
    assert pipeline.config.expand_timesteps is True and pipeline.scheduler.config.shift == 4.5


def test_without_the_other_parts_of_a_pipeline_the_transformer_is_exported_alone(wan, run, tmp_path):
    config = load_run_config(run)
    alone = [
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    for number, (changes, how, words) in enumerate(
        [
            (
                {"text": dataclasses.replace(config.text, path="google/umt5-xxl")},
                "link",
                "without text_encoder, tokenizer, as",
            ),
            ({"codec": dataclasses.replace(config.codec, name="dct", path="")}, "link", "without vae, as"),
            ({}, "none", "the transformer alone"),
        ]
    ):
        out = tmp_path / str(number)
        assert words in export_diffusers(export_source(run, **changes), out, pipeline=how)
        files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
        assert "model_index.json" not in files and set(alone[1:]) <= set(files)
        scheduler = json.loads((out / alone[0]).read_text()) if how == "link" else None
        assert how == "none" or scheduler.get("flow_shift", scheduler.get("shift")) == SHIFT
    assert files == alone[1:]


def test_parts_of_weights_are_taken_whole_or_not_at_all(wan, run, tmp_path, monkeypatch):
    source = shutil.copytree(wan[1], tmp_path / "source")
    (source / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    wan[0].vae.save_pretrained(source / "vae", max_shard_size="20KB")
    index = source / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    config = load_run_config(run)
    config.codec.path = config.text.path = str(source)

    def export(name: str) -> str:
        return export_diffusers(export_source(run, codec=config.codec, text=config.text), tmp_path / name)

    export("whole")
    loaded = load_pipeline(tmp_path / "whole", monkeypatch).vae.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in wan[0].vae.state_dict().items())
    for number, names in enumerate(([], "x", {"a": []}, {"a": "../x"}, {"a": "b-00001-of-00001.safetensors"}, {})):
        index.write_text(json.dumps({"weight_map": names}))
        assert "without vae" in export(str(number)) and not (tmp_path / str(number) / "vae").exists()
    index.write_text(json.dumps({"weight_map": weight_map}))
    (source / "vae" / max(weight_map.values())).unlink()
    assert "without vae" in export("half")


def test_only_known_files_of_a_pipeline_are_copied_and_no_code_is_named(wan, run, tmp_path, monkeypatch):
    source = shutil.copytree(wan[1], tmp_path / "source")
    for name in ("vae/evil.py", "vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "tokenizer/x.py"):
        (source / name).write_bytes(b"import os")
    os.mkfifo(source / "vae" / "generation_config.json")
    weights = source / "text_encoder" / "model.safetensors"
    os.replace(weights, tmp_path / "blob")  # as in the cache of the hub
    weights.symlink_to(tmp_path / "blob")
    index = json.loads((source / "model_index.json").read_text())
    index |= {"_class_name": ["evil", "Evil"], "text_encoder": ["evil", "Evil"], "vae": ["os", "system"]}
    (source / "model_index.json").write_text(json.dumps(index))
    config = load_run_config(run)
    config.codec.path = config.text.path = str(source)
    out = tmp_path / "out"
    export_diffusers(export_source(run, codec=config.codec, text=config.text), out)
    assert not [p for p in out.rglob("*") if p.is_symlink() or p.suffix in (".py", ".bin") or "generation" in p.name]
    written = json.loads((out / "model_index.json").read_text())
    assert written["text_encoder"] == ["transformers", "UMT5EncoderModel"] and "vil" not in json.dumps(written)
    assert (out / "text_encoder" / "model.safetensors").samefile(tmp_path / "blob")
    load_pipeline(out, monkeypatch)

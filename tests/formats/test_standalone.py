"""The model in plain PyTorch that an exported folder has equals VideoDiT, in a process that has no MegaSora."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saved_models import DIALECTS, TEXT_DIM, build, save, velocity

from megasora.formats import standalone
from megasora.formats.folder_export import export_megasora

WITHOUT_MEGASORA = """
import sys
sys.modules["megasora"] = None  # importing it fails
"""
RUN = """
import importlib.util, sys, torch
folder, inputs, outputs = sys.argv[1:]
spec = importlib.util.spec_from_file_location("modeling_megasora", f"{folder}/modeling_megasora.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
results = {}
for name, clips in torch.load(inputs, weights_only=True).items():
    model = module.load_model(f"{folder}/../{name}")
    with torch.no_grad():
        results[name] = [model(*arguments, **settings) for arguments, settings in clips]
torch.save(results, outputs)
"""


def run(code, *arguments, cwd=None):
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_MEGASORA + code, *map(str, arguments)],
        capture_output=True, text=True, timeout=100, check=False, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def clips_of(name, config):
    """(arguments, settings) of a model in a folder, and native sizes: videos, an image, given frames, no caption."""
    generator = torch.Generator().manual_seed(len(name))
    patch, channels = config.data.patch, config.codec.channels

    def latents(*grid):
        return torch.randn(channels, *(n * p for n, p in zip(grid, patch, strict=True)), generator=generator)

    def text(words):
        if config.text.name == "bytes":
            return "A red çircle, averyveryverylongword 圆 " * words
        return torch.randn(words, TEXT_DIM, generator=generator)

    video, image = latents(4, 3, 5), latents(1, 4, 2)
    _, frames, height, width = video.shape
    _, image_frames, image_height, image_width = image.shape
    own = (8 * height, 8 * width, 1 + 4 * (frames - 1), 12.0)
    return [
        (((video, 0.7, text(3)), {"fps": 12.0}), own),
        (((video, torch.tensor([0.0, 0.9, 0.2, 1.0]), text(1)), {"fps": 12.0}), own),
        (((video, 1.0, None), {"fps": 12.0}), own),
        (((video, 0.5, text(2)), {"fps": 24.0, "size": (31, 43), "frames": 11}), (31, 43, 11, 24.0)),
        (((image, 0.3, text(2)), {}), (8 * image_height, 8 * image_width, 1 + 4 * (image_frames - 1), 0.0)),
    ]


def relative_error(value, expected):
    return float((value - expected).abs().max() / expected.abs().max())


def test_each_dialect_equals_the_model_of_megasora(tmp_path):
    models, clips = {}, {}
    for name, overrides in DIALECTS.items():
        config, model = models[name] = build(overrides)
        export_megasora(save(config, model, tmp_path / "runs" / name), tmp_path / name)
        clips[name] = clips_of(name, config)
    torch.save({name: [c for c, _ in found] for name, found in clips.items()}, tmp_path / "inputs.pt")
    run(RUN, tmp_path / "default", tmp_path / "inputs.pt", tmp_path / "outputs.pt")
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    for name, (config, model) in models.items():
        for output, (((latents, t, text), _), native) in zip(outputs[name], clips[name], strict=True):
            expected = velocity(config, model, latents, t, text, native)
            assert output.shape == latents.shape == expected.shape
            assert relative_error(output, expected) < 1e-5, name
        first, second = outputs[name][:2]
        assert relative_error(first, second) > 1e-2  # the comparison is of outputs that differ


@pytest.mark.parametrize("dialect", ["default", "wan"])
def test_bfloat16_is_close(dialect, tmp_path):
    config, model = build(DIALECTS[dialect])
    export_megasora(save(config, model, tmp_path / "run"), tmp_path / "out", torch.bfloat16)
    loaded = standalone.load_model(tmp_path / "out", torch.bfloat16)
    (((latents, t, text), settings), native), *_ = clips_of(dialect, config)
    with torch.no_grad():
        output = loaded(latents, t, text, **settings)
    assert output.dtype == torch.float32 and loaded.patch_in.weight.dtype == torch.bfloat16
    assert relative_error(output, velocity(config, model, latents, t, text, native)) < 0.1


def test_each_setting_of_the_file_reaches_the_output(tmp_path):
    """A model with another setting gives another velocity, so that the equality above tests the setting."""
    config, model = build(DIALECTS["other"])
    export_megasora(save(config, model, tmp_path / "run"), tmp_path / "out")
    loaded = standalone.load_model(tmp_path / "out")
    (((latents, t, text), settings), native), *_ = clips_of("other", config)
    with torch.no_grad():
        expected = loaded(latents, t, text, **settings)
        for key, value in (("rope_base", 10_000.0), ("rope_ntk_factor", [1, 1, 1])):
            before = loaded.config["model"][key]
            loaded.config["model"][key] = value
            assert relative_error(loaded(latents, t, text, **settings), expected) > 1e-4, key
            loaded.config["model"][key] = before
        for changed in ({"fps": 13.0}, {"fps": 12.0, "size": (8, 8)}, {"fps": 12.0, "frames": 2}):
            assert relative_error(loaded(latents, t, text, **changed), expected) > 1e-4
        assert relative_error(loaded(latents, t + 1e-2, text, **settings), expected) > 1e-4
        assert torch.equal(loaded(latents, t, text.upper(), **settings), expected)
        with pytest.raises(ValueError, match="no multiples of a patch"):
            standalone.patchify(latents, (1, 2, 1))


def test_the_file_imports_nothing_but_torch_and_safetensors():
    source = Path(standalone.__file__).read_text(encoding="utf-8")
    assert "megasora." not in source and len(source.splitlines()) < 400
    code = f"import runpy; print(sorted(runpy.run_path({standalone.__file__!r})))"
    assert "load_model" in run(code)


def test_weights_that_do_not_fit_raise(tmp_path):
    from safetensors.torch import load_file, save_file

    config, model = build([])
    out = tmp_path / "out"
    export_megasora(save(config, model, tmp_path / "run"), out)
    weights = load_file(out / "model.safetensors")
    for change, words in (
        ({"null_text": torch.ones(3)}, r"null_text \[3\] is no weight"),
        ({"other": torch.ones(3)}, r"other \[3\] is no weight"),
    ):
        save_file({**weights, **change}, out / "model.safetensors")
        with pytest.raises(ValueError, match=words):
            standalone.load_model(out)
    del weights["null_text"]
    save_file(weights, out / "model.safetensors")
    with pytest.raises(ValueError, match="lacks weights, e.g. null_text"):
        standalone.load_model(out)
    (out / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(ValueError, match="describes no model of MegaSora"):
        standalone.load_model(out)

"""A codec folder: what is written is what is read, and everything else is an error of one line with a remedy."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasora.codec import build_codec, codec_fingerprint, resolve_codec
from megasora.codec.vae import weights
from megasora.codec.vae.folder import find_codec_folder, read_manifest, vae_fingerprint
from megasora.codec.vae.weights import load_network, save_codec
from megasora.config import CodecConfig, VAEConfig
from megasora.errors import MegaSoraError
from megasora.testing.codecs import SETTINGS, random_network, write_random_codec

STATE = random_network().state_dict()


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codecs") / "codec"
    write_random_codec(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy, which a test may change."""
    return Path(shutil.copytree(original, tmp_path / "codec"))


def save(folder: Path, state=STATE, mean=(0.0,) * 4, std=(1.0,) * 4, psnr: float | None = 20.0, step: int = 7):
    return save_codec(folder, VAEConfig(**SETTINGS), [2, 4, 4], 4, state, list(mean), list(std), step, psnr)


def error_of(path: Path, **settings) -> str:
    """The message of loading a codec; it is one line."""
    with pytest.raises(MegaSoraError) as error_info:
        build_codec(CodecConfig(name="vae", path=str(path), **settings))
    assert "\n" not in str(error_info.value) and error_info.value.exit_code == 2
    return str(error_info.value)


def change_json(folder: Path, **values) -> None:
    path = folder / "codec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "codec.safetensors")
    change(tensors)
    save_file(tensors, folder / "codec.safetensors")


# ---------------------------------------------------------------- written and read


def test_what_is_read_is_what_was_saved(original):
    manifest = read_manifest(original)
    assert (manifest.factors, manifest.channels, manifest.step, manifest.psnr) == ([2, 4, 4], 4, 100, 20.0)
    assert manifest.vae == VAEConfig(**SETTINGS) and manifest.std == [0.5, 0.75, 1.0, 1.25]
    loaded = load_network(original, manifest).state_dict()
    assert loaded.keys() == STATE.keys() and all(torch.equal(loaded[name], STATE[name]) for name in STATE)


def test_hashes_are_over_name_type_shape_and_bytes_of_the_encoder_and_of_the_decoder(original):
    tensors, manifest = load_file(original / "codec.safetensors"), read_manifest(original)
    for prefixes, stored in (
        (("encoder.", "quantizer."), manifest.encoder_sha256),
        (("decoder.",), manifest.decoder_sha256),
    ):
        text = b""
        for name in sorted(name for name in tensors if name.startswith(prefixes)):
            text += json.dumps([name, "F32", list(tensors[name].shape)]).encode() + bytes(tensors[name].numpy().data)
        assert hashlib.sha256(text).hexdigest() == stored


def test_a_run_folder_stands_for_its_codec_folder(original):
    assert find_codec_folder(original) == find_codec_folder(original.parent) == original


def test_an_older_codec_is_replaced_and_nothing_else(tmp_path):
    save(tmp_path / "codec", step=1)
    save(tmp_path / "codec", step=2)
    assert read_manifest(tmp_path / "codec").step == 2
    (tmp_path / "codec" / "thesis.tex").write_text("mine")
    with pytest.raises(MegaSoraError, match=r"codec exists and holds no codec"):
        save(tmp_path / "codec", step=3)
    assert read_manifest(tmp_path / "codec").step == 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["codec", "codec.json", "codec.safetensors", "thesis.tex"]


@pytest.mark.parametrize("failing", ["writing", "renaming the old one", "renaming the new one"])
def test_a_save_that_fails_leaves_the_older_codec(failing, tmp_path, monkeypatch):
    rename = os.replace

    def fail(*paths):
        if failing != "renaming the new one" or paths[0].name == ".codec.part":
            raise OSError(28, "No space left on device")
        rename(*paths)

    save(tmp_path / "codec", step=1)
    owner, name = (weights, "save_file") if failing == "writing" else (os, "replace")
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "codec", step=2)
    monkeypatch.undo()
    assert read_manifest(tmp_path / "codec").step == 1 and [p.name for p in tmp_path.iterdir()] == ["codec"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    bad = {**STATE, "decoder.conv_in.bias": torch.full_like(STATE["decoder.conv_in.bias"], torch.nan)}
    with pytest.raises(MegaSoraError, match=r"step 7.*decoder\.conv_in\.bias has 16 values that are not finite"):
        save(tmp_path / "codec", bad)
    assert not list(tmp_path.iterdir())


def test_a_channel_that_is_constant_is_divided_by_one(tmp_path):
    assert save(tmp_path / "codec", std=(0.0, 2.0, 1.0, 1.0)).std == [1.0, 2.0, 1.0, 1.0]
    assert read_manifest(tmp_path / "codec").std == [1.0, 2.0, 1.0, 1.0]


# ---------------------------------------------------------------- fingerprint and shape


def test_the_fingerprint_is_that_of_the_latents(tmp_path):
    """Whatever changes a latent changes it; the decoder, the step and the PSNR do not."""

    def fingerprint(name: str, state=STATE, **values) -> str:
        return vae_fingerprint(save(tmp_path / name, state, **values), CodecConfig())

    first = fingerprint("a")
    decoder = {**STATE, "decoder.conv_in.bias": STATE["decoder.conv_in.bias"] + 1}
    assert fingerprint("b", decoder, psnr=None, step=9) == first
    encoder = {**STATE, "encoder.conv_in.bias": STATE["encoder.conv_in.bias"] + 1e-6}
    others = [fingerprint("c", encoder), fingerprint("d", mean=(0, 0, 0, 1)), fingerprint("e", std=(1, 1, 1, 2))]
    manifest = read_manifest(tmp_path / "a")
    for tile, overlap in (([0, 0], 64), ([256, 512], 64), ([512, 512], 32)):
        others.append(vae_fingerprint(manifest, CodecConfig(tile=tile, tile_overlap=overlap)))
    assert len({first, *others}) == len(others) + 1 and all(text.startswith("vae-2x4x4-4-") for text in others)
    for key, value, same in (("decoder_width", 16, True), ("codebook_decay", 0.5, True), ("fsq_levels", [3], False)):
        vae = dataclasses.replace(manifest.vae, **{key: value})
        other = dataclasses.replace(manifest, vae=vae).encoder_fingerprint
        assert (other == manifest.encoder_fingerprint) == same, key
    config = CodecConfig(name="vae", path=str(tmp_path / "a"), chunk_frames=3)
    assert codec_fingerprint(config) == build_codec(config).fingerprint == first


def test_factors_and_channels_are_those_of_the_codec(original):
    config = CodecConfig(name="vae", path=str(original))
    resolved = resolve_codec(config)
    assert (resolved.factors, resolved.channels) == ([2, 4, 4], 4) and config.channels == CodecConfig().channels
    assert resolve_codec(resolved) == resolved
    for settings, words in (
        ({"channels": 16}, "codec.channels=16, but"),
        ({"factors": [1, 4, 4]}, "codec.factors=[1, 4, 4], but"),
    ):
        message = error_of(original, **settings)
        assert words in message and str(original) in message and "leave" in message


def test_a_codec_without_weights_stays_as_it_is_and_needs_a_path_only_to_be_built():
    config = CodecConfig(name="vae", channels=16)
    assert resolve_codec(config) is config
    with pytest.raises(MegaSoraError, match=r"codec\.name=vae needs codec\.path"):
        build_codec(config)
    with pytest.raises(MegaSoraError, match=r"codec\.path=runs/vae is set, but codec\.name=dct has no weights"):
        resolve_codec(CodecConfig(path="runs/vae"))


def test_a_codec_is_resolved_and_its_fingerprint_known_without_torch(original):
    code = (
        "import sys; from megasora.codec import *; from megasora.config import CodecConfig\n"
        f"config = resolve_codec(CodecConfig(name='vae', path={str(original)!r})); print(codec_fingerprint(config))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("vae-2x4x4-4-"), done.stderr


# ---------------------------------------------------------------- what cannot be loaded


@pytest.mark.parametrize(
    ("files", "name", "words"),
    [
        ({}, "nowhere", "nowhere does not exist; give the run folder"),
        ({"x.txt": ""}, "x.txt", "is a file; give the run folder"),
        ({"c/codec.json": "", "c/codec.safetensors": ""}, "c/codec.json", "is a file of a codec; give its folder"),
        ({"c/codec.safetensors": ""}, "c", "has codec.safetensors but no codec.json"),
        ({"c/notes.txt": ""}, "c", "has no codec.json; give the run folder"),
        ({"r/config.yaml": "", "r/run.json": '{"task": "codec"}'}, "r", "train it to its end, or make the codec"),
        ({"r/config.yaml": "", "r/run.json": '{"task": "codec"}'}, "r", "megasora codec export"),
        ({"r/config.yaml": "", "r/run.json": "{}"}, "r", "is a run of megasora.train, which trains a DiT, not a codec"),
        ({"r/config.yaml": "", "r/run.json": "[1"}, "r", "is a run of megasora.train"),
        ({"r/config.yaml": "", "r/checkpoints/step-00000001/manifest.json": ""}, "r/checkpoints/step-00000001",
         "is a checkpoint of a run of megasora.train"),
        ({"r/codec/codec.json": "", "r/checkpoints/step-00000001/manifest.json": ""}, "r/checkpoints/step-00000001",
         "is a checkpoint of a codec run; give the run, "),
        ({"w/config.json": "{}"}, "w", "set the codec.name of a pretrained one"),
        ({"w/vae/config.json": "{}"}, "w", "set the codec.name of a pretrained one"),
    ],
)  # fmt: skip
def test_a_path_that_is_no_codec_is_an_error_that_says_what_it_is(files, name, words, tmp_path):
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    message = error_of(tmp_path / name)
    assert message.startswith(f"codec.path={tmp_path / name} ") and words in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"format": 2}, "has format 2, name 'vae'; this version reads format 1"),
        ({"name": "dct"}, "name 'dct'"),
        ({"wings": 2}, "unknown keys wings"),
        ({"channels": "4"}, "factors must be three whole numbers, channels one"),
        ({"factors": [2, 4]}, "factors must be three whole numbers"),
        ({"factors": [3, 4, 4]}, "codec.factors[0]=3 must be one of 1, 2, 4, 8"),
        ({"channels": 5}, "mean must be 5 finite numbers"),
        ({"std": [1, 0, 1, 1]}, "std[1]=0 must be above 0"),
        ({"mean": [0, float("nan"), 0, 0]}, "mean must be 4 finite numbers"),
        ({"mean": [0, "1", 0, 0]}, "mean must be 4 finite numbers"),
        ({"mean": [0, 10**400, 0, 0]}, "mean must be 4 finite numbers"),
        ({"std": [1, 1, 1e39, 1]}, "std must be 4 finite numbers"),
        ({"std": [1, 1e-60, 1, 1]}, "std[1]=1e-60 must be above 0"),
        ({"encoder_sha256": "../etc"}, "encoder_sha256 is no SHA-256"),
        ({"step": 1.5}, "step must be a whole number"),
        ({"vae": {**SETTINGS, "kind": "gan"}}, "vae.kind=gan must be one of"),
        ({"vae": {**SETTINGS, "width": "wide"}}, "vae: "),
        ({"vae": {**SETTINGS, "wings": 2}}, "unknown keys vae.wings"),
        ({"vae": {**SETTINGS, "width": 1 << 30}}, "vae.width=1073741824 must be at least 4 and at most 4096"),
        ({"vae": {**SETTINGS, "multipliers": [1] * 9}}, "must have one entry per stage"),
        ({"vae": 3}, "vae: "),
    ],
)  # fmt: skip
def test_a_codec_json_with_other_values_is_an_error(values, words, folder):
    change_json(folder, **values)
    message = error_of(folder)
    assert message.startswith(f"{folder / 'codec.json'} ") and words in message
    assert "restore it, or make the codec again" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("[" * 100_000, "nested too deeply"),
        (" " * ((1 << 20) + 1), "more than 1048576 bytes"),
        ("[]", "has format None"),
        ('{"format": 1, "name": "vae"}', "has no 'factors'"),
        ("\udcff", "cannot be read"),
    ],
    ids=["empty", "nested", "huge", "list", "missing", "no-utf8"],
)
def test_a_codec_json_that_is_none_is_an_error(text, words, folder):
    (folder / "codec.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert words in error_of(folder)


def test_weights_of_another_codec_are_an_error(folder, tmp_path):
    other = tmp_path / "other"
    write_random_codec(other, seed=1)
    shutil.copy(other / "codec.safetensors", folder)
    assert "codec.safetensors is damaged or of another codec: its encoder_sha256 is " in error_of(folder)
    write_random_codec(tmp_path / "wide", width=16)
    shutil.copy(tmp_path / "wide" / "codec.safetensors", folder)
    assert (
        "encoder.conv_in.weight is F32 [16, 3, 3, 3, 3], the network of codec.json has F32 [8, 3, 3, 3, 3]"
        in error_of(folder)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["decoder.conv_in.bias"].view(-1)[3:4].add_(1e-7), "its decoder_sha256 is "),
        (lambda t: t.pop("encoder.conv_in.bias"), "1 are missing (encoder.conv_in.bias)"),
        (lambda t: t.update({f"blocks.{i}": torch.ones(1) for i in range(4)}),
         "4 are unknown (blocks.0, blocks.1 and 2 more)"),
        (lambda t: t.update({"encoder.conv_in.bias": t["encoder.conv_in.bias"].half()}), "is F16 [8]"),
    ],
)  # fmt: skip
def test_weights_that_were_changed_are_an_error(change, words, folder):
    change_weights(folder, change)
    message = error_of(folder)
    assert words in message and "restore both files of one codec" in message


def test_weights_that_are_not_finite_are_an_error_even_with_their_own_hash(folder):
    change_weights(folder, lambda t: t["encoder.conv_in.bias"].fill_(torch.inf))
    tensors = load_file(folder / "codec.safetensors")
    change_json(folder, encoder_sha256=weights.tensor_hash(tensors, weights.ENCODER))
    assert "encoder.conv_in.bias has 8 values that are not finite" in error_of(folder)


@pytest.mark.parametrize("damage", ["missing", "cut", "text"])
def test_a_file_of_weights_that_is_none_is_an_error(damage, folder):
    path = folder / "codec.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"junk")
    assert ("has no weights, codec.safetensors" if damage == "missing" else "cannot be read: ") in error_of(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is no error")
def test_a_gpu_that_is_not_there_is_an_error(original):
    assert "codec.device=cuda, but PyTorch sees no GPU" in error_of(original, device="cuda")


def test_an_overlap_larger_than_a_tile_is_an_error(original):
    assert "codec.tile_overlap=64 must be less than codec.tile=[32, 32]" in error_of(original, tile=[32, 32])

"""`megasora codec eval|encode|decode|export`, and the commands that use a codec folder, as a person types them."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megasora.checks import check_data
from megasora.cli import main
from megasora.codec import build_codec
from megasora.codec.metrics import flicker, ssim
from megasora.codec.vae.folder import read_manifest
from megasora.config import CodecConfig, IngestConfig, load
from megasora.data.clip_reader import read_clip
from megasora.data.clip_writer import write_image, write_video
from megasora.data.manifest_writer import write_manifest
from megasora.data.pack import Record
from megasora.data.patches import frames_to_float, frames_to_uint8, pad_frames, patchify
from megasora.data.shard_format import MANIFEST
from megasora.data.shard_writer import BlockWriter
from megasora.errors import MegaSoraError
from megasora.testing.codecs import write_random_codec

SIZES = {"train/a.mp4": (9, 16, 24), "train/b.mp4": (6, 24, 16), "train/c.png": (1, 13, 21), "val/d.mp4": (5, 32, 32)}


def moving(frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [F, H, W, 3]: a bright square that moves over a ramp."""
    ramp = np.linspace(30, 160, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None] + [0, 10, 20]
    video = np.broadcast_to(ramp, (frames, height, width, 3)).round().astype(np.uint8).copy()
    for t in range(frames):
        video[t, t : t + 6, 2 * t : 2 * t + 6] = (240, 60, 40)
    return video


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A codec; read only."""
    folder = tmp_path_factory.mktemp("codecs") / "codec"
    write_random_codec(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Videos and an image of odd size; read only."""
    root = tmp_path_factory.mktemp("clips")
    for name, size in SIZES.items():
        (root / name).parent.mkdir(exist_ok=True)
        frames = moving(*size)
        if name.endswith(".png"):
            write_image(frames[0], root / name)
        else:
            write_video(frames, 12, root / name)
        (root / name).with_suffix(".txt").write_text("a square")
    return root


def run(*arguments: object) -> int:
    return main(["codec", *map(str, arguments)])


def error_of(capsys, *arguments: object) -> str:
    """The one line that a command prints that ends with exit code 2."""
    capsys.readouterr()
    assert run(*arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("megasora: error: ") and shown.count("\n") == 1
    return shown


def pixels_of(path: Path) -> torch.Tensor:
    """[F, 3, H, W] in [-1, 1]"""
    return frames_to_float(torch.from_numpy(read_clip(path, IngestConfig()).frames_FHWC))


# ---------------------------------------------------------------- eval


def reconstruct(codec, frames: torch.Tensor) -> torch.Tensor:
    """By the codec, the whole clip at once, padded and cut to its size."""
    decoded = codec.decode(codec.encode(pad_frames(frames, codec.factors[1:])))
    return decoded[: len(frames), :, : frames.shape[2], : frames.shape[3]].clamp(-1, 1)


@pytest.mark.parametrize("name", ["vae", "dct"])
def test_figures_are_those_of_whole_clips_and_the_totals_their_means(name, folder, source, tmp_path, capsys):
    chosen = [folder, "codec.chunk_frames=4"] if name == "vae" else ["dct", "codec.channels=16"]
    assert run("eval", source, "--codec", *chosen, "--out", tmp_path / "eval", "--split", "all") == 0
    values = json.loads((tmp_path / "eval" / "eval.json").read_text())
    path, channels = (str(folder), 4) if name == "vae" else ("", 16)
    codec = build_codec(CodecConfig(name=name, path=path, channels=channels))
    assert values["codec"] == codec.fingerprint and values["settings"]["channels"] == channels
    errors, changes, similarities, psnrs, latents = [], [], [], [], []
    assert [clip["clip"] for clip in values["clips"]] == list(SIZES)
    for clip in values["clips"]:
        frames = pixels_of(source / clip["clip"])
        decoded = reconstruct(codec, frames)
        squared = (decoded - frames).square().mean((1, 2, 3))
        psnr = (10 * torch.log10(4 / squared)).mean().item()
        assert clip["psnr"] == pytest.approx(psnr, abs=1e-3)
        assert (clip["frames"], clip["height"], clip["width"]) == SIZES[clip["clip"]]
        assert clip["ssim"] == pytest.approx(ssim(decoded, frames).mean().item(), abs=1e-4)
        change = flicker(decoded, frames)
        assert clip["flicker"] == pytest.approx(change.mean().item() if len(change) else 0, abs=1e-4)
        z = codec.encode(pad_frames(frames, codec.factors[1:]))
        assert clip["latents_per_pixel_value"] == pytest.approx(z.numel() / frames.numel())
        errors, psnrs = [*errors, squared], [*psnrs, psnr]
        changes, similarities = [*changes, change], [*similarities, ssim(decoded, frames)]
        latents.append(z.flatten(1))
    total, z = values["total"], torch.cat(latents, 1)
    assert total["psnr"] == pytest.approx(np.mean(psnrs), abs=1e-3) and total["clips"] == 4 and total["frames"] == 21
    mean_error = torch.cat(errors).mean()
    assert total["psnr_of_mean_error"] == pytest.approx(10 * torch.log10(4 / mean_error).item(), abs=1e-3)
    assert total["ssim"] == pytest.approx(torch.cat(similarities).mean().item(), abs=1e-4)
    assert total["flicker"] == pytest.approx(torch.cat(changes).mean().item(), abs=1e-4)
    np.testing.assert_allclose(total["latent_mean"], z.mean(1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(total["latent_std"], z.std(1, correction=0), rtol=0, atol=1e-5)
    count = sum(int(np.prod(size)) * 3 for size in SIZES.values())
    assert total["latents_per_pixel_value"] == pytest.approx(z.numel() / count)
    speed = total["encode_cpu_seconds"] * total["encode_frames_per_cpu_second"]
    assert speed == pytest.approx(21) and total["decode_cpu_seconds"] > 0
    shown = capsys.readouterr().out
    assert f"{total['psnr']:.2f}" in shown and "4 clips of split all" in shown and codec.fingerprint in shown


def test_the_sheet_has_three_rows_per_clip(folder, source, tmp_path):
    assert run("eval", source, "--codec", folder, "--out", tmp_path, "--split", "val") == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    tile, gap, text = 32 * 4, 4, 14
    assert sheet.shape == (3 * (text + tile + gap), gap + 5 * (tile + gap), 3)
    original = moving(5, 32, 32)[2].repeat(4, 0).repeat(4, 1)
    left = gap + 2 * (tile + gap)
    shown = [sheet[row * (text + tile + gap) + text :][:tile, left : left + tile].astype(int) for row in range(3)]
    assert np.abs(shown[0] - original).max() < 40  # H.264
    assert np.array_equal(shown[2], (np.abs(shown[0] - shown[1]) * 4).clip(0, 255))


def test_the_held_out_clips_are_evaluated_by_default_and_some_of_them_if_asked(folder, source, tmp_path):
    def names(*arguments: object) -> list[str]:
        assert run("eval", *arguments, "--codec", folder, "--out", tmp_path) == 0
        return [clip["clip"] for clip in json.loads((tmp_path / "eval.json").read_text())["clips"]]

    assert names(source) == ["val/d.mp4"] and names(source / "train") == ["a.mp4", "b.mp4", "c.png"]
    assert names(source, "--split", "train", "--clips", 2) == ["train/a.mp4", "train/c.png"]
    assert names(source, "--split", "all", "--clips", 99) == list(SIZES)


def test_clips_that_cannot_be_read_are_named_and_skipped(folder, source, tmp_path, capsys):
    clips = Path(shutil.copytree(source / "train", tmp_path / "clips"))
    (clips / "a.mp4").write_bytes(b"")
    (clips / "b.mp4").write_bytes((clips / "b.mp4").read_bytes()[:-400])
    assert run("eval", clips, "--codec", folder, "--out", tmp_path / "eval") == 0
    shown = capsys.readouterr().out
    assert "skipped" in shown and "a.mp4 has 0 bytes" in shown and "1 clips of split all, 2 skipped" in shown
    values = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert [skipped["clip"] for skipped in values["skipped"]] == ["a.mp4", "b.mp4"]
    (clips / "c.png").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    message = error_of(capsys, "eval", clips, "--codec", folder, "--out", tmp_path / "new")
    assert "none of 3 clips" in message and "a.mp4 has 0 bytes" in message
    assert sorted(tmp_path.rglob("*")) == before


def test_long_clips_are_measured_with_few_frames_in_memory(folder, tmp_path, monkeypatch):
    from megasora.commands import codec_measure

    held, most = [], [0]

    class Counted(codec_measure.deque):
        def append(self, frame):
            held.append(super().append(frame))
            most[0] = max(most[0], len(self))

    monkeypatch.setattr(codec_measure, "deque", Counted)
    write_video(moving(61, 16, 16), 12, tmp_path / "long.mp4")
    (tmp_path / "long.txt").write_text("a square")
    assert run("eval", tmp_path, "--codec", folder, "--out", tmp_path / "eval", "codec.chunk_frames=4") == 0
    assert len(held) == 61 and most[0] <= 9


# ---------------------------------------------------------------- encode and decode


@pytest.mark.parametrize("name", SIZES)
def test_encoding_and_decoding_a_file_is_that_of_its_frames(name, folder, source, tmp_path):
    z, suffix = tmp_path / "z.safetensors", Path(name).suffix
    back = tmp_path / f"back{suffix}"
    assert run("encode", source / name, "--codec", folder, "--out", z) == 0
    codec, frames = build_codec(CodecConfig(name="vae", path=str(folder))), pixels_of(source / name)
    latents = codec.encode(pad_frames(frames, (4, 4)))
    torch.testing.assert_close(load_file(z)["latents"], latents, rtol=0, atol=1e-5)
    with safe_open(z, "pt") as file:
        metadata = file.metadata()
    assert metadata["codec"] == codec.fingerprint
    size = tuple(int(metadata[key]) for key in ("frames", "height", "width"))
    assert size == SIZES[name] and float(metadata["fps"]) == (12 if size[0] > 1 else 0)
    assert run("decode", z, "--codec", folder, "--out", back) == 0
    decoded = read_clip(back, IngestConfig())
    expected = frames_to_uint8(reconstruct(codec, frames)).numpy()
    if suffix == ".mp4":  # what H.264 makes of these frames
        write_video(expected, 12, tmp_path / "expected.mp4")
        expected = read_clip(tmp_path / "expected.mp4", IngestConfig()).frames_FHWC
    assert decoded.frames_FHWC.shape == expected.shape and decoded.fps == float(metadata["fps"])
    assert np.abs(decoded.frames_FHWC.astype(int) - expected).mean() < 0.1  # rounding


@pytest.mark.parametrize("size", [(3, 13, 21), (2, 1, 1)])
def test_a_video_of_odd_sides_is_padded_for_h264_and_says_so(size, folder, tmp_path, capsys):
    clip, z, back = (tmp_path / name for name in ("in.gif", "z.safetensors", "back.mp4"))
    images = [Image.fromarray(np.full((*size[1:], 3), 60 * t, np.uint8)) for t in range(size[0])]
    images[0].save(clip, save_all=True, append_images=images[1:], duration=100, loop=0)
    lossless = ["--codec", "dct", "codec.channels=768"]
    assert run("encode", clip, *lossless, "--out", z) == 0
    assert run("decode", z, *lossless, "--out", back) == 0
    height, width = size[1] + 1, size[2] + 1
    assert f"padded to {height}x{width}: H.264 has even sides" in capsys.readouterr().out
    with av.open(str(back)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == size[0] and frames[0].shape == (height, width, 3)
    assert [abs(int(f.mean()) - 60 * t) < 8 for t, f in enumerate(frames)] == [True] * size[0]


def test_an_image_of_one_pixel_comes_back(folder, tmp_path):
    write_image(np.full((1, 1, 3), 77, np.uint8), tmp_path / "in.png")
    z, back = tmp_path / "z.safetensors", tmp_path / "back.png"
    assert run("encode", tmp_path / "in.png", "--codec", "dct", "--out", z) == 0
    assert run("decode", z, "--codec", "dct", "--out", back) == 0
    assert np.abs(np.asarray(Image.open(back)).astype(int) - 77).max() <= 1
    assert run("encode", tmp_path / "in.png", "--codec", folder, "--out", tmp_path / "y.safetensors") == 0
    assert load_file(tmp_path / "y.safetensors")["latents"].shape == (4, 1, 1, 1)


def test_a_decoder_that_was_trained_further_and_other_tiles_decode_the_same_latents(folder, source, tmp_path, capsys):
    z, finetuned = tmp_path / "z.safetensors", tmp_path / "finetuned"
    assert run("encode", source / "train/c.png", "--codec", folder, "--out", z, "codec.tile=[0,0]") == 0
    tensors = load_file(folder / "codec.safetensors")
    tensors["decoder.conv_out.bias"] += 0.5
    manifest = read_manifest(folder)
    from megasora.codec.vae.weights import save_codec

    m = manifest
    save_codec(finetuned, m.vae, m.factors, m.channels, tensors, m.mean, m.std, 200, None)
    for codec, name in ((folder, "a.png"), (finetuned, "b.png")):
        assert run("decode", z, "--codec", codec, "--out", tmp_path / name) == 0
    first, second = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a.png", "b.png"))
    assert (second >= first).all() and (second > first).any()
    write_random_codec(tmp_path / "other", seed=1)
    message = error_of(capsys, "decode", z, "--codec", tmp_path / "other", "--out", tmp_path / "c.png")
    assert f"was encoded with {manifest.encoder_fingerprint}, --codec is vae-" in message


@pytest.fixture(scope="module")
def latents(folder, source, tmp_path_factory) -> Path:
    """Of a video; read only."""
    path = tmp_path_factory.mktemp("latents") / "z.safetensors"
    assert run("encode", source / "train/a.mp4", "--codec", folder, "--out", path) == 0
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents_format": "2"}, "is no file of latents (format 1)"),
        ({"height": "-4"}, "is no size of a clip"),
        ({"height": "tall"}, "is damaged"),
        ({"frames": "99999999999"}, "is no size of a clip"),
        ({"frames": "13"}, "make [4, 7, 4, 6]"),
        ({"width": "64"}, "make [4, 5, 4, 16]"),
        ({"fps": "nan"}, "is no size of a clip"),
        ({"fps": "0"}, "is no size of a clip"),
        ({"codec": "x" * 5000 + "\x1b"}, "was encoded with xxx"),
    ],
)
def test_a_file_of_latents_with_other_values_is_an_error(changes, words, folder, latents, tmp_path, capsys):
    with safe_open(latents, "pt") as file:
        metadata = file.metadata()
    bad = tmp_path / "bad.safetensors"
    save_file(load_file(latents), bad, {**metadata, **changes})
    message = error_of(capsys, "decode", bad, "--codec", folder, "--out", tmp_path / "back.mp4")
    assert words in message and str(bad) in message and len(message) < 700 and "\x1b" not in message
    assert [p.name for p in tmp_path.iterdir()] == ["bad.safetensors"]


def test_latents_that_are_damaged_or_not_finite_are_an_error(folder, latents, tmp_path, capsys):
    bad, out = tmp_path / "bad.safetensors", tmp_path / "back.mp4"
    with safe_open(latents, "pt") as file:
        metadata = file.metadata()
    values = load_file(latents)["latents"]
    values[0, 0, 0, 0] = torch.nan
    save_file({"latents": values}, bad, metadata)
    assert "has 1 latents that are not finite" in error_of(capsys, "decode", bad, "--codec", folder, "--out", out)
    save_file({"latents": values.half()}, bad, metadata)
    assert "F16" in error_of(capsys, "decode", bad, "--codec", folder, "--out", out)
    save_file({"other": values}, bad, metadata)
    assert "is damaged" in error_of(capsys, "decode", bad, "--codec", folder, "--out", out)
    bad.write_bytes(latents.read_bytes()[:-8])
    assert "is damaged" in error_of(capsys, "decode", bad, "--codec", folder, "--out", out)
    words = error_of(capsys, "decode", folder / "codec.safetensors", "--codec", folder, "--out", out)
    assert "is no file of latents" in words
    assert "is no file; make one" in error_of(capsys, "decode", tmp_path / "no", "--codec", folder, "--out", out)
    assert not out.exists()


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "{source}", "--codec", "{codec}", "--out", "{tmp}/e", "--clips", "0"], "--clips 0 must be at least"),
        (["eval", "{source}/val", "--codec", "{codec}", "--out", "{tmp}/e", "--split", "val"], "no clip of --split"),
        (["eval", "{tmp}/no", "--codec", "{codec}", "--out", "{tmp}/e"], "is not a folder; give the folder"),
        (["eval", "{source}", "--codec", "{tmp}/no", "--out", "{tmp}/e"], "codec.path={tmp}/no does not exist"),
        (["eval", "{source}", "--codec", "{codec}", "--out", "{source}/val/d.txt"], "is not a folder; choose another"),
        (["eval", "{source}", "--codec", "{codec}", "--out", "{tmp}/e", "run.steps=3"], "only codec.* and ingest.*"),
        (["eval", "{source}", "--codec", "{codec}", "--out", "{tmp}/e", "codec.path=x"], "give the path as --codec"),
        (["eval", "{source}", "--codec", "{codec}", "--out", "{tmp}/e", "codec.channels=16"], "codec.channels=16, but"),
        (["eval", "{source}", "--codec", "{codec}", "--out", "{tmp}/e", "codec.name=wam"], "did you mean wan"),
        (["encode", "{source}/train/a.mp4", "--codec", "dct", "--out", "{tmp}/z"], "must end in .safetensors"),
        (["encode", "{source}/train/a.txt", "--codec", "dct", "--out", "{tmp}/z.safetensors"], "a.txt is not a clip"),
        (["encode", "{tmp}/no.mp4", "--codec", "dct", "--out", "{tmp}/z.safetensors"], "no.mp4 does not exist"),
        (["decode", "{z}", "--codec", "{codec}", "--out", "{tmp}/back.gif"], "must end in .mp4, or .png"),
        (["decode", "{z}", "--codec", "{codec}", "--out", "{tmp}/back.png"], "an image is .png, a video .mp4"),
        (["decode", "{z}", "--codec", "{codec}", "--out", "{tmp}/no/back.mp4"], "there is no folder"),
        (["export", "{source}"], "is not a run folder: it has no config.yaml"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_an_error_and_leave_nothing(
    arguments, words, folder, source, latents, tmp_path, capsys
):
    places = {"source": source, "codec": folder, "tmp": tmp_path, "z": latents}
    arguments = [text.format(**places) for text in arguments]
    assert words.format(**places) in error_of(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def export_module(folder: Path, calls: list) -> ModuleType:
    """A stand-in for megasora.tasks.codec_export, which writes a copy of `folder`."""

    def export_codec(run_dir, config, device, heartbeat):
        heartbeat("measuring the latents")
        calls.append((run_dir, config.run.seed, device.type))
        return Path(shutil.copytree(folder, run_dir / "codec"))

    module = ModuleType("megasora.tasks.codec_export")
    module.export_codec = export_codec
    return module


def test_export_makes_the_codec_of_a_codec_run_and_a_copy(folder, source, tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "megasora.tasks.codec_export", export_module(folder, calls))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("run: {seed: 5}\ncodec: {device: cpu}\n")
    (run_dir / "run.json").write_text('{"task": "dit"}')
    assert "it trains no codec" in error_of(capsys, "export", run_dir)
    (run_dir / "run.json").write_text('{"task": "codec"}')
    eval_arguments = ["eval", source, "--codec", run_dir, "--out", tmp_path / "eval"]
    assert f"megasora codec export {run_dir}" in error_of(capsys, *eval_arguments)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.txt").write_text("x")
    assert "holds no codec" in error_of(capsys, "export", run_dir, "--out", tmp_path / "mine")
    assert not calls
    assert run("export", run_dir, "--out", tmp_path / "copy") == 0
    assert calls == [(run_dir, 5, "cpu")] and f"codec in {tmp_path / 'copy'}" in capsys.readouterr().out
    assert read_manifest(tmp_path / "copy") == read_manifest(run_dir / "codec") == read_manifest(folder)
    assert run(*eval_arguments) == 0


# ---------------------------------------------------------------- shards of a learned codec


@pytest.fixture
def shards(folder, tmp_path) -> Path:
    """One clip, encoded with a copy of the codec at TMP/codec."""
    config = CodecConfig(
        name="vae", path=str(shutil.copytree(folder, tmp_path / "codec")), factors=[2, 4, 4], channels=4
    )
    codec, out, frames = build_codec(config), tmp_path / "shards", moving(5, 16, 16)
    patches, grid = patchify(codec.encode(frames_to_float(torch.from_numpy(frames))), (1, 1, 1))
    with BlockWriter(out, 0, 1 << 20) as writer:
        record = Record(0, patches, grid, torch.zeros(1, 1), (16.0, 16.0, 5.0, 12.0), "a square")
        writer.add("train", record, {"source": "a.mp4", "sha256": "0" * 64})
        writer.commit({}, {})
    write_manifest(out, codec.fingerprint, "bytes-16", [1, 1, 1], 1, asdict(config))
    return out


def test_shards_of_a_learned_codec_are_verified_and_shown_with_it(shards, tmp_path, capsys):
    assert main(["shards", str(shards), "--verify"]) == 0
    assert main(["shards", str(shards), "--show", "0", str(tmp_path / "clip.png")]) == 0
    shutil.rmtree(tmp_path / "codec")
    capsys.readouterr()
    assert main(["shards", str(shards), "--verify"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("not compared with its codec, vae-2x4x4-4-") and last.endswith("no faults")
    assert main(["shards", str(shards), "--show", "0", str(tmp_path / "again.png")]) == 2
    shown = capsys.readouterr().err
    assert "the codec of these shards, vae-2x4x4-4-" in shown and f"{tmp_path / 'codec'} does not exist" in shown
    write_random_codec(tmp_path / "codec", seed=1)  # trained again since
    assert main(["shards", str(shards), "--verify"]) == 2
    assert "says codec vae-2x4x4-4-" in capsys.readouterr().out


def test_shards_of_one_codec_given_to_a_run_of_another_are_an_error(shards, tmp_path):
    def check(*settings: str) -> str:
        with pytest.raises(MegaSoraError) as error_info:
            check_data(load(None, [f"data.shards={shards}", *settings]))
        return str(error_info.value)

    own = ["codec.name=vae", f"codec.path={tmp_path / 'codec'}", "codec.factors=[2,4,4]", "codec.channels=4"]
    remedy = f"use those of the shards: codec.name=vae codec.path={tmp_path / 'codec'} codec.tile=[512,512] "
    message = check()
    assert "was made with codec vae-2x4x4-4-" in message and "this run has dct-4x8x8-48" in message
    assert remedy + "codec.tile_overlap=64" in message
    assert remedy in check(*own, "codec.tile=[0,0]")
    check_data(load(None, [f"data.shards={shards}", *own, "codec.chunk_frames=2", "codec.device=cpu"]))
    write_random_codec(tmp_path / "other", seed=1)
    assert "this run has vae-2x4x4-4-" in check(own[0], f"codec.path={tmp_path / 'other'}", *own[2:])
    values = json.loads((shards / MANIFEST).read_text())
    del values["codec_settings"]
    (shards / MANIFEST).write_text(json.dumps(values))
    assert check().endswith("or use those of the shards")


def test_a_run_is_not_sampled_with_another_codec_than_it_was_trained_with(folder, tmp_path):
    from megasora.sampling.run_to_sample import check_codec

    manifest = read_manifest(folder)
    config = load(None, ["codec.name=vae", f"codec.path={folder}", "codec.factors=[2,4,4]", "codec.channels=4"])
    check_codec(tmp_path, config, manifest.encoder_fingerprint)  # a run of another version says no codec
    (tmp_path / "run.json").write_text(json.dumps({"codec": f"{manifest.encoder_fingerprint}-tile512x512-64"}))
    check_codec(tmp_path, config, manifest.encoder_fingerprint)
    with pytest.raises(
        MegaSoraError, match=rf"trained on latents of vae-.*, codec\.path={folder} is now vae-2x4x4-4-0;"
    ):
        check_codec(tmp_path, config, "vae-2x4x4-4-0")

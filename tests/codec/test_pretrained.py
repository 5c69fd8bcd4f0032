"""Autoencoders of diffusers as codecs: tiny ones with random weights, made here and compared with diffusers itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megasora.codec import build_codec, codec_fingerprint, resolve_codec
from megasora.codec.pretrained_folder import pretrained_shape
from megasora.codec.pretrained_table import FAMILIES
from megasora.config import CodecConfig
from megasora.config.validate import PRETRAINED_CODECS
from megasora.errors import MegaSoraError

diffusers = pytest.importorskip("diffusers", reason="pip install megasora[encoders]")

WAN = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.1, -0.2, 0.3, 0.0]}
WAN |= {"latents_std": [0.5, 1.5, 2.0, 0.7]}
SD = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
SD |= {"block_out_channels": [4, 8], "norm_num_groups": 2, "sample_size": 32}
MODELS = {  # codec.name, its configuration, factors, channels
    "wan 2.1": ("wan", {**WAN, "dim_mult": [1, 2, 2, 2]}, [4, 8, 8], 4),
    "wan 2.2": (
        "wan",
        {
            **WAN, "dim_mult": [1, 2, 2, 2], "is_residual": True, "patch_size": 2, "in_channels": 12,
            "out_channels": 12, "scale_factor_spatial": 16, "decoder_base_dim": 6,
        },
        [4, 16, 16], 4,
    ),
    "hunyuan": (
        "hunyuan",
        {
            "block_out_channels": [4, 4, 8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2,
            "scaling_factor": 0.476986,
        },
        [4, 8, 8], 4,
    ),
    "cogvideox": (
        "cogvideox",
        {
            "block_out_channels": [4, 4, 4, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2,
            "scaling_factor": 0.7,
        },
        [4, 8, 8], 4,
    ),
    "ltx": (
        "ltx",
        {
            "latent_channels": 8, "block_out_channels": [8, 8, 8, 8], "decoder_block_out_channels": [8, 8, 8, 8],
            "layers_per_block": [1] * 5, "decoder_layers_per_block": [1] * 5,
        },
        [8, 32, 32], 8,
    ),
    "ltx 0.9.1": (
        "ltx",
        {
            "latent_channels": 8, "block_out_channels": [8, 8, 8, 8], "decoder_block_out_channels": [8, 8, 8],
            "layers_per_block": [1] * 5, "decoder_layers_per_block": [1] * 4, "timestep_conditioning": True,
            "decoder_spatio_temporal_scaling": [True] * 3, "decoder_inject_noise": [True, False, False, False],
            "upsample_residual": [True] * 3, "upsample_factor": [1] * 3,
        },
        [8, 32, 32], 8,
    ),
    "dc_ae": (
        "dc_ae",
        {
            "latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
            "decoder_block_types": ["ResBlock", "EfficientViTBlock"], "encoder_block_out_channels": [8, 8],
            "decoder_block_out_channels": [8, 8], "encoder_layers_per_block": [1, 1],
            "decoder_layers_per_block": [1, 1], "encoder_qkv_multiscales": [[], [5]],
            "decoder_qkv_multiscales": [[], [5]], "scaling_factor": 0.41407, "upsample_block_type": "interpolate",
            "downsample_block_type": "stride_conv",
        },
        [1, 2, 2], 4,
    ),
    "sd": ("sd", {**SD, "latent_channels": 4}, [1, 2, 2], 4),
    "flux": ("sd", {**SD, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}, [1, 2, 2], 16),
    "sdxl": (
        "sd",
        {**SD, "scaling_factor": 0.5, "latents_mean": [1.0, 0, -1, 2], "latents_std": [1, 2, 3, 4.0]},
        [1, 2, 2], 4,
    ),
}  # fmt: skip
each_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{model: (its folder, the module)}."""
    root, result = tmp_path_factory.mktemp("autoencoders"), {}
    for model, (name, values, _, _) in MODELS.items():
        torch.manual_seed(0)
        vae = getattr(diffusers, FAMILIES[name].class_name)(**values).eval().requires_grad_(False)
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for buffer in vae.buffers():  # LTX: latents_mean, latents_std
            buffer.copy_(torch.rand_like(buffer) + 0.5)
        vae.save_pretrained(root / model)
        result[model] = root / model, vae
    return result


@pytest.fixture(scope="module")
def codecs(saved):
    return {model: build_codec(settings(saved[model][0], MODELS[model][0])) for model in MODELS}


def settings(path: Path, name: str, **changes) -> CodecConfig:
    return CodecConfig(**{"name": name, "path": str(path), "device": "cpu", "tile": [0, 0], **changes})


def clip(frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(frames, 3, height, width, generator=generator) * 2 - 1


def size_of(model: str) -> tuple[int, int]:
    _, fh, fw = MODELS[model][2]
    return 2 * fh, 3 * fw


def copy_of(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to)


# ---------------------------------------------------------------- the same latents as the pipelines of diffusers


def pipeline_latents(model, vae, video_CTHW):
    """Latents as the pipeline of the family computes them from a video, written out from its source for each."""
    name, config = MODELS[model][0], vae.config
    if name == "dc_ae":  # SanaPipeline
        return vae.encode(video_CTHW.transpose(0, 1)).latent.transpose(0, 1) * config.scaling_factor
    if name == "sd":
        z = vae.encode(video_CTHW.transpose(0, 1)).latent_dist.mode()
        if model == "sdxl":  # StableDiffusionXLImg2ImgPipeline.prepare_latents
            mean, std = (torch.tensor(x).view(1, 4, 1, 1) for x in (config.latents_mean, config.latents_std))
            return ((z - mean) * config.scaling_factor / std).transpose(0, 1)
        if model == "flux":  # FluxImg2ImgPipeline._encode_vae_image
            return ((z - config.shift_factor) * config.scaling_factor).transpose(0, 1)
        return (z * 0.18215).transpose(0, 1)  # StableDiffusionImg2ImgPipeline
    z = vae.encode(video_CTHW[None]).latent_dist.mode()
    if name == "wan":  # WanImageToVideoPipeline.prepare_latents
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
        return ((z - mean) * std)[0]
    if name == "ltx":
        return diffusers.LTXPipeline._normalize_latents(z, vae.latents_mean, vae.latents_std, config.scaling_factor)[0]
    return (z * config.scaling_factor)[0]  # HunyuanVideoImageToVideoPipeline, CogVideoXVideoToVideoPipeline


@each_model
def test_latents_are_those_of_the_familys_pipeline(model, saved, codecs):
    codec, vae = codecs[model], saved[model][1]
    frames = clip(codec.num_frames(codec.latent_frames(10)), *size_of(model))
    expected = pipeline_latents(model, vae, frames.transpose(0, 1))
    latents = codec.encode(frames)
    assert latents.shape == expected.shape and expected.std() > 0.01
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    assert (latents - codec.encode(frames * 0.5)).abs().max() > 1e-3  # the comparison is sensitive to the pixels


@each_model
def test_decoded_frames_are_those_of_diffusers(model, saved, codecs):
    """Of latents without the normalisation, computed with the formula that the pipeline inverts it with."""
    codec, vae = codecs[model], saved[model][1]
    latents = torch.randn(codec.channels, codec.latent_frames(10), 2, 3, generator=torch.Generator().manual_seed(1))
    c = vae.config
    if MODELS[model][0] == "wan":
        z = latents * torch.tensor(c.latents_std).view(-1, 1, 1, 1) + torch.tensor(c.latents_mean).view(-1, 1, 1, 1)
    elif MODELS[model][0] == "ltx":
        z = diffusers.LTXPipeline._denormalize_latents(latents[None], vae.latents_mean, vae.latents_std, 1.0)[0]
    elif model == "sdxl":
        mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (c.latents_mean, c.latents_std))
        z = latents * std / c.scaling_factor + mean
    else:
        z = latents / c.scaling_factor + (c.get("shift_factor") or 0)
    if codec.family.is_video:
        torch.manual_seed(0)  # of the noise that the decoder of LTX 0.9.1 adds
        extra = (torch.zeros(1),) if c.get("timestep_conditioning") else ()
        expected = vae.decode(z[None], *extra).sample[0].transpose(0, 1)
    else:
        expected = vae.decode(z.transpose(0, 1)).sample
    torch.manual_seed(5)
    before = torch.get_rng_state()
    frames = codec.decode(latents)
    assert frames.shape == (codec.num_frames(latents.shape[1]), 3, *size_of(model))
    torch.testing.assert_close(frames, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(before, torch.get_rng_state())


@each_model
@pytest.mark.parametrize("frames", [1, 2, 9, 14])
def test_the_last_frame_is_repeated_to_a_whole_clip(model, frames, codecs):
    codec, video = codecs[model], clip(frames, *size_of(model))
    count = codec.latent_frames(frames)
    latents = codec.encode(video)
    assert latents.shape == (codec.channels, count, 2, 3)
    whole = codec.num_frames(count)
    assert frames <= whole < frames + codec.factors[0] * codec.family.latents_per_group
    padded = torch.cat((video, video[-1:].expand(whole - frames, -1, -1, -1)))
    assert torch.equal(codec.encode(padded), latents)
    assert codec.decode(latents).shape == padded.shape


@each_model
def test_frames_one_by_one_give_the_same_bits(model, codecs):
    codec, video = codecs[model], clip(10, *size_of(model))
    bytes_FHWC = ((video + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    latents = codec.encode(torch.from_numpy(bytes_FHWC).permute(0, 3, 1, 2).float() / 127.5 - 1)
    streamed = list(codec.encode_frames(iter(bytes_FHWC)))
    assert all(frame.dtype == np.float32 for frame in streamed)
    assert np.array_equal(np.stack(streamed), latents.permute(1, 2, 3, 0).numpy())
    decoded = list(codec.decode_latents(iter(streamed)))
    assert np.array_equal(np.stack(decoded), codec.decode(latents).permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("model", ["wan 2.1", "wan 2.2", "sd"])
def test_a_stream_is_read_only_as_far_as_needed(model, codecs):
    """So memory does not grow with the length of the clip."""
    codec, read = codecs[model], []
    frames = (read.append(i) or frame for i, frame in enumerate(clip(60, *size_of(model)).permute(0, 2, 3, 1).numpy()))
    stream = codec.encode_frames(frames)
    next(stream), next(stream)
    assert len(read) == (5 if codec.family.is_video else 16)  # codec.chunk_frames images
    latents = (read.append(-1) or np.zeros((2, 3, codec.channels), np.float32) for _ in range(40))
    next(codec.decode_latents(latents))
    assert read.count(-1) <= 16


def test_the_batch_of_images_changes_no_latent(saved):
    video = clip(5, 4, 6)
    one, all_ = (
        build_codec(settings(saved["flux"][0], "sd", chunk_frames=n)).encode(video) for n in (1, 16)
    )  # fmt: skip
    torch.testing.assert_close(one, all_, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", ["wan 2.1", "hunyuan", "cogvideox", "ltx", "dc_ae", "sd"])
def test_frames_larger_than_a_tile_are_divided_by_diffusers(model, saved):
    """With its own tiles; frames no larger than a tile stay as they are."""
    folder, (name, _, factors, _) = saved[model][0], MODELS[model]
    side = factors[1]
    tiled = build_codec(settings(folder, name, tile=[4 * side, 4 * side], tile_overlap=2 * side))
    whole = build_codec(settings(folder, name))
    assert tiled.fingerprint == f"{whole.fingerprint}-tile{4 * side}x{4 * side}-{2 * side}"
    small, large = clip(9, 4 * side, 4 * side), clip(9, 6 * side, 5 * side)
    assert torch.equal(tiled.encode(small), whole.encode(small))
    latents, expected = tiled.encode(large), whole.encode(large)
    assert latents.shape == expected.shape and not torch.equal(latents, expected)
    corner = whole.encode(large[..., : 4 * side, : 4 * side])[..., :2, :2]  # of the first tile, not blended
    torch.testing.assert_close(latents[..., :2, :2], corner, rtol=1e-4, atol=1e-5)
    assert tiled.decode(latents).shape == whole.decode(latents).shape


# ---------------------------------------------------------------- shapes, files and fingerprints


def test_the_names_are_those_that_the_configuration_accepts():
    assert set(FAMILIES) == set(PRETRAINED_CODECS)


@each_model
def test_factors_and_channels_are_read_from_config_json(model, saved):
    folder, (name, _, factors, channels) = saved[model][0], MODELS[model]
    config = resolve_codec(settings(folder, name))
    assert (list(config.factors), config.channels) == (factors, channels)
    with pytest.raises(MegaSoraError, match=rf"codec.channels=7, .* has {channels}; leave codec.channels out"):
        resolve_codec(settings(folder, name, channels=7))


RELEASED = {  # name: config.json of a released model, as far as it decides the shape; factors, channels
    "Wan2.1": ("wan", {"base_dim": 96, "dim_mult": [1, 2, 4, 4], "z_dim": 16}, [4, 8, 8], 16),
    "Wan2.2-TI2V-5B": (
        "wan",
        {"z_dim": 48, "dim_mult": [1, 2, 4, 4], "patch_size": 2, "temperal_downsample": [False, True, True]},
        [4, 16, 16], 48,
    ),
    "HunyuanVideo": ("hunyuan", {"latent_channels": 16}, [4, 8, 8], 16),
    "CogVideoX-5b": ("cogvideox", {"latent_channels": 16, "temporal_compression_ratio": 4}, [4, 8, 8], 16),
    "LTX-Video": ("ltx", {"patch_size": 4, "spatio_temporal_scaling": [True, True, True, False]}, [8, 32, 32], 128),
    "LTX-Video-0.9.7": (
        "ltx",
        {"spatio_temporal_scaling": [True] * 4, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
        [8, 32, 32], 128,
    ),
    "dc-ae-f64c128": ("dc_ae", {"latent_channels": 128, "encoder_block_out_channels": [1] * 7}, [1, 64, 64], 128),
    "sdxl-vae": ("sd", {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4}, [1, 8, 8], 4),
    "FLUX.1": ("sd", {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16}, [1, 8, 8], 16),
}  # fmt: skip


@pytest.mark.parametrize("release", RELEASED)
def test_shapes_of_released_models(release, tmp_path):
    name, values, factors, channels = RELEASED[release]
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": FAMILIES[name].class_name, **values}))
    assert pretrained_shape(settings(tmp_path, name)) == (factors, channels)


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_of_the_table_are_those_of_the_class(name):
    from inspect import signature

    defaults = signature(getattr(diffusers, FAMILIES[name].class_name).__init__).parameters
    for key, value in FAMILIES[name].defaults.items():
        default = defaults[key].default
        assert value == (list(default) if isinstance(default, tuple) else 1 if default is None else default), key


def test_frames_per_clip_of_each_convention(codecs):
    frames = (1, 2, 5, 6, 9, 10, 17)
    counts = {
        model: [codecs[model].latent_frames(n) for n in frames] for model in ("wan 2.1", "cogvideox", "ltx", "sd")
    }
    assert counts["wan 2.1"] == [1, 2, 2, 3, 3, 4, 5]
    assert counts["cogvideox"] == [1, 3, 3, 3, 3, 5, 5]
    assert counts["ltx"] == [1, 2, 2, 2, 2, 3, 3]
    assert counts["sd"] == list(frames)
    assert [codecs["ltx"].num_frames(t) for t in (1, 2, 3)] == [1, 9, 17]


def test_the_folder_of_a_pipeline_and_a_variant_are_found(saved, codecs, tmp_path):
    folder, vae = saved["wan 2.1"]
    copy_of(folder, tmp_path / "pipeline" / "vae")
    vae.save_pretrained(tmp_path / "variant", variant="fp16")
    vae.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    video = clip(5, *size_of("wan 2.1"))
    for place in ("pipeline", "variant", "parts"):
        codec = build_codec(settings(tmp_path / place, "wan"))
        assert torch.equal(codec.encode(video), codecs["wan 2.1"].encode(video)), place
        assert (codec.fingerprint == codecs["wan 2.1"].fingerprint) is (place != "parts")


def test_a_fingerprint_changes_with_a_weight_and_with_the_normalisation(saved, tmp_path):
    folder, vae = saved["flux"]
    fingerprints = {codec_fingerprint(settings(folder, "sd"))}
    assert next(iter(fingerprints)).startswith("sd-1x2x2-16-")
    changed = copy_of(folder, tmp_path / "weight") / "diffusion_pytorch_model.safetensors"
    with open(changed, "r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(0.125).tobytes())
    values = json.loads((folder / "config.json").read_text())
    other = copy_of(folder, tmp_path / "shift")
    (other / "config.json").write_text(json.dumps({**values, "shift_factor": 0.2}))
    same = copy_of(folder, tmp_path / "same")
    (same / "config.json").write_text(json.dumps({**values, "_diffusers_version": "9", "_name_or_path": "x"}))
    assert codec_fingerprint(settings(same, "sd")) in fingerprints
    fingerprints |= {codec_fingerprint(settings(place, "sd")) for place in (tmp_path / "weight", other)}
    assert len(fingerprints) == 3


def test_the_shape_is_read_without_torch_and_the_fingerprint_without_diffusers(saved):
    folder = saved["wan 2.1"][0]
    code = (
        "import sys; from megasora.config import CodecConfig; from megasora.codec import resolve_codec, build_codec;"
        f"c = CodecConfig(name='wan', path={str(folder)!r}); resolve_codec(c); print('torch' in sys.modules);"
        "build_codec(c).fingerprint; print('diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("False\nFalse\n", 0), done.stderr


# ---------------------------------------------------------------- errors


def error_of(config: CodecConfig, is_loaded: bool = False) -> str:
    with pytest.raises(MegaSoraError) as error:
        codec = build_codec(config)
        if is_loaded:
            codec.encode(clip(1, 16, 16))
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_place_that_is_no_autoencoder_is_one_line_with_the_remedy(saved, tmp_path, monkeypatch):
    folder = saved["wan 2.1"][0]
    assert "there is no such folder; give" in error_of(settings(tmp_path / "nowhere", "wan"))
    assert "is a file; give" in error_of(settings(folder / "config.json", "wan"))
    assert "has no config.json; for codec.name=wan give" in error_of(settings(tmp_path, "wan"))
    (tmp_path / "config.yaml").touch()
    assert "is a run or a checkpoint of MegaSora, not an autoencoder" in error_of(settings(tmp_path, "wan"))
    (tmp_path / "codec.json").touch()
    assert "set codec.name=vae" in error_of(settings(tmp_path, "wan"))
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    message = error_of(settings(tmp_path, "wan"))
    assert "describes a WanTransformer3DModel; codec.name=wan reads AutoencoderKLWan: give the folder vae/" in message
    assert "set codec.name=wan" in error_of(settings(folder, "sd"))
    for text in ("{", "[]", '{"_class_name": "AutoencoderKLWan", "temperal_downsample": [true]}'):
        (tmp_path / "config.json").write_text(text)
        assert "download it again" in error_of(settings(tmp_path, "wan"))


def test_a_hub_name_that_cannot_be_reached_is_one_line(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the files in the cache\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = error_of(settings("no-such/autoencoder", "wan"))
    assert "codec.path=no-such/autoencoder is no folder here, and cannot be read from the hub" in message
    assert "cannot find the files in the cache); give" in message


def test_a_hub_name_reads_only_the_files_of_the_autoencoder(saved, tmp_path, monkeypatch):
    import huggingface_hub

    copy_of(saved["wan 2.1"][0], tmp_path / "vae")
    patterns = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, allow_patterns: patterns.append(allow_patterns) or tmp_path
    )
    build_codec(settings("some/pipeline", "wan"))
    assert patterns[-1] == ["vae/config.json", "vae/diffusion_pytorch_model*.safetensors*"]
    assert all(pattern.endswith("config.json") for pattern in patterns[0])


def test_missing_pickled_or_foreign_weights_are_named(saved, tmp_path):
    folder, weights = copy_of(saved["wan 2.1"][0], tmp_path / "a"), "diffusion_pytorch_model.safetensors"
    (folder / weights).rename(folder / "diffusion_pytorch_model.bin")
    assert "as a pickle only, which is not read" in error_of(settings(folder, "wan"))
    (folder / "diffusion_pytorch_model.bin").unlink()
    assert f"lacks {weights}; download the whole folder" in error_of(settings(folder, "wan"))
    saved["wan 2.1"][1].save_pretrained(folder, max_shard_size="20KB")
    part = sorted(folder.glob("*-of-*"))[1]
    part.unlink()
    assert f"lacks {part.name}" in error_of(settings(folder, "wan"))
    for path in folder.glob("diffusion*"):
        path.unlink()
    for variant in ("fp16", "bf16"):
        (folder / f"diffusion_pytorch_model.{variant}.safetensors").touch()
    assert "several variants, bf16, fp16, and none without" in error_of(settings(folder, "wan"))


def test_damaged_weights_and_those_of_another_model_are_named(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_of(saved["wan 2.1"][0], tmp_path / "a")
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "quant_conv.bias": torch.full((8,), torch.nan)}, weights)
    assert "quant_conv.bias are NaN or infinite" in error_of(settings(folder, "wan"), is_loaded=True)
    save_file({name: value for name, value in tensors.items() if name != "quant_conv.bias"}, weights)
    assert "missing keys of a AutoencoderKLWan: quant_conv.bias" in error_of(settings(folder, "wan"), is_loaded=True)
    values = json.loads((folder / "config.json").read_text())
    save_file(tensors, weights)
    (folder / "config.json").write_text(json.dumps({**values, "base_dim": 6}))
    assert "cannot be loaded as a AutoencoderKLWan" in error_of(settings(folder, "wan"), is_loaded=True)
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded as a AutoencoderKLWan" in error_of(settings(folder, "wan"), is_loaded=True)


def test_clips_and_tiles_that_do_not_fit_are_named(codecs, saved):
    with pytest.raises(MegaSoraError, match="frames of 12x24 pixels are not multiples of codec.factors=8x8"):
        codecs["wan 2.1"].encode(clip(1, 12, 24))
    with pytest.raises(MegaSoraError, match="a clip without frames"):
        list(codecs["wan 2.1"].encode_frames(iter(())))
    with pytest.raises(MegaSoraError, match="codec.name=cogvideox decodes 3 latent frames, not 2: 9 frames"):
        codecs["cogvideox"].decode(torch.zeros(4, 2, 2, 3))
    assert "must be multiples of the 32 pixels" in error_of(settings(saved["ltx"][0], "ltx", tile=[80, 64]))
    assert "tiles of codec.name=sd are square" in error_of(settings(saved["sd"][0], "sd", tile=[96, 0]))


def test_without_diffusers_the_error_names_what_to_install(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "codec.name=sd needs diffusers" in error_of(settings(saved["sd"][0], "sd"), is_loaded=True)

"""Reads what a Wan model on disk is: its sizes and its weight files.

FOLDER[/transformer]   config.json of diffusers or of the original release, one .safetensors file or several with an
                       index; the names of the files may have a variant, e.g. diffusion_pytorch_model.bf16.safetensors
FILE.safetensors       one file of any name; without config.json beside it, the sizes are those of its tensors

A file may be one of torch.save, .pth, .pt or .bin, instead of .safetensors; in a folder it is read if there is no
.safetensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.errors import MegaSoraError, printable
from megasora.formats.wan_files import find_weight_files, read_json, weight_files
from megasora.formats.wan_tensors import open_files

CLASS, ORIGINAL_CLASS = "WanTransformer3DModel", "WanModel"
EXPERTS = (("transformer", "transformer_2"), ("low_noise_model", "high_noise_model"))  # of Wan 2.2 A14B
SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "in_channels", "text_dim")
ORIGINAL_SIZES = ("num_layers", "num_heads", "dim", "ffn_dim", "in_dim", "out_dim")
ORIGINAL_TYPES = ("t2v", "ti2v")  # ti2v: an image is a clean latent frame, as here
ORIGINAL_DEFAULTS = {"text_dim": 4096, "patch_size": [1, 2, 2], "cross_attn_norm": True, "qk_norm": True}
HEAD_DIM = 128  # of all released models
# Settings for which VideoDiT has one choice only; these are also diffusers' defaults.
REQUIRED = {"qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "eps": 1e-6, "freq_dim": 256}
IMAGE_TO_VIDEO_KEYS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
# Wan was trained on umT5-XXL features, padded with zeros.
TEXT_SETTINGS = ("text.name=t5", "text.path=google/umt5-xxl", "text.max_tokens=512", "text.pad=true")


@dataclass(frozen=True)
class WanFolder:
    """A validated Wan model on disk: its weight files and its sizes."""

    files: tuple[Path, ...]
    depth: int
    heads: int
    width: int
    mlp_hidden: int
    channels: int
    text_dim: int
    patch: tuple[int, int, int]

    @property
    def patch_dim(self) -> int:
        """Features of a patch."""
        return self.channels * math.prod(self.patch)

    def settings(self) -> list[str]:
        """Configuration overrides `key=value` for a model that fits these weights."""
        return [
            f"model.width={self.width}",
            f"model.depth={self.depth}",
            f"model.heads={self.heads}",
            f"model.mlp_ratio={mlp_ratio(self.mlp_hidden, self.width)}",
            "model.modulation=shared",
            "model.conditioning=timestep",
            "model.qk_norm=across_heads",
            "model.text_depth=0",
            *TEXT_SETTINGS,
            f"data.patch=[{','.join(map(str, self.patch))}]",
            f"codec.channels={self.channels}",
        ]


def mlp_ratio(hidden: int, width: int) -> float:
    """The shortest decimal `r` with int(width * r) == hidden; see ModelConfig.mlp_hidden."""
    for digits in range(17):
        above = -(-hidden * 10**digits // width)
        for numerator in (above, above + 1):  # the second if the float nearest to the first is too small
            if int(width * (numerator / 10**digits)) == hidden:
                return numerator / 10**digits
    raise ValueError(f"no ratio gives {hidden} of {width}")


def read_wan(place: Path) -> WanFolder:
    """Reads config.json and the names of the weight files, but no weights.

    `place`: the folder of a pipeline, with `transformer/` in it, that of the transformer itself, or a file of weights.
    Raises MegaSoraError with the file, the key and its legal values for other models, image-to-video variants and
    pipelines of two experts.
    """
    folder = place.parent if place.is_file() else transformer_folder(place)
    file = folder / "config.json"
    if place.is_file() and not file.is_file():
        files, config = weight_files(place), read_sizes(place)
        file = place
    else:
        config = read_json(file)
        if config.get("_class_name") == ORIGINAL_CLASS:
            config = translate(file, config)
        check_config(file, config)
        files = weight_files(place) if place.is_file() else find_weight_files(folder)
    return WanFolder(
        files=files,
        depth=config["num_layers"],
        heads=config["num_attention_heads"],
        width=config["num_attention_heads"] * config["attention_head_dim"],
        mlp_hidden=config["ffn_dim"],
        channels=config["in_channels"],
        text_dim=config["text_dim"],
        patch=tuple(config["patch_size"]),
    )


def transformer_folder(folder: Path) -> Path:
    for experts in EXPERTS:
        if all((folder / name).is_dir() for name in experts):
            raise MegaSoraError(
                f"{folder} holds two models, {experts[0]} and {experts[1]}, one for high noise and one for low; "
                f"use one of them, e.g. {folder / experts[0]}"
            )
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def translate(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the original release as that of diffusers. Raises MegaSoraError for a size that is none."""
    for key in ORIGINAL_SIZES:
        check_size(file, config, key)
    values = ORIGINAL_DEFAULTS | config
    if values["dim"] % values["num_heads"]:
        raise MegaSoraError(f"{file}: num_heads={values['num_heads']} must divide dim={values['dim']}")
    if values.get("model_type") not in ORIGINAL_TYPES:
        raise image_to_video(file, f"model_type={values.get('model_type')}")
    return {
        "_class_name": CLASS,
        "num_layers": values["num_layers"],
        "num_attention_heads": values["num_heads"],
        "attention_head_dim": values["dim"] // values["num_heads"],
        "in_channels": values["in_dim"],
        "out_channels": values["out_dim"],
        "qk_norm": REQUIRED["qk_norm"] if values["qk_norm"] is True else values["qk_norm"],
        **{key: values[key] for key in ("ffn_dim", "text_dim", "patch_size", "cross_attn_norm")},
        **{key: values[key] for key in ("eps", "freq_dim") if key in values},
    }


def read_sizes(file: Path) -> dict[str, Any]:
    """Sizes as in config.json of diffusers, from the shapes of tensors. Raises MegaSoraError for other models."""
    tensors = open_files((file,))
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    try:
        width, channels, *patch = tensors["patch_embedding.weight"].shape
        ffn_dim = tensors["blocks.0.ffn.net.0.proj.weight"].shape[0]
        text_dim = tensors["condition_embedder.text_embedder.linear_1.weight"].shape[1]
        out = tensors["proj_out.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise MegaSoraError(f"{file} holds no weights of a Wan 2.x model ({error}); choose another file") from None
    config = {
        "_class_name": CLASS,
        "num_layers": len(blocks),
        "num_attention_heads": max(1, width // HEAD_DIM),
        "attention_head_dim": min(width, HEAD_DIM),
        "ffn_dim": ffn_dim,
        "in_channels": channels,
        "out_channels": out // (patch[0] * patch[1] * patch[2]) if len(patch) == 3 and all(patch) else 0,
        "text_dim": text_dim,
        "patch_size": patch,
    }
    check_config(file, config)
    return config


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Raises MegaSoraError unless `config`, the content of config.json, describes a model that can be imported."""
    if config.get("_class_name") != CLASS:
        raise MegaSoraError(
            f"{file} describes a {config.get('_class_name')}, not a {CLASS} or {ORIGINAL_CLASS}; use the folder of a "
            "Wan 2.x model"
        )
    for key in SIZES:
        check_size(file, config, key)
    for key, value in REQUIRED.items():
        if config.get(key, value) != value:
            raise MegaSoraError(f"{file}: {key}={config[key]} must be {value}: MegaSora supports no other")
    channels, out = config["in_channels"], config.get("out_channels") or config["in_channels"]
    conditioned = [f"{key}={config[key]}" for key in IMAGE_TO_VIDEO_KEYS if config.get(key) is not None]
    if out != channels:
        conditioned.append(f"in_channels={channels} for out_channels={out}")
    if conditioned:
        raise image_to_video(file, ", ".join(conditioned))
    patch = config.get("patch_size")
    if not (
        isinstance(patch, list | tuple) and len(patch) == 3 and patch[0] == 1 and all(type(p) is int for p in patch)
    ):
        raise MegaSoraError(f"{file}: patch_size={patch} must be three integers, the first of them 1")


def check_size(file: Path, config: dict[str, Any], key: str) -> None:
    if type(config.get(key)) is not int or not 1 <= config[key] < 1 << 31:
        raise MegaSoraError(f"{file}: {key}={printable(str(config.get(key)), 40)} must be a positive integer")


def image_to_video(file: Path, why: str) -> MegaSoraError:
    return MegaSoraError(
        f"{file} describes an image-to-video model ({why}), which cannot be imported; "
        "use a text-to-video model: MegaSora takes image prompts as clean latent frames"
    )

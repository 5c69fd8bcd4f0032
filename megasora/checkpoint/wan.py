"""Imports weights of Wan 2.x (arXiv 2503.20314), as saved by diffusers, into a VideoDiT with model.modulation=shared.

    FOLDER/transformer/config.json, *.safetensors --read_wan--> WanFolder --import_wan--> OUT.safetensors, fp32

Both models compute the same function: a VideoDiT tensor is a Wan tensor under another name, or Wan's q, k and v
concatenated, or a Wan tensor with the features of a token in another order. Modules that Wan lacks (native size, pooled
caption, first frame) end in zeros, so that they add exactly zero and can be trained.

Each tensor is read when it is written: memory holds one tensor, however large the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.checkpoint.safetensors_file import check_new_file, write_tensors
from megasora.errors import MegaSoraError

CLASS = "WanTransformer3DModel"
EXPERTS = ("transformer", "transformer_2")  # Wan 2.2 A14B: one for high noise, one for low noise
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "in_channels", "text_dim")
# Settings for which VideoDiT has one choice only; these are also diffusers' defaults.
REQUIRED = {"qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "eps": 1e-6, "freq_dim": 256}
IMAGE_TO_VIDEO_KEYS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
DTYPES = ("F32", "BF16", "F16")
# Wan was trained on umT5-XXL features, padded with zeros.
TEXT_SETTINGS = ("text.name=t5", "text.path=google/umt5-xxl", "text.max_tokens=512", "text.pad=true")
# Parameters of modules that Wan lacks: the last layer of each is zero, so that it adds nothing; the layers before it
# are initialised as in model/init.py.
ZERO_INIT = (
    "first_frame", "null_text", "native.mlp.2.weight", "native.mlp.2.bias", "pooled_text.1.weight",
    "pooled_text.1.bias",
)  # fmt: skip
DEFAULT_INIT = ("native.mlp.0.weight", "native.mlp.0.bias", "pooled_text.0.weight", "pooled_text.0.bias")
# Linear layers and norms with weight and bias: VideoDiT's name -> Wan's names, concatenated along dim 0.
MODEL_LAYERS = {
    "timestep.mlp.0": ("condition_embedder.time_embedder.linear_1",),
    "timestep.mlp.2": ("condition_embedder.time_embedder.linear_2",),
    "shared_modulation": ("condition_embedder.time_proj",),
    "text.up": ("condition_embedder.text_embedder.linear_1",),
    "text.down": ("condition_embedder.text_embedder.linear_2",),
}
BLOCK_LAYERS = {
    "attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.out": ("attn1.to_out.0",),
    "cross_norm": ("norm2",),
    "cross.q": ("attn2.to_q",),
    "cross.kv": ("attn2.to_k", "attn2.to_v"),
    "cross.out": ("attn2.to_out.0",),
    "mlp.up": ("ffn.net.0.proj",),
    "mlp.down": ("ffn.net.2",),
}
BLOCK_NORMS = {
    "attention.q_norm": "attn1.norm_q",
    "attention.k_norm": "attn1.norm_k",
    "cross.q_norm": "attn2.norm_q",
    "cross.k_norm": "attn2.norm_k",
}
MAX_LISTED_NAMES = 6


@dataclass(frozen=True)
class Source:
    """How to make a VideoDiT tensor: `make` of the Wan tensors with these names."""

    names: tuple[str, ...]
    make: Callable[..., Tensor]


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

    def settings(self) -> list[str]:
        """Configuration overrides `key=value` for a model that fits these weights."""
        return [
            f"model.width={self.width}",
            f"model.depth={self.depth}",
            f"model.heads={self.heads}",
            f"model.mlp_ratio={mlp_ratio(self.mlp_hidden, self.width)}",
            "model.modulation=shared",
            "model.qk_norm=across_heads",
            "model.text_depth=0",
            *TEXT_SETTINGS,
            f"data.patch=[{','.join(map(str, self.patch))}]",
            f"codec.channels={self.channels}",
        ]

    def sources(self) -> dict[str, Source]:
        """Sources by VideoDiT's name, for every weight that Wan has."""
        sources = {}
        layers = dict(MODEL_LAYERS)
        for i in range(self.depth):
            layers |= {
                f"blocks.{i}.{name}": tuple(f"blocks.{i}.{wan_name}" for wan_name in wan_names)
                for name, wan_names in BLOCK_LAYERS.items()
            }
            for name, wan_name in BLOCK_NORMS.items():
                sources[f"blocks.{i}.{name}.weight"] = Source((f"blocks.{i}.{wan_name}.weight",), concatenate)
            sources[f"blocks.{i}.modulation.table"] = Source((f"blocks.{i}.scale_shift_table",), drop_first_dim)
        for name, wan_names in layers.items():
            for kind in ("weight", "bias"):
                sources[f"{name}.{kind}"] = Source(tuple(f"{wan_name}.{kind}" for wan_name in wan_names), concatenate)
        sources["final_modulation.table"] = Source(("scale_shift_table",), drop_first_dim)
        sources["patch_in.weight"] = Source(("patch_embedding.weight",), flatten_conv)
        sources["patch_in.bias"] = Source(("patch_embedding.bias",), concatenate)
        for kind in ("weight", "bias"):
            sources[f"patch_out.{kind}"] = Source((f"proj_out.{kind}",), self.channels_first)
        return sources

    def channels_first(self, x: Tensor) -> Tensor:
        """Reorders a token's features along dim 0 from (pt, ph, pw, C) to (C, pt, ph, pw), as in data/patches.py."""
        return x.unflatten(0, (-1, self.channels)).transpose(0, 1).flatten(0, 1)


def concatenate(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def drop_first_dim(x: Tensor) -> Tensor:
    """A table [1, count, D] -> [count, D]."""
    return x.squeeze(0)


def flatten_conv(kernel: Tensor) -> Tensor:
    """A convolution with stride = kernel size [D, C, pt, ph, pw] as a linear layer on patches [D, C * pt * ph * pw]."""
    return kernel.flatten(1)


def mlp_ratio(hidden: int, width: int) -> float:
    """The shortest decimal `r` with int(width * r) == hidden; see ModelConfig.mlp_hidden."""
    for digits in range(17):
        above = -(-hidden * 10**digits // width)
        for numerator in (above, above + 1):  # the second if the float nearest to the first is too small
            if int(width * (numerator / 10**digits)) == hidden:
                return numerator / 10**digits
    raise ValueError(f"no ratio gives {hidden} of {width}")


def read_wan(folder: Path) -> WanFolder:
    """Reads config.json and the names of the weight files of a model that diffusers saved.

    `folder`: the folder of a pipeline, with `transformer/` in it, or of the transformer itself. Raises MegaSoraError
    with the file, the key and its legal values for other models, image-to-video variants and pipelines of two experts.
    """
    if all((folder / name).is_dir() for name in EXPERTS):
        raise MegaSoraError(
            f"{folder} holds two models, {EXPERTS[0]} for high noise and {EXPERTS[1]} for low; "
            f"use one of them, e.g. {folder / EXPERTS[0]}"
        )
    if (folder / EXPERTS[0]).is_dir():
        folder = folder / EXPERTS[0]
    file = folder / "config.json"
    config = read_json(file)
    check_config(file, config)
    return WanFolder(
        files=find_weight_files(folder),
        depth=config["num_layers"],
        heads=config["num_attention_heads"],
        width=config["num_attention_heads"] * config["attention_head_dim"],
        mlp_hidden=config["ffn_dim"],
        channels=config["in_channels"],
        text_dim=config["text_dim"],
        patch=tuple(config["patch_size"]),
    )


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Raises MegaSoraError unless `config`, the content of config.json, describes a model that can be imported."""
    if config.get("_class_name") != CLASS:
        raise MegaSoraError(
            f"{file} describes a {config.get('_class_name')}, not a {CLASS}; use the folder of a Wan 2.x model"
        )
    for key in SIZES:
        if type(config.get(key)) is not int or config[key] < 1:
            raise MegaSoraError(f"{file}: {key}={config.get(key)} must be a positive integer")
    for key, value in REQUIRED.items():
        if config.get(key, value) != value:
            raise MegaSoraError(f"{file}: {key}={config[key]} must be {value}: MegaSora supports no other")
    channels, out = config["in_channels"], config.get("out_channels") or config["in_channels"]
    conditioned = [f"{key}={config[key]}" for key in IMAGE_TO_VIDEO_KEYS if config.get(key) is not None]
    if out != channels:
        conditioned.append(f"in_channels={channels} for out_channels={out}")
    if conditioned:
        raise MegaSoraError(
            f"{file} describes an image-to-video model ({', '.join(conditioned)}), which cannot be imported; "
            "use a text-to-video model: MegaSora takes image prompts as clean latent frames"
        )
    patch = config.get("patch_size")
    if not (isinstance(patch, list) and len(patch) == 3 and patch[0] == 1 and all(type(p) is int for p in patch)):
        raise MegaSoraError(f"{file}: patch_size={patch} must be three integers, the first of them 1")


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that the index lists, or the single file if there is no index."""
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if not index.is_file():
        names = {WEIGHTS_FILE}
    else:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise MegaSoraError(f"{index} has no weight_map; download it again")
        names = {Path(str(name)).name for name in weight_map.values()}  # only in this folder
    files = tuple(folder / name for name in sorted(names))
    if missing := [file.name for file in files if not file.is_file()]:
        raise MegaSoraError(f"{folder} lacks {list_names(missing)}; download the whole folder")
    return files


def import_wan(
    wan: WanFolder,
    shapes: dict[str, torch.Size],
    initial_value: Callable[[str, torch.Size], Tensor],
    out: Path,
    on_written: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes the safetensors file `out` atomically, fp32.

    `shapes`: of all VideoDiT parameters. `initial_value`: see model/init.py. `on_written(bytes)` is called after each
    tensor. Before anything is written, raises MegaSoraError with the names of tensors if a Wan tensor would be unused,
    a parameter has no source, or shapes differ.
    """
    check_new_file(out)
    with ExitStack() as stack:
        wan_tensors = open_files(wan.files, stack)
        sources = wan.sources()
        check_sources(sources, shapes, wan_tensors)

        def value_of(name: str) -> Tensor:
            if name in sources:
                source = sources[name]
                return source.make(*(wan_tensors[wan_name].get_tensor(wan_name).float() for wan_name in source.names))
            return torch.zeros(shapes[name]) if name in ZERO_INIT else initial_value(name, shapes[name])

        write_tensors(out, shapes, value_of, {}, on_written)


def open_files(files: tuple[Path, ...], stack: ExitStack) -> dict[str, Any]:
    """The open file that holds each tensor, by tensor name; the files are closed with `stack`."""
    from safetensors import SafetensorError, safe_open

    file_of: dict[str, Any] = {}
    for path in files:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise MegaSoraError(f"{path} cannot be read: {error}; download it again") from None
        names = list(file.keys())
        if duplicates := sorted(file_of.keys() & set(names)):
            raise MegaSoraError(
                f"{path} repeats {list_names(duplicates)} of another file; download the whole folder again"
            )
        file_of |= dict.fromkeys(names, file)
    return file_of


def check_sources(sources: dict[str, Source], shapes: dict[str, torch.Size], wan_tensors: dict[str, Any]) -> None:
    """Raises MegaSoraError unless each Wan tensor is used, each parameter has a source, and dtypes and shapes fit."""
    used = {wan_name for source in sources.values() for wan_name in source.names}
    covered = sources.keys() | set(ZERO_INIT) | set(DEFAULT_INIT)
    problems = (
        ("the weight files lack", used - wan_tensors.keys()),
        ("MegaSora has no parameter for", wan_tensors.keys() - used),
        ("Wan has no weight for", shapes.keys() - covered),
        ("the model has no parameter", covered - shapes.keys()),
    )
    for problem, names in problems:
        if names:
            raise MegaSoraError(f"{problem} {list_names(sorted(names))}; is this a text-to-video model of Wan 2.x?")
    for name, source in sources.items():
        slices = [wan_tensors[wan_name].get_slice(wan_name) for wan_name in source.names]
        if dtypes := {s.get_dtype() for s in slices} - set(DTYPES):
            raise MegaSoraError(f"{source.names[0]} is {dtypes.pop()}; weights must be one of {', '.join(DTYPES)}")
        wan_shapes = [tuple(s.get_shape()) for s in slices]
        try:
            shape = source.make(*(torch.empty(size, device="meta") for size in wan_shapes)).shape
        except (RuntimeError, IndexError):
            shape = None
        if shape != shapes[name]:
            inputs = ", ".join(f"{wan_name} {list(s)}" for wan_name, s in zip(source.names, wan_shapes, strict=True))
            raise MegaSoraError(
                f"{inputs} cannot become {name} {list(shapes[name])}; config.json belongs to another model"
            )


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MegaSoraError(f"{file} cannot be read ({error}); use a folder that diffusers saved") from None
    if not isinstance(values, dict):
        raise MegaSoraError(f"{file} holds a {type(values).__name__}, not an object; download it again")
    return values


def list_names(names: list[str]) -> str:
    """The first names, comma-separated, and how many more there are."""
    more = len(names) - MAX_LISTED_NAMES
    return ", ".join(names[:MAX_LISTED_NAMES]) + (f" and {more} more" if more > 0 else "")

"""Weights of Wan 2.x (arXiv 2503.20314), as diffusers saves them, to weights of VideoDiT in its shared dialect.

    FOLDER/transformer/config.json, *.safetensors --read_wan--> WanFolder --import_wan--> OUT.safetensors, fp32

Both compute the same function, so a tensor of ours is one of theirs under another name, or q, k and v of theirs one
after the other, or theirs with a token's numbers in another order. What Wan does not have (native size, pooled caption,
mark of the first frame) ends in zeros: it adds exactly nothing, and training can make something of it.

Each tensor is read once, when its turn comes to be written: memory holds one tensor, however large the model.
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
EXPERTS = ("transformer", "transformer_2")  # Wan 2.2 A14B: for high and for low noise
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "in_channels", "text_dim")
# What our model does in one way only; these are also diffusers' defaults.
ASSUMED = {"qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "eps": 1e-6, "freq_dim": 256}
IMAGE_TO_VIDEO_KEYS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
DTYPES = ("F32", "BF16", "F16")
# Wan reads captions as umT5-XXL writes them, filled up with zeros.
TEXT = ("text.name=t5", "text.path=google/umt5-xxl", "text.max_tokens=512", "text.pad=true")
# What Wan does not have: the last layer of each is zero, so that it adds nothing; what lies before it starts as ever.
ZERO_INIT = (
    "first_frame", "null_text", "native.mlp.2.weight", "native.mlp.2.bias", "pooled_text.1.weight",
    "pooled_text.1.bias",
)  # fmt: skip
DEFAULT_INIT = ("native.mlp.0.weight", "native.mlp.0.bias", "pooled_text.0.weight", "pooled_text.0.bias")
# Linears and norms with weight and bias: ours -> theirs, one after the other along dim 0.
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
SHOWN_NAMES = 6


@dataclass(frozen=True)
class Source:
    """A tensor of ours: `make` of the tensors of theirs that have these names."""

    names: tuple[str, ...]
    make: Callable[..., Tensor]


@dataclass(frozen=True)
class WanFolder:
    """A checked model of Wan on disk: its files of weights and its sizes."""

    files: tuple[Path, ...]
    depth: int
    heads: int
    width: int
    mlp_hidden: int
    channels: int
    text_dim: int
    patch: tuple[int, int, int]

    def settings(self) -> list[str]:
        """`key=value` of the configuration whose model these weights fit."""
        return [
            f"model.width={self.width}",
            f"model.depth={self.depth}",
            f"model.heads={self.heads}",
            f"model.mlp_ratio={mlp_ratio(self.mlp_hidden, self.width)}",
            "model.modulation=shared",
            "model.qk_norm=across_heads",
            "model.text_depth=0",
            *TEXT,
            f"data.patch=[{','.join(map(str, self.patch))}]",
            f"codec.channels={self.channels}",
        ]

    def sources(self) -> dict[str, Source]:
        """Ours -> theirs, for every weight that Wan has."""
        found = {}
        layers = dict(MODEL_LAYERS)
        for i in range(self.depth):
            layers |= {
                f"blocks.{i}.{ours}": tuple(f"blocks.{i}.{name}" for name in theirs)
                for ours, theirs in BLOCK_LAYERS.items()
            }
            for ours, theirs in BLOCK_NORMS.items():
                found[f"blocks.{i}.{ours}.weight"] = Source((f"blocks.{i}.{theirs}.weight",), joined)
            found[f"blocks.{i}.modulation.table"] = Source((f"blocks.{i}.scale_shift_table",), first_of_one)
        for ours, theirs in layers.items():
            for kind in ("weight", "bias"):
                found[f"{ours}.{kind}"] = Source(tuple(f"{name}.{kind}" for name in theirs), joined)
        found["final_modulation.table"] = Source(("scale_shift_table",), first_of_one)
        found["patch_in.weight"] = Source(("patch_embedding.weight",), flat)
        found["patch_in.bias"] = Source(("patch_embedding.bias",), joined)
        for kind in ("weight", "bias"):
            found[f"patch_out.{kind}"] = Source((f"proj_out.{kind}",), self.channels_first)
        return found

    def channels_first(self, x: Tensor) -> Tensor:
        """The numbers of a token along dim 0, from (pt, ph, pw, C) to (C, pt, ph, pw), the order of data/patches.py."""
        return x.unflatten(0, (-1, self.channels)).transpose(0, 1).flatten(0, 1)


def joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def first_of_one(x: Tensor) -> Tensor:
    """A table [1, count, D] -> [count, D]."""
    return x.squeeze(0)


def flat(kernel: Tensor) -> Tensor:
    """A convolution whose stride is its kernel, [D, C, pt, ph, pw], is a linear map of patches, [D, C*pt*ph*pw]."""
    return kernel.flatten(1)


def mlp_ratio(hidden: int, width: int) -> float:
    """The shortest decimal `r` with int(width * r) == hidden, as the model computes it."""
    for digits in range(17):
        above = -(-hidden * 10**digits // width)
        for numerator in (above, above + 1):  # the second where the float nearest to the first is too small
            if int(width * (numerator / 10**digits)) == hidden:
                return numerator / 10**digits
    raise ValueError(f"no ratio gives {hidden} of {width}")


def read_wan(folder: Path) -> WanFolder:
    """A folder that diffusers saved: a pipeline's, with `transformer/` in it, or the transformer's own.

    Reads config.json and the names of the files of weights. Raises MegaSoraError that names the file, the key and what
    it must be: for other models, image-to-video variants, and a pipeline of two experts.
    """
    if all((folder / name).is_dir() for name in EXPERTS):
        raise MegaSoraError(
            f"{folder} holds two models, {EXPERTS[0]} for high noise and {EXPERTS[1]} for low; "
            f"give one of them, e.g. {folder / EXPERTS[0]}"
        )
    if (folder / EXPERTS[0]).is_dir():
        folder = folder / EXPERTS[0]
    file = folder / "config.json"
    config = read_json(file)
    if config.get("_class_name") != CLASS:
        raise MegaSoraError(f"{file} describes a {config.get('_class_name')}, not a {CLASS}; give a Wan 2.x folder")
    for key in SIZES:
        if type(config.get(key)) is not int or config[key] < 1:
            raise MegaSoraError(f"{file}: {key}={config.get(key)} must be a positive integer")
    for key, value in ASSUMED.items():
        if config.get(key, value) != value:
            raise MegaSoraError(f"{file}: {key}={config[key]} must be {value}: MegaSora has no other kind")
    channels, out = config["in_channels"], config.get("out_channels") or config["in_channels"]
    conditioned = [f"{key}={config[key]}" for key in IMAGE_TO_VIDEO_KEYS if config.get(key) is not None]
    if out != channels:
        conditioned.append(f"in_channels={channels} for out_channels={out}")
    if conditioned:
        raise MegaSoraError(
            f"{file} is of an image-to-video model ({', '.join(conditioned)}), which cannot be imported; "
            "give a text-to-video one: MegaSora takes image prompts as clean latent frames"
        )
    patch = config.get("patch_size")
    if not (isinstance(patch, list) and len(patch) == 3 and patch[0] == 1 and all(type(p) is int for p in patch)):
        raise MegaSoraError(f"{file}: patch_size={patch} must be three integers, the first of them 1")
    return WanFolder(
        files=find_files(folder),
        depth=config["num_layers"],
        heads=config["num_attention_heads"],
        width=config["num_attention_heads"] * config["attention_head_dim"],
        mlp_hidden=config["ffn_dim"],
        channels=channels,
        text_dim=config["text_dim"],
        patch=tuple(patch),
    )


def find_files(folder: Path) -> tuple[Path, ...]:
    """The files that the index names, or the only one."""
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        names = {WEIGHTS}
    else:
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise MegaSoraError(f"{index} has no weight_map; download it again")
        names = {Path(str(name)).name for name in places.values()}  # in this folder, whatever it says
    files = tuple(folder / name for name in sorted(names))
    if lost := [file.name for file in files if not file.is_file()]:
        raise MegaSoraError(f"{folder} lacks {some(lost)}; download the whole folder")
    return files


def import_wan(
    wan: WanFolder,
    shapes: dict[str, torch.Size],
    first_value: Callable[[str, torch.Size], Tensor],
    out: Path,
    on_written: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes `out`, which is there whole or not at all.

    `shapes`: of every weight of our model. `first_value`: what a weight is at step 0. `on_written` is told the bytes of each
    tensor. Before anything is written, every tensor of theirs has a use, every one of ours a source, and all shapes
    fit; else MegaSoraError names the tensors.
    """
    check_new_file(out)
    with ExitStack() as stack:
        theirs = open_all(wan.files, stack)
        sources = wan.sources()
        check(sources, shapes, theirs)

        def value_of(name: str) -> Tensor:
            if name in sources:
                return sources[name].make(*(theirs[part].get_tensor(part).float() for part in sources[name].names))
            return torch.zeros(shapes[name]) if name in ZERO_INIT else first_value(name, shapes[name])

        write_tensors(out, shapes, value_of, {}, on_written)


def open_all(files: tuple[Path, ...], stack: ExitStack) -> dict[str, Any]:
    """Name of a tensor -> the open file that holds it, closed with `stack`."""
    from safetensors import SafetensorError, safe_open

    theirs: dict[str, Any] = {}
    for file in files:
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
        except SafetensorError as error:
            raise MegaSoraError(f"{file} cannot be read: {error}; download it again") from None
        names = list(opened.keys())
        if twice := sorted(theirs.keys() & set(names)):
            raise MegaSoraError(f"{file} repeats {some(twice)} of another file; download the whole folder afresh")
        theirs |= dict.fromkeys(names, opened)
    return theirs


def check(sources: dict[str, Source], shapes: dict[str, torch.Size], theirs: dict[str, Any]) -> None:
    """Nothing is left over on either side, and every tensor gets the shape that the model gives it."""
    used = {name for source in sources.values() for name in source.names}
    given = sources.keys() | set(ZERO_INIT) | set(DEFAULT_INIT)
    problems = (
        ("the files of weights lack", used - theirs.keys()),
        ("MegaSora has no place for", theirs.keys() - used),
        ("nothing gives the model's", shapes.keys() - given),
        ("the model has no", given - shapes.keys()),
    )
    for words, names in problems:
        if names:
            raise MegaSoraError(f"{words} {some(sorted(names))}; is this a text-to-video model of Wan 2.x?")
    for name, source in sources.items():
        parts = [theirs[part].get_slice(part) for part in source.names]
        if kinds := {part.get_dtype() for part in parts} - set(DTYPES):
            raise MegaSoraError(f"{source.names[0]} is {kinds.pop()}; weights must be one of {', '.join(DTYPES)}")
        read = [tuple(part.get_shape()) for part in parts]
        try:
            shape = source.make(*(torch.empty(size, device="meta") for size in read)).shape
        except (RuntimeError, IndexError):
            shape = None
        if shape != shapes[name]:
            was = ", ".join(f"{part} {list(size)}" for part, size in zip(source.names, read, strict=True))
            raise MegaSoraError(f"{was} cannot become {name} {list(shapes[name])}; config.json is of another model")


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MegaSoraError(f"{file} cannot be read ({error}); give a folder that diffusers saved") from None
    if not isinstance(values, dict):
        raise MegaSoraError(f"{file} holds a {type(values).__name__}, not an object; download it again")
    return values


def some(names: list[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")

"""Imports weights of Wan 2.x (arXiv 2503.20314) into a VideoDiT with model.modulation=shared.

    FOLDER/transformer/config.json, *.safetensors --read_wan--> WanFolder --import_wan--> OUT.safetensors, fp32

The names are those of diffusers; wan_names.py translates others.

Both models compute the same function: a VideoDiT tensor is a Wan tensor under another name, or Wan's q, k and v
concatenated, or a Wan tensor with the features of a token in another order. Modules that Wan lacks (native size, pooled
caption, first frame) end in zeros, so that they add exactly zero and can be trained.

Each tensor is read when it is written: memory holds one tensor, however large the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megasora.checkpoint.safetensors_file import check_new_file, write_tensors
from megasora.formats.wan_folder import WanFolder
from megasora.formats.wan_tensors import DTYPES, WanTensor, list_names, open_files
from megasora.errors import MegaSoraError

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


@dataclass(frozen=True)
class Source:
    """How to make a VideoDiT tensor: `make` of the Wan tensors with these names."""

    names: tuple[str, ...]
    make: Callable[..., Tensor]


def build_sources(wan: WanFolder) -> dict[str, Source]:
    """Sources by VideoDiT's name, for every weight that Wan has."""
    sources = {}
    layers = dict(MODEL_LAYERS)
    for i in range(wan.depth):
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
        sources[f"patch_out.{kind}"] = Source((f"proj_out.{kind}",), partial(channels_first, channels=wan.channels))
    return sources


def channels_first(x: Tensor, channels: int) -> Tensor:
    """Reorders a token's features along dim 0 from (pt, ph, pw, C) to (C, pt, ph, pw), as in data/patches.py."""
    return x.unflatten(0, (-1, channels)).transpose(0, 1).flatten(0, 1)


def concatenate(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def drop_first_dim(x: Tensor) -> Tensor:
    """A table [1, count, D] -> [count, D]."""
    return x.squeeze(0)


def flatten_conv(kernel: Tensor) -> Tensor:
    """A convolution with stride = kernel size [D, C, pt, ph, pw] as a linear layer on patches [D, C * pt * ph * pw]."""
    return kernel.flatten(1)


def import_wan(
    wan: WanFolder,
    shapes: dict[str, torch.Size],
    initial_value: Callable[[str, torch.Size], Tensor],
    out: Path,
    on_written: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes the safetensors file `out` atomically, fp32; `on_written(bytes)` is called after each tensor.

    The other arguments and the errors are those of `open_weights`.
    """
    check_new_file(out)
    with open_weights(wan, shapes, initial_value) as value_of:
        write_tensors(out, shapes, value_of, {}, on_written)


@contextmanager
def open_weights(
    wan: WanFolder, shapes: dict[str, torch.Size], initial_value: Callable[[str, torch.Size], Tensor]
) -> Iterator[Callable[[str], Tensor]]:
    """A function from the name of a VideoDiT parameter to its value, fp32, read when it is called.

    `shapes`: of all VideoDiT parameters. `initial_value`: see model/init.py. Before a weight is read, raises
    MegaSoraError with the names of tensors if a Wan tensor would be unused, a parameter has no source, or shapes
    differ.
    """
    with ExitStack() as stack:
        wan_tensors = open_files(wan.files, stack)
        sources = build_sources(wan)
        check_sources(sources, shapes, wan_tensors)

        def value_of(name: str) -> Tensor:
            if name in sources:
                source = sources[name]
                return source.make(*(wan_tensors[wan_name].read() for wan_name in source.names))
            return torch.zeros(shapes[name]) if name in ZERO_INIT else initial_value(name, shapes[name])

        yield value_of


def check_sources(sources: dict[str, Source], shapes: dict[str, torch.Size], wan_tensors: dict[str, WanTensor]) -> None:
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
        tensors = [wan_tensors[wan_name] for wan_name in source.names]
        if dtypes := {tensor.dtype for tensor in tensors} - set(DTYPES):
            raise MegaSoraError(f"{source.names[0]} is {dtypes.pop()}; weights must be one of {', '.join(DTYPES)}")
        wan_shapes = [tensor.shape for tensor in tensors]
        try:
            shape = source.make(*(torch.empty(size, device="meta") for size in wan_shapes)).shape
        except (RuntimeError, IndexError):
            shape = None
        if shape != shapes[name]:
            inputs = ", ".join(f"{wan_name} {list(s)}" for wan_name, s in zip(source.names, wan_shapes, strict=True))
            raise MegaSoraError(
                f"{inputs} cannot become {name} {list(shapes[name])}; config.json belongs to another model"
            )

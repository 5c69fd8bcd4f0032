"""Imports weights of Wan 2.x (arXiv 2503.20314) into a VideoDiT of Wan's dialect, see `WanFolder.settings`.

    FOLDER/transformer/config.json, *.safetensors --read_wan--> WanFolder --import_wan--> OUT.safetensors, fp32

Both models have the same weights (wan_layers.py) and compute the same function. Each tensor is read when it is written:
memory holds one tensor, however large the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megasora.checkpoint.safetensors_file import check_new_file, write_tensors
from megasora.errors import MegaSoraError
from megasora.formats.wan_folder import WanFolder
from megasora.formats.wan_layers import WanLayer, build_layers
from megasora.formats.wan_tensors import DTYPES, WanTensor, list_names, open_files


def import_wan(
    wan: WanFolder,
    shapes: Mapping[str, torch.Size],
    out: Path,
    on_written: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes the safetensors file `out` atomically, fp32; `on_written(bytes)` is called after each tensor.

    The other arguments and the errors are those of `open_weights`.
    """
    check_new_file(out)
    write_tensors(out, shapes, open_weights(wan, shapes), {}, on_written)


def open_weights(wan: WanFolder, shapes: Mapping[str, torch.Size]) -> Callable[[str], Tensor]:
    """A function from the name of a VideoDiT parameter to its value, fp32, read when it is called.

    `shapes`: of all VideoDiT parameters. Before a weight is read, raises MegaSoraError with the names of tensors if a
    Wan tensor would be unused, a parameter is none of Wan's, or shapes differ.
    """
    wan_tensors = open_files(wan.files)
    layers = build_layers(wan.depth, wan.channels, wan.patch)
    check_layers(layers, shapes, wan_tensors)

    def value_of(name: str) -> Tensor:
        layer = layers[name]
        return layer.to_dit(*(wan_tensors[wan_name].read() for wan_name in layer.names))

    return value_of


def check_layers(
    layers: Mapping[str, WanLayer], shapes: Mapping[str, torch.Size], wan_tensors: Mapping[str, WanTensor]
) -> None:
    """Raises MegaSoraError unless each Wan tensor is used, each parameter has a source, and dtypes and shapes fit."""
    used = {wan_name for layer in layers.values() for wan_name in layer.names}
    problems = (
        ("the weight files lack", used - wan_tensors.keys()),
        ("MegaSora has no parameter for", wan_tensors.keys() - used),
        ("Wan has no weight for", shapes.keys() - layers.keys()),
        ("the model has no parameter", layers.keys() - shapes.keys()),
    )
    for problem, names in problems:
        if names:
            raise MegaSoraError(f"{problem} {list_names(sorted(names))}; is this a text-to-video model of Wan 2.x?")
    for name, layer in layers.items():
        tensors = [wan_tensors[wan_name] for wan_name in layer.names]
        if dtypes := {tensor.dtype for tensor in tensors} - set(DTYPES):
            raise MegaSoraError(f"{layer.names[0]} is {dtypes.pop()}; weights must be one of {', '.join(DTYPES)}")
        wan_shapes = [tensor.shape for tensor in tensors]
        try:
            values = layer.to_dit(*(torch.empty(size, device="meta") for size in wan_shapes))
            fits = values.shape == shapes[name] and [x.shape for x in layer.to_wan(values)] == wan_shapes
        except (RuntimeError, IndexError):
            fits = False
        if not fits:
            inputs = ", ".join(f"{wan_name} {list(s)}" for wan_name, s in zip(layer.names, wan_shapes, strict=True))
            raise MegaSoraError(
                f"{inputs} cannot become {name} {list(shapes[name])}; config.json belongs to another model"
            )

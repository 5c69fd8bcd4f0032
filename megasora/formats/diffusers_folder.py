"""Exports a run of Wan's dialect as the folder of a pipeline that diffusers loads, with nothing else in it.

    OUT/transformer/     config.json, diffusion_pytorch_model.safetensors, or parts of it and an index
    OUT/scheduler/, vae/, text_encoder/, tokenizer/, model_index.json    see diffusers_pipeline.py

    WanTransformer3DModel.from_pretrained(OUT, subfolder="transformer"), WanPipeline.from_pretrained(OUT)

Weights are renamed and divided (wan_layers.py), one VideoDiT tensor in memory at a time: fp32 weights are exported
exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.config import Config
from megasora.errors import MegaSoraError
from megasora.files import write_text_atomic
from megasora.formats.diffusers_pipeline import DIFFUSERS_VERSION, TRANSFORMER, write_pipeline
from megasora.formats.safetensors_folder import SHARD_BYTES, new_folder, write_parts
from megasora.formats.source import ExportSource
from megasora.formats.wan_folder import CLASS, REQUIRED
from megasora.formats.wan_layers import ADDED_TO_WAN, WanLayer, build_layers, parameter_shapes
from megasora.formats.wan_tensors import list_names

STEM = "diffusion_pytorch_model"
DIALECT = {  # what WanTransformer3DModel computes
    "model.modulation": "shared", "model.qk_norm": "across_heads", "model.text_depth": 0, "model.rope_base": 10_000.0,
    "model.rope_ntk_factor": [1.0, 1.0, 1.0],
}  # fmt: skip
MAX_POSITIONS = 1024  # of a rotary embedding, per axis; as released


def export_diffusers(
    source: ExportSource,
    out: Path,
    on_written: Callable[[int], None] = lambda size: None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    pipeline: str = "link",
) -> str:
    """Writes the new folder `out`, whole or not at all, and returns a sentence about what it has.

    `dtype`: of the weights, float32, bfloat16 or float16. `shard_bytes`: most bytes of a weight file. `pipeline`: link
    | copy | none, how the other parts of the pipeline are added. `on_written(bytes)` is called after each weight.
    Raises MegaSoraError with the settings or the weights that Wan has not.
    """
    check_dialect(source)
    shapes = check_weights(source)
    layers = build_layers(source.config.model.depth, source.config.codec.channels, tuple(source.config.data.patch))
    wan_shapes = shapes_in_wan(layers, shapes)
    value_of = values_in_wan(layers, lambda name: source.sharded.full_tensor(source.kind, name))
    with new_folder(out) as staging:
        folder = staging / TRANSFORMER
        folder.mkdir()
        config = transformer_config(source.config, shapes)
        write_text_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
        write_parts(folder, STEM, wan_shapes, value_of, dtype, shard_bytes, {}, on_written)
        alone = "the transformer alone" if pipeline == "none" else write_pipeline(source.config, staging, pipeline)
    if alone:
        return f"{out}: {alone}; diffusers.{CLASS}.from_pretrained('{out}', subfolder='{TRANSFORMER}') loads it"
    return f"{out}: diffusers.WanPipeline.from_pretrained('{out}') loads it"


def check_dialect(source: ExportSource) -> None:
    """Raises MegaSoraError unless the settings are those of a Wan model."""
    config = source.config
    values = {key: getattr(config.model, key.removeprefix("model.")) for key in DIALECT}
    wrong = [f"{key}={value}, not {DIALECT[key]}" for key, value in values.items() if value != DIALECT[key]]
    if config.text.name == "bytes":
        wrong.append("text.name=bytes, not t5")
    if config.data.patch[0] != 1:
        wrong.append(f"data.patch={config.data.patch}, not [1, ...]")
    if wrong:
        raise MegaSoraError(
            f"{source.folder} is of no Wan model, which alone becomes a {CLASS} of diffusers ({'; '.join(wrong)}); use "
            "--format megasora or safetensors"
        )


def check_weights(source: ExportSource) -> dict[str, torch.Size]:
    """The shapes of the weights that Wan has. Raises MegaSoraError if those of the checkpoint are not those of the
    settings, or weights that Wan lacks are not zero."""
    saved, config = source.sharded.shapes, source.config
    text_dim = saved["text.up.weight"][-1] if "text.up.weight" in saved else 1
    features = config.codec.channels * math.prod(config.data.patch)
    expected = parameter_shapes(config.model, features, text_dim)
    wrong = sorted(name for name in saved.keys() | expected.keys() if saved.get(name) != expected.get(name))
    if wrong:
        raise MegaSoraError(
            f"{source.folder}: {list_names(wrong)} are not those of the model.*, codec.* and data.patch settings of "
            "the run; restore its config.yaml"
        )
    added = [name for name in ADDED_TO_WAN if name in saved]
    trained = [name for name in added if source.sharded.full_tensor(source.kind, name).any()]
    if trained:
        raise MegaSoraError(
            f"{source.folder}: Wan has no {list_names(trained)}, which are not zero here (model.conditioning=full); "
            f"train without them, e.g. from here: run.start=init:{source.folder} model.conditioning=timestep, or use "
            "--format megasora or safetensors"
        )
    names = build_layers(config.model.depth, config.codec.channels, tuple(config.data.patch))
    return {name: saved[name] for name in names}


def shapes_in_wan(layers: Mapping[str, WanLayer], shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Shapes by Wan's names; tensors made of one VideoDiT tensor are neighbours."""
    result = {}
    for name, layer in layers.items():
        tensors = layer.to_wan(torch.empty(shapes[name], device="meta"))
        result |= {wan_name: tensor.shape for wan_name, tensor in zip(layer.names, tensors, strict=True)}
    return result


def values_in_wan(layers: Mapping[str, WanLayer], value_of: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """A function from Wan's name to the value. `value_of`: of VideoDiT's name; the last value is kept, as several Wan
    tensors are made of it."""
    owners = {wan_name: name for name, layer in layers.items() for wan_name in layer.names}
    last: dict[str, Tensor] = {}

    def wan_value_of(wan_name: str) -> Tensor:
        if wan_name not in last:
            layer = layers[owners[wan_name]]
            last.clear()
            last.update(zip(layer.names, layer.to_wan(value_of(owners[wan_name])), strict=True))
        return last[wan_name]

    return wan_value_of


def transformer_config(config: Config, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """config.json of the transformer."""
    model, channels = config.model, config.codec.channels
    return {
        "_class_name": CLASS, "_diffusers_version": DIFFUSERS_VERSION, **REQUIRED, "added_kv_proj_dim": None,
        "attention_head_dim": model.head_dim, "ffn_dim": model.mlp_hidden, "image_dim": None, "in_channels": channels,
        "num_attention_heads": model.heads, "num_layers": model.depth, "out_channels": channels,
        "patch_size": list(config.data.patch), "pos_embed_seq_len": None, "rope_max_seq_len": MAX_POSITIONS,
        "text_dim": shapes["text.up.weight"][1],
    }  # fmt: skip

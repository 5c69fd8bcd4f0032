"""A model of MegaSora as a folder for people without MegaSora.

    README.md                what the model is, how to load it, and a sampler
    config.json              sizes, codec, text encoder, timesteps
    model.safetensors        weights, with the names of VideoDiT, fp32, bf16 or fp16; large ones in parts with an index
    modeling_megasora.py     the model in plain PyTorch: standalone.py

`run.start=init:FOLDER` trains it further.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megasora.files import write_text_atomic
from megasora.formats.folder_card import model_card
from megasora.formats.safetensors_folder import SHARD_BYTES, new_folder, write_parts
from megasora.formats.source import ExportSource
from megasora.text.bytes import WORD_BYTES

MODEL_TYPE, FORMAT = "megasora", 1
LOADER, STEM, CONFIG, CARD = "modeling_megasora.py", "model", "config.json", "README.md"


def export_megasora(
    source: ExportSource,
    out: Path,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    on_written: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes the folder `out`, whole or not at all, one tensor at a time: the weights of `source.kind` in `dtype`.

    `shard_bytes`: most bytes of a file of weights. Raises MegaSoraError for weights that are not finite.
    """
    sharded, kind = source.sharded, source.sharded.stored_kind(source.kind)
    config = folder_config(source)
    with new_folder(out) as staging:
        value_of = partial(sharded.full_tensor, kind)
        write_parts(staging, STEM, sharded.shapes, value_of, dtype, shard_bytes, on_written=on_written)
        write_text_atomic(staging / CONFIG, json.dumps(config, indent=2) + "\n")
        write_text_atomic(staging / LOADER, Path(__file__).with_name("standalone.py").read_text(encoding="utf-8"))
        write_text_atomic(staging / CARD, model_card(source, config, kind, dtype))


def folder_config(source: ExportSource) -> dict[str, Any]:
    """The content of config.json: what standalone.py and a sampler need to know."""
    config, shapes = source.config, source.sharded.shapes
    m, codec, text = config.model, config.codec, config.text
    return {
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        "model": {
            "width": m.width,
            "depth": m.depth,
            "heads": m.heads,
            "mlp_hidden": m.mlp_hidden,
            "modulation": m.modulation,
            "conditioning": m.conditioning,
            "qk_norm": m.qk_norm,
            "text_depth": m.text_depth,
            "rope_base": m.rope_base,
            "rope_ntk_factor": m.rope_ntk_factor,
        },
        "patch": config.data.patch,
        "channels": codec.channels,
        "codec": {"name": codec.name, "factors": codec.factors},
        "text": {"name": text.name, "dim": text_dim(shapes), "max_tokens": text.max_tokens, "pad": text.pad},
        "timesteps": {"shift": config.objective.shift, "shift_tokens": config.objective.shift_tokens},
    }


def text_dim(shapes: dict[str, torch.Size]) -> int:
    """Features of a text token; of a caption as bytes the symbols of a byte."""
    if "text.up.weight" in shapes:
        return shapes["text.up.weight"][1]
    return shapes["text.byte.weight"][0] // WORD_BYTES

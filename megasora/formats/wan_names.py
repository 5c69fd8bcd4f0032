"""Names of Wan's weights in the original release, and their names in diffusers.

Files of the release and of ComfyUI have the names of the class WanModel, the latter with a prefix:

    blocks.0.self_attn.q.weight, model.diffusion_model.blocks.0.self_attn.q.weight  ->  blocks.0.attn1.to_q.weight
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
MODEL_NAMES = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}
ATTENTION_NAMES = {"self_attn": "attn1", "cross_attn": "attn2"}
LAYER_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
BLOCK_NAMES = {"norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
BLOCK_NAMES |= {f"{a}.{x}": f"{ATTENTION_NAMES[a]}.{LAYER_NAMES[x]}" for a in ATTENTION_NAMES for x in LAYER_NAMES}
TABLES = {"modulation": "scale_shift_table"}  # parameters without .weight and .bias
IN_BLOCK = re.compile(r"(blocks\.\d+)\.(.+)", re.ASCII)


def diffusers_names(stored: Iterable[str]) -> dict[str, str]:
    """{name in diffusers: stored name}; names that are those of diffusers, or of no Wan model, stay as they are."""
    names = list(stored)
    bare = {name: remove_prefix(name) for name in names}
    if not any(name.startswith("time_embedding.") for name in bare.values()):
        return {name: name for name in names}
    return {rename(name): stored_name for stored_name, name in bare.items()}


def remove_prefix(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def rename(name: str) -> str:
    """The name in diffusers of a weight of WanModel."""
    if name == "head.modulation":
        return TABLES["modulation"]
    if block := IN_BLOCK.fullmatch(name):
        return f"{block[1]}.{TABLES.get(block[2]) or rename_layer(block[2], BLOCK_NAMES)}"
    return rename_layer(name, MODEL_NAMES)


def rename_layer(name: str, names: dict[str, str]) -> str:
    layer, dot, kind = name.rpartition(".")
    return f"{names.get(layer, layer)}{dot}{kind}"

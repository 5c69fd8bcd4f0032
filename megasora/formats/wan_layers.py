"""Which weights of VideoDiT are which of Wan's, in both directions.

A VideoDiT tensor is a Wan tensor under another name, or Wan's q, k and v concatenated, or a Wan tensor with the
features of a token in another order. Both ways are exact. The names of Wan are those of diffusers; wan_names.py
translates others. With model.conditioning=full VideoDiT has modules that Wan lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.config import ModelConfig
from megasora.model.dit import VideoDiT
from megasora.text.embedders import FeatureEmbedder

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
# With model.conditioning=full: modules that Wan lacks add nothing if these are zero, whatever their other weights are.
ADDED_TO_WAN = (
    "first_frame", "null_text", "native.mlp.2.weight", "native.mlp.2.bias", "pooled_text.1.weight",
    "pooled_text.1.bias",
)  # fmt: skip


@dataclass(frozen=True)
class WanLayer:
    """A VideoDiT tensor: `to_dit` makes it of the Wan tensors `names`, `to_wan` the Wan tensors of it."""

    names: tuple[str, ...]
    to_dit: Callable[..., Tensor]
    to_wan: Callable[[Tensor], tuple[Tensor, ...]]


def build_layers(depth: int, channels: int, patch: tuple[int, ...]) -> dict[str, WanLayer]:
    """By VideoDiT's name, every weight that Wan has. `channels`: of a latent; `patch`: (pt, ph, pw)."""
    layers = {}
    for name, wan_names in MODEL_LAYERS.items():
        layers |= joined_layers(name, wan_names)
    for i in range(depth):
        for name, wan_names in BLOCK_LAYERS.items():
            layers |= joined_layers(f"blocks.{i}.{name}", tuple(f"blocks.{i}.{wan_name}" for wan_name in wan_names))
        for name, wan_name in BLOCK_NORMS.items():
            layers[f"blocks.{i}.{name}.weight"] = joined(f"blocks.{i}.{wan_name}.weight")
        layers[f"blocks.{i}.modulation.table"] = table(f"blocks.{i}.scale_shift_table")
    layers["final_modulation.table"] = table("scale_shift_table")
    layers["patch_in.weight"] = WanLayer(
        ("patch_embedding.weight",), lambda x: x.flatten(1), lambda x: (x.unflatten(1, (channels, *patch)),)
    )
    layers["patch_in.bias"] = joined("patch_embedding.bias")
    features = math.prod(patch)
    for kind in ("weight", "bias"):
        layers[f"patch_out.{kind}"] = WanLayer(
            (f"proj_out.{kind}",),
            lambda x: transposed(x, features, channels),
            lambda x: (transposed(x, channels, features),),
        )
    return layers


def joined_layers(name: str, wan_names: tuple[str, ...]) -> dict[str, WanLayer]:
    return {f"{name}.{kind}": joined(*(f"{wan_name}.{kind}" for wan_name in wan_names)) for kind in ("weight", "bias")}


def joined(*names: str) -> WanLayer:
    """Wan tensors of one shape, concatenated along dim 0."""
    return WanLayer(
        names, lambda *tensors: torch.cat(tensors) if len(tensors) > 1 else tensors[0], lambda x: x.chunk(len(names))
    )


def table(name: str) -> WanLayer:
    """A table [count, D], [1, count, D] in Wan."""
    return WanLayer((name,), lambda x: x.squeeze(0), lambda x: (x.unsqueeze(0),))


def transposed(x: Tensor, rows: int, columns: int) -> Tensor:
    """Reorders a token's features along dim 0 from (rows, columns) to (columns, rows).

    Wan's output has the order (pt, ph, pw, C), VideoDiT's (C, pt, ph, pw), as in data/patches.py.
    """
    return x.unflatten(0, (rows, columns)).transpose(0, 1).flatten(0, 1)


def parameter_shapes(model: ModelConfig, patch_dim: int, text_dim: int) -> dict[str, torch.Size]:
    """Shapes of the parameters of a VideoDiT that reads text features; the text encoder need not be on this machine."""
    with torch.device("meta"):
        dit = VideoDiT(model, patch_dim, FeatureEmbedder(text_dim, model.width, model.text_depth, model.heads))
    return {name: parameter.shape for name, parameter in dit.named_parameters()}

"""The seam: the only file that knows both the model and how it is spread over processes."""

from __future__ import annotations

import torch

from megasora.build import build_model, patch_dim
from megasora.config import Config
from megasora.parallel.world import World
from megasora.parallel.zero import ZeroEngine


def parallelize(config: Config, world: World) -> ZeroEngine:
    """The configured model, ready to train on this rank. Every rank starts from the same weights."""
    return ZeroEngine(build_model(config, patch_dim(config)), config, world, compute_dtype(config, world.device))


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    name = config.run.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)

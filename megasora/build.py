"""Builds the model of a configuration, for training and for sampling: the transformer with its text embedder."""

from __future__ import annotations

from megasora.config import Config
from megasora.model.dit import VideoDiT
from megasora.text import build_text_encoder


def build_model(config: Config, patch_dim: int) -> VideoDiT:
    """VideoDiT with its text embedder on torch's default device; its weights are not initialised or loaded yet."""
    m = config.model
    return VideoDiT(m, patch_dim, build_text_encoder(config.text).build_embedder(m.width, m.text_depth, m.heads))


def patch_dim(config: Config) -> int:
    """P, features of a patch: latent channels times the latents in a patch."""
    t, h, w = config.data.patch
    return config.codec.channels * t * h * w

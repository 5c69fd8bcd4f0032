"""Builds the model of a configuration, for training and for sampling: the transformer with its text embedder."""

from __future__ import annotations

from megasora.codec.clip_sizes import latent_frames
from megasora.config import Config, token_pixels
from megasora.model.dit import VideoDiT
from megasora.text import build_text_encoder


def build_model(config: Config, patch_dim: int) -> VideoDiT:
    """VideoDiT with its text embedder on torch's default device; its weights are not initialised or loaded yet."""
    m = config.model
    encoder, attention = build_text_encoder(config.text), (m.attention_backend, m.deterministic)
    return VideoDiT(m, patch_dim, encoder.build_embedder(m.width, m.text_depth, m.heads, *attention))


def patch_dim(config: Config) -> int:
    """P, features of a patch: latent channels times the latents in a patch."""
    t, h, w = config.data.patch
    return config.codec.channels * t * h * w


def token_grid(config: Config, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent frames, rows and columns of tokens of a clip; sides that are no multiples of a token's are padded."""
    _, rows, columns = token_pixels(config)
    latent = latent_frames(frames, config.codec.factors[0])
    return -(-latent // config.data.patch[0]), -(-height // rows), -(-width // columns)

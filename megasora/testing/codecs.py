"""Small codecs with random weights, as megasora.train_codec writes them, for tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from megasora.codec.vae.folder import CodecManifest
from megasora.codec.vae.network import VideoVAE, init_weights
from megasora.codec.vae.weights import save_codec
from megasora.config import VAEConfig

SETTINGS = {"width": 8, "multipliers": [1, 1, 2], "blocks": 1}  # of factors 2 x 4 x 4


def random_network(
    factors: tuple[int, int, int] = (2, 4, 4), channels: int = 4, seed: int = 0, **vae_settings
) -> VideoVAE:
    """A VideoVAE with random weights; `vae_settings`: of VAEConfig, in place of SETTINGS."""
    network = VideoVAE(VAEConfig(**{**SETTINGS, **vae_settings}), list(factors), channels)

    def draw(name: str, shape: torch.Size) -> Tensor:
        generator = torch.Generator()
        generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4]))
        return torch.randn(shape, generator=generator)

    init_weights(network, draw)
    return network.eval()


def write_random_codec(
    folder: Path, factors: tuple[int, int, int] = (2, 4, 4), channels: int = 4, seed: int = 0, **vae_settings
) -> CodecManifest:
    """Writes codec.json and codec.safetensors of a random network into `folder`.

    Its latents are normalised with a mean and a standard deviation of their own for each channel.
    """
    network = random_network(factors, channels, seed, **vae_settings)
    mean = [0.1 * channel for channel in range(channels)]
    std = [0.5 + 0.25 * channel for channel in range(channels)]
    vae = VAEConfig(**{**SETTINGS, **vae_settings})
    return save_codec(folder, vae, list(factors), channels, network.state_dict(), mean, std, 100 + seed, 20.0)

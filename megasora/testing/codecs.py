"""Small codecs with random weights, as megasora.train_codec writes them, for tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from megasora.codec.vae.folder import CodecManifest
from megasora.codec.vae.network import VideoVAE, init_weights
from megasora.codec.vae.quantizers import VectorQuantizer, build_quantizer
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


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal values of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vector_quantizer(
    size: int = 6, channels: int = 4, dtype: torch.dtype = torch.float64, **settings
) -> VectorQuantizer:
    """One of `size` random codes, in training mode; `settings`: of VAEConfig."""
    quantizer = build_quantizer(VAEConfig(kind="vq", codebook_size=size, **settings), channels).to(dtype)
    quantizer.codebook.codes.copy_(normal(size, channels, seed=99))
    return quantizer.train()

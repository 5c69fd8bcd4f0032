"""The autoencoder of a codec training: its weights at step 0.

run.start=init:PATH   the weights of a file or a checkpoint
codec.path            those of a finished codec; with reconstruction.train=decoder its encoder stays as it is
neither               drawn from the seed and the name of each weight
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megasora.checkpoint.start import initial_weights_to_read
from megasora.codec.vae.folder import find_codec_folder, read_manifest
from megasora.codec.vae.network import VideoVAE, init_weights
from megasora.codec.vae.weights import load_network
from megasora.config import Config
from megasora.parallelize import initial_weights
from megasora.random_numbers import fill_normal, text_key


def build_network(config: Config) -> VideoVAE:
    """The network with the weights of step 0, in fp32 on the CPU. Raises MegaSoraError."""
    if initial_weights_to_read(Path(config.run.dir), config.run.start) is not None:
        network = empty_network(config)
        weights = initial_weights(config)
        for name, tensor in network.state_dict(keep_vars=True).items():
            weights.fill(tensor, name)
        return network
    if config.codec.path:
        folder = find_codec_folder(Path(config.codec.path))
        return load_network(folder, read_manifest(folder)).requires_grad_(True).train()
    network = empty_network(config)
    init_weights(network, lambda name, shape: standard_normal(config.run.seed, name, shape))
    return network


def empty_network(config: Config) -> VideoVAE:
    """The network of the settings; its parameters are not initialised."""
    return VideoVAE(config.vae, config.codec.factors, config.codec.channels)


def standard_normal(seed: int, name: str, shape: torch.Size) -> Tensor:
    """fp32; each element is a function of the seed, the name and its place."""
    value = torch.empty(shape)
    fill_normal(value.view(1, -1), text_key(f"{seed} {name}"), 0, value.numel(), 1.0)
    return value

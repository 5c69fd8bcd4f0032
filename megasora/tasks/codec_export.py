"""RUN/codec: the frozen codec of a codec run, from the EMA weights of its newest checkpoint.

    EMA weights --VAECodec--> latents of training clips --mean, std of each channel--> RUN/codec

With reconstruction.train=decoder the encoder, mean and std are those of codec.path, bit by bit: both codecs have the
same latents and so the same fingerprint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megasora.checkpoint.manifest import step_of
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import find_checkpoint
from megasora.codec.latent_statistics import LatentStatistics
from megasora.codec.vae.codec import VAECodec
from megasora.codec.vae.folder import RUN_FOLDER, CodecManifest, find_codec_folder, read_manifest
from megasora.codec.vae.weights import load_network, save_codec
from megasora.config import Config
from megasora.data.decoded_clips import DecodedClips
from megasora.data.padding import pad_frame
from megasora.errors import MegaSoraError
from megasora.ingest.sources import find_clips
from megasora.jsonl import read_tail
from megasora.tasks.codec_adversarial import PREFIX
from megasora.tasks.codec_model import empty_network

MEASURED_CLIPS = 512  # training clips, evenly spaced in the listing
MEASURED_FRAMES = 65  # the first ones of each


def is_exported(run_dir: Path, step: int) -> bool:
    """Whether RUN/codec is a codec of this step."""
    try:
        return read_manifest(run_dir / RUN_FOLDER).step == step
    except MegaSoraError:
        return False


def export_codec(
    run_dir: Path, config: Config, device: torch.device, heartbeat: Callable[[str], None] = lambda activity: None
) -> Path:
    """Writes RUN/codec, and returns it. `config`: of the run. `heartbeat(activity)`: called before each clip.

    Raises MegaSoraError, also where a file of the run is damaged, and DataError for a clip.
    """
    checkpoint = find_checkpoint(run_dir, report=print)
    step, folder = step_of(checkpoint.name), run_dir / RUN_FOLDER
    base = find_codec_folder(Path(config.codec.path)) if config.reconstruction.train == "decoder" else None
    tensors = all_tensors(checkpoint, config, base)
    settings = config.vae, config.codec.factors, config.codec.channels, tensors
    psnr = last_psnr(run_dir, step)
    if base is not None:
        manifest = read_manifest(base)
        save_codec(folder, *settings, manifest.mean, manifest.std, step, psnr)
        return folder
    mean, std = measure_latents(unscaled_codec(config, tensors, device), config, heartbeat)
    save_codec(folder, *settings, mean, std, step, psnr)
    return folder


def unscaled_codec(config: Config, tensors: dict[str, Tensor], device: torch.device) -> VAECodec:
    """The codec of these weights without normalisation."""
    network, channels = empty_network(config), config.codec.channels
    network.load_state_dict(tensors)
    manifest = CodecManifest(
        config.codec.factors, channels, config.vae, [0.0] * channels, [1.0] * channels,
        encoder_sha256="", decoder_sha256="", step=0, psnr=None,
    )  # fmt: skip
    network.eval().requires_grad_(False)
    return VAECodec(network, manifest, dataclasses.replace(config.codec, device=device.type))


def all_tensors(checkpoint: Path, config: Config, base: Path | None) -> dict[str, Tensor]:
    """All tensors of VideoVAE: the EMA weights of a checkpoint, and what it does not train of the codec `base`."""
    sharded = ShardedCheckpoint(checkpoint)
    tensors = load_network(base, read_manifest(base)).state_dict() if base is not None else {}
    tensors |= {name: sharded.full_tensor("ema", name) for name in sharded.shapes if not name.startswith(PREFIX)}
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in empty_network(config).state_dict().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise MegaSoraError(
            f"{checkpoint} has other weights than the network of config.yaml; restore config.yaml, or continue the run "
            "with the settings that it began with"
        )
    return tensors


def measure_latents(
    codec: VAECodec, config: Config, heartbeat: Callable[[str], None]
) -> tuple[list[float], list[float]]:
    """(mean, std) of each channel of the latents of training clips."""
    statistics = LatentStatistics(codec.channels)
    for name, frames in training_frames(config):
        heartbeat(f"the statistics of the latents, {name}")
        padded = (pad_frame(frame, codec.factors[1:]) for frame in frames)
        for _ in statistics.observe(codec.encode_frames(padded)):
            pass
    return statistics.totals()


def training_frames(config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """(name, uint8 [T, H, W, 3]) of the clips to measure."""
    clips = [clip for clip in find_clips(Path(config.data.clips)).clips if clip.split == "train"]
    chosen = [clips[i] for i in np.unique(np.linspace(0, len(clips) - 1, min(MEASURED_CLIPS, len(clips))).astype(int))]
    source = DecodedClips([clip.media for clip in chosen], config.ingest, cache_mib=0)
    for index, clip in enumerate(chosen):
        yield clip.name, source.read(index, lambda num_frames: (0, min(num_frames, MEASURED_FRAMES)))


def last_psnr(run_dir: Path, step: int) -> float | None:
    """That of the validation after `step`."""
    lines = [line for line in read_tail(run_dir / "validation.jsonl") if line.get("step") == step]
    return lines[-1].get("psnr") if lines else None

"""VAECodec: the frozen autoencoder of a codec folder, with the interface that docs/architecture.md describes.

    frames in [-1, 1] --network--> latents --(z - mean) / std, per channel--> latents of unit variance, and back

Clips go through the network in chunks of codec.chunk_frames (stream.py), frames larger than codec.tile in tiles
(tiles.py), so memory does not grow with the length of a clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megasora.codec import clip_sizes
from megasora.codec.vae.boundary import Boundary
from megasora.codec.vae.folder import CodecManifest, find_codec_folder, read_manifest, vae_fingerprint
from megasora.codec.vae.network import VideoVAE
from megasora.codec.vae.stream import decode_stream, encode_stream
from megasora.codec.vae.tiles import Tiling, build_decoder, build_encoder
from megasora.codec.vae.weights import load_network
from megasora.config import CodecConfig
from megasora.errors import MegaSoraError


class VAECodec:
    """`network` with the normalisation of `manifest`, on the device `config.device`; `network` is moved there."""

    def __init__(self, network: VideoVAE, manifest: CodecManifest, config: CodecConfig):
        self.manifest, self.config = manifest, config
        self.factors, self.channels = tuple(manifest.factors), manifest.channels
        self.fingerprint = vae_fingerprint(manifest, config)
        Tiling.of(config, self.factors[1])  # raises for an overlap larger than a tile
        self.device = codec_device(config.device)
        self.network = network.to(self.device)
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(-1, 1, 1, 1)
            for values in (self.manifest.mean, self.manifest.std)
        )

    @classmethod
    def from_folder(cls, config: CodecConfig) -> VAECodec:
        """Reads the codec of `config.path`. Raises MegaSoraError if it is not whole."""
        folder = find_codec_folder(Path(config.path))
        manifest = read_manifest(folder)
        return cls(load_network(folder, manifest), manifest, config)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip: 1 for the first frame, and one for every `factors[0]` further ones, rounded up."""
        return clip_sizes.latent_frames(frames, self.factors[0])

    def num_frames(self, latent_frames: int) -> int:
        """Frames that `decode` returns."""
        return clip_sizes.num_frames(latent_frames, self.factors[0])

    @torch.inference_mode()
    def encode(self, frames_TCHW: Tensor) -> Tensor:
        """[F, 3, H, W] in [-1, 1] -> latents [C, T, H/fh, W/fw]; the last frame is repeated to fill its block.

        Raises MegaSoraError where height or width is not a multiple of the factors: see `data.patches.pad_frames`.
        """
        return torch.cat(list(self.latents_of(frames_TCHW)), dim=1).to(frames_TCHW)

    @torch.inference_mode()
    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """latents [C, T, h, w] -> frames [1 + (T-1) factors[0], 3, H, W]."""
        return torch.cat(list(self.frames_of([latents_CTHW])), dim=1).transpose(0, 1).to(latents_CTHW)

    @torch.inference_mode()
    def encode_frames(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """[H, W, 3] each, uint8 or float32 in [-1, 1] -> float32 [H/fh, W/fw, C] each; frames are read as needed."""
        for latents in self.latents_of(map(to_tensor, frames)):
            yield from latents.permute(1, 2, 3, 0).cpu().numpy()

    @torch.inference_mode()
    def decode_latents(self, latents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """float32 [h, w, C] each -> frames float32 [H, W, 3] each, about in [-1, 1]; latents are read as needed."""
        pieces = (to_tensor(latent).unsqueeze(1) for latent in latents)
        for frames in self.frames_of(pieces):
            yield from frames.permute(1, 2, 3, 0).cpu().numpy()

    def latents_of(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames [3, H, W] -> normalised latents [C, t, h, w] of each chunk, on this codec's device."""
        coder = build_encoder(self.encode_chunk, self.manifest.vae, self.factors, self.config)
        checked = (self.check_size(frame) for frame in frames)
        return encode_stream(coder, checked, self.factors[0], self.config.chunk_frames)

    def frames_of(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Normalised latents [C, t, h, w] in pieces -> frames [3, t, H, W] of each chunk, on this codec's device."""
        coder = build_decoder(self.decode_chunk, self.manifest.vae, self.factors, self.config)
        return decode_stream(coder, latents, self.factors[0], self.config.chunk_frames)

    def encode_chunk(self, frames: Tensor, boundary: Boundary) -> Tensor:
        """uint8, or float in [-1, 1], [1, 3, T, H, W] -> normalised latents [1, C, t, h, w]."""
        pixels = frames.to(self.device)
        pixels = pixels.float() / 127.5 - 1 if frames.dtype == torch.uint8 else pixels.float()
        return (self.network.encode(pixels, boundary) - self.mean) / self.std

    def decode_chunk(self, latents: Tensor, boundary: Boundary) -> Tensor:
        """Normalised latents [1, C, t, h, w] -> frames [1, 3, T, H, W]."""
        return self.network.decode(latents.to(self.device, torch.float32) * self.std + self.mean, boundary)

    def check_size(self, frame: Tensor) -> Tensor:
        """The frame [3, H, W]; raises MegaSoraError where H or W is not a multiple of the factors."""
        clip_sizes.check_sides(*frame.shape[-2:], self.factors)
        return frame


def to_tensor(array_HWC: np.ndarray) -> Tensor:
    """[H, W, C] -> [C, H, W], of the same memory if it may be written."""
    return torch.from_numpy(np.require(array_HWC, requirements=("C", "W"))).permute(2, 0, 1)


def codec_device(device: str) -> torch.device:
    """`device`: codec.device, auto | cpu | cuda. Raises MegaSoraError for cuda without a GPU."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise MegaSoraError("codec.device=cuda, but PyTorch sees no GPU here; use codec.device=auto or cpu")
    return torch.device("cuda" if has_gpu and device != "cpu" else "cpu")

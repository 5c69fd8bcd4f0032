"""How the frames of a clip go through an autoencoder of diffusers, and its latents back.

    FrameByFrame   image autoencoders: each frame by itself, `batch` at once
    WanStream      Wan: one frame, then four at once, with the causal cache of diffusers; memory does not grow with the
                   length of the clip
    WholeClip      the others, and Wan if the frames are larger than a tile: one call of diffusers for the whole clip,
                   so memory grows with its length. HunyuanVideo is divided in time, CogVideoX goes on by 8 frames, and
                   all but Wan's stream divide frames larger than a tile, all by diffusers itself

Latents are means of the posterior, as the autoencoder gives them; pretrained.py normalises them. Letters: B clips of a
batch, t frames or latent frames of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, Protocol

import torch
from torch import Tensor

from megasora.codec.pretrained_table import WAN_CHUNK

UNLIMITED = 1 << 20  # pixels of a side that is not divided into tiles


class Calls(Protocol):
    """`encode`: frames [3, H, W] -> latents [C, t, h, w] of consecutive pieces. `decode`: [C, T, h, w] -> frames
    [3, t, H, W] of consecutive pieces. Tensors are fp32 on the device of the autoencoder."""

    def encode(self, frames: Iterable[Tensor]) -> Iterator[Tensor]: ...

    def decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]: ...


class FrameByFrame:
    """An autoencoder of images; `decode` reads latents as needed."""

    def __init__(self, vae: Any, batch: int):
        self.vae, self.batch = vae, batch

    def encode(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        for images in groups(frames, self.batch):
            yield mode(self.vae.encode(torch.stack(images))).transpose(0, 1)

    def decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        for images in groups(latents, self.batch):
            yield self.vae.decode(torch.stack(images)).sample.transpose(0, 1)


class WholeClip:
    """A video autoencoder that is called once per clip. `pad(n)`: the number of frames to which n are padded;
    `check(n)` raises an error if n latent frames cannot be decoded."""

    def __init__(self, vae: Any, pad: Callable[[int], int], check: Callable[[int], None]):
        self.vae, self.pad, self.check = vae, pad, check

    def encode(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        clip = list(frames)
        clip += clip[-1:] * (self.pad(len(clip)) - len(clip))
        yield mode(self.vae.encode(torch.stack(clip, dim=1)[None]))[0]

    def decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Noise that the decoder of LTX-Video 0.9.1 adds is the same at each call; its timestep is 0, as by default in
        the pipeline."""
        z = torch.stack(list(latents), dim=1)[None]
        self.check(z.shape[2])
        if not self.vae.config.get("timestep_conditioning"):
            yield self.vae.decode(z).sample[0]
            return
        with torch.random.fork_rng(devices=[z.device] if z.is_cuda else []):
            torch.manual_seed(0)
            yield self.vae.decode(z, torch.zeros(1, device=z.device)).sample[0]


class WanStream:
    """AutoencoderKLWan, chunk by chunk as its own `encode` and `decode` do, but without collecting the chunks."""

    def __init__(self, vae: Any):
        self.vae, self.patch = vae, vae.config.patch_size or 1

    def encode(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        cache, frames = empty_cache(self.vae.encoder), iter(frames)
        for chunk in chain(groups(islice(frames, 1), 1), groups(frames, WAN_CHUNK)):
            if len(chunk) > 1 or cache[0] is not None:
                chunk += chunk[-1:] * (WAN_CHUNK - len(chunk))
            pixels = patchify(torch.stack(chunk, dim=1)[None], self.patch)
            hidden = self.vae.encoder(pixels, feat_cache=cache, feat_idx=[0])
            yield self.vae.quant_conv(hidden).chunk(2, dim=1)[0][0]

    def decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        cache = empty_cache(self.vae.decoder)
        for index, latent in enumerate(latents):
            hidden = self.vae.post_quant_conv(latent[None, :, None])
            pixels = self.vae.decoder(hidden, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
            yield unpatchify(pixels, self.patch).clamp(-1, 1)[0]


def empty_cache(network: torch.nn.Module) -> list[Tensor | None]:
    """An entry for each convolution of a clip's encoder or decoder, and some more."""
    return [None] * sum(1 for _ in network.modules())


def mode(encoded: Any) -> Tensor:
    """The mean of the posterior; the latents themselves if the autoencoder has none."""
    return encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()


def groups(items: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Lists of `size` items, the last perhaps shorter."""
    items = iter(items)
    while group := list(islice(items, size)):
        yield group


def enable_tiling(vae: Any, tile: list[int], overlap: int, side: int) -> None:
    """Makes diffusers divide frames larger than `tile` (rows, columns of pixels; 0: not divided) into tiles that share
    `overlap` pixels, blended. `side`: pixels of a latent."""
    rows, columns = (size or UNLIMITED for size in tile)
    if hasattr(vae, "tile_sample_stride_height"):
        vae.enable_tiling(
            tile_sample_min_height=rows,
            tile_sample_min_width=columns,
            tile_sample_stride_height=rows - overlap,
            tile_sample_stride_width=columns - overlap,
        )
    elif hasattr(vae, "tile_overlap_factor_height"):  # CogVideoX
        vae.enable_tiling(tile_sample_min_height=rows, tile_sample_min_width=columns)
        vae.tile_overlap_factor_height, vae.tile_overlap_factor_width = overlap / rows, overlap / columns
    else:  # AutoencoderKL, whose tiles are square
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = rows, rows // side
        vae.tile_overlap_factor = overlap / rows

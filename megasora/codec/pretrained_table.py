"""The autoencoders of diffusers that codec.name can name, and what config.json says of their latents; without torch.

    name       class                      of                       factors                   latents   frames
    wan        AutoencoderKLWan           Wan 2.1; 2.2 (TI2V)      4x8x8; 4x16x16            16; 48    1 + 4k
    hunyuan    AutoencoderKLHunyuanVideo  HunyuanVideo             4x8x8                     16        1 + 4k
    cogvideox  AutoencoderKLCogVideoX     CogVideoX                4x8x8                     16        1 + 8k
    ltx        AutoencoderKLLTXVideo      LTX-Video                8x32x32                   128       1 + 8k
    dc_ae      AutoencoderDC              DC-AE, Sana              1x32x32, 1x64x64          32, 128   each by itself
    sd         AutoencoderKL              SD, SDXL, SD3, Flux      1x8x8                     4, 16     each by itself

A name stands for a class. The numbers are those of the released models; what counts is the config.json of the folder,
with the defaults of the class for the keys that it lacks. diffusers decodes latents of CogVideoX only if their number
is odd, so that a clip is padded to 1 + 8k frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megasora.codec import clip_sizes

Values = Mapping[str, Any]  # of config.json, merged with the defaults of the family
Factors = tuple[int, int, int]  # frames, rows, columns of pixels per latent


@dataclass(frozen=True)
class Family:
    """One class of diffusers. `defaults`: those of the class, for what decides the shape of the latents."""

    class_name: str
    defaults: Values
    factors_of: Callable[[Values], Factors]
    channels_key: str = "latent_channels"
    is_video: bool = True  # False: each frame is encoded by itself
    latents_per_group: int = 1  # a clip is padded to 1 + a multiple of so many latent frames

    def shape(self, values: Values) -> tuple[Factors, int]:
        """(factors, channels). Raises TypeError, ValueError or OverflowError if config.json is not of this class."""
        merged = {**self.defaults, **{key: value for key, value in values.items() if value is not None}}
        factors, channels = self.factors_of(merged), merged[self.channels_key]
        for number in (*factors, channels):
            if type(number) is not int or not 1 <= number <= MAX_SIZE:
                raise ValueError(f"factors {list(factors)} and {channels} channels")
        return factors, channels

    def latent_frames(self, frames: int, ft: int) -> int:
        """Latent frames of a clip of `frames`. `ft`: frames per latent frame."""
        if not self.is_video:
            return frames
        groups = clip_sizes.latent_frames(frames, ft * self.latents_per_group) - 1
        return 1 + groups * self.latents_per_group

    def num_frames(self, latent_frames: int, ft: int) -> int:
        """Frames of a clip of so many latent frames."""
        return clip_sizes.num_frames(latent_frames, ft) if self.is_video else latent_frames


MAX_SIZE = 100_000  # of a factor, and of the number of channels


def wan_factors(values: Values) -> Factors:
    """As the network has them. Raises ValueError if it is not one that diffusers encodes, four frames at once."""
    ft, patch = 2 ** sum(map(bool, values["temperal_downsample"])), values["patch_size"]
    if ft != WAN_CHUNK:
        raise ValueError(f"temperal_downsample={values['temperal_downsample']}, not {WAN_CHUNK} frames per latent")
    side = 2 ** (len(values["dim_mult"]) - 1) * patch
    return ft, side, side


WAN_CHUNK = 4  # frames that AutoencoderKLWan encodes at once, whatever its config.json says


def hunyuan_factors(values: Values) -> Factors:
    side = values["spatial_compression_ratio"]
    return values["temporal_compression_ratio"], side, side


def cogvideox_factors(values: Values) -> Factors:
    side = 2 ** (len(values["block_out_channels"]) - 1)
    return int(values["temporal_compression_ratio"]), side, side


def ltx_factors(values: Values) -> Factors:
    halvings = 2 ** sum(map(bool, values["spatio_temporal_scaling"]))
    side = values.get("spatial_compression_ratio") or values["patch_size"] * halvings
    return values.get("temporal_compression_ratio") or values["patch_size_t"] * halvings, side, side


def dc_ae_factors(values: Values) -> Factors:
    side = 2 ** (len(values["encoder_block_out_channels"]) - 1)
    return 1, side, side


def sd_factors(values: Values) -> Factors:
    side = 2 ** (len(values["block_out_channels"]) - 1)
    return 1, side, side


FAMILIES = {
    "wan": Family(
        "AutoencoderKLWan",
        {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True], "patch_size": 1},
        wan_factors,
        channels_key="z_dim",
    ),
    "hunyuan": Family(
        "AutoencoderKLHunyuanVideo",
        {"latent_channels": 16, "temporal_compression_ratio": 4, "spatial_compression_ratio": 8},
        hunyuan_factors,
    ),
    "cogvideox": Family(
        "AutoencoderKLCogVideoX",
        {"latent_channels": 16, "temporal_compression_ratio": 4, "block_out_channels": [128, 256, 256, 512]},
        cogvideox_factors,
        latents_per_group=2,
    ),
    "ltx": Family(
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 128, "patch_size": 4, "patch_size_t": 1,
            "spatio_temporal_scaling": [True, True, True, False],
        },
        ltx_factors,
    ),
    "dc_ae": Family(
        "AutoencoderDC",
        {"latent_channels": 32, "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]},
        dc_ae_factors,
        is_video=False,
    ),
    "sd": Family(
        "AutoencoderKL", {"latent_channels": 4, "block_out_channels": [64]}, sd_factors, is_video=False
    ),
}  # fmt: skip


def name_of_class(class_name: object) -> str | None:
    """codec.name of a class of diffusers; None if there is none."""
    return next((name for name, family in FAMILIES.items() if family.class_name == class_name), None)

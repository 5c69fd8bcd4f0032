"""PretrainedCodec: a frozen autoencoder of diffusers, with the interface of a codec of docs/architecture.md.

    frames in [-1, 1] --encoder--> mean of the posterior --(z - mean) / std--> latents, and back

mean and std are those of the pipeline of the same model, so that a transformer trained with it sees the latents that it
knows: latents_mean and latents_std per channel (Wan, LTX-Video), or shift_factor and 1 / scaling_factor (SD 3, Flux;
the others without a shift). pretrained_table.py has the families, pretrained_folder.py the files, pretrained_calls.py
the calls of diffusers.

All of it is fp32, also if the files are not. Building a codec reads config.json and the names of the weight files only;
the weights are read by the first `encode` or `decode`, and hashed by `fingerprint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megasora.codec.clip_sizes import check_sides
from megasora.codec.fingerprint import tile_suffix
from megasora.codec.pretrained_calls import Calls, FrameByFrame, WanStream, WholeClip, enable_tiling
from megasora.codec.pretrained_folder import find_weights, hash_files, read_folder
from megasora.codec.vae.codec import codec_device, to_tensor
from megasora.config import CodecConfig
from megasora.errors import MegaSoraError, first_of, printable

MAX_SHOWN = 3  # names of weights in a message


class PretrainedCodec:
    """The codec of `codec.name` and `codec.path`.

    Raises MegaSoraError where `codec.path` cannot be read, is of another class or lacks weights.
    """

    def __init__(self, config: CodecConfig):
        self.config, self.found = config, read_folder(config)
        self.family, self.factors, self.channels = self.found.family, self.found.factors, self.found.channels
        self.weights, self.variant = find_weights(config, self.found.folder)
        self.device = codec_device(config.device)
        self.check_tile()

    def check_tile(self) -> None:
        """Raises MegaSoraError if diffusers cannot divide frames into these tiles."""
        c, side = self.config, self.factors[1]
        for tile in filter(None, c.tile):
            if tile % side or c.tile_overlap % side or c.tile_overlap >= tile:
                raise MegaSoraError(
                    f"codec.tile={c.tile} and codec.tile_overlap={c.tile_overlap} must be multiples of the {side} "
                    f"pixels of a latent of codec.name={c.name}, and the overlap less than a tile; or codec.tile=[0,0]"
                )
        if c.name == "sd" and c.tile[0] != c.tile[1]:
            raise MegaSoraError(f"codec.tile={c.tile}: tiles of codec.name=sd are square; give twice the same number")

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip; of a video, 1 for the first frame, and one for every `factors[0]` further ones.

        It is rounded up, of CogVideoX to an odd number.
        """
        return self.family.latent_frames(frames, self.factors[0])

    def num_frames(self, latent_frames: int) -> int:
        """Frames that `decode` returns."""
        return self.family.num_frames(latent_frames, self.factors[0])

    @cached_property
    def fingerprint(self) -> str:
        """Two codecs with the same fingerprint give the same latents. It reads every byte of the weight files."""
        return (
            f"{self.config.name}-{'x'.join(map(str, self.factors))}-{self.channels}-"
            f"{hash_files(self.found, self.weights)[:16]}{tile_suffix(self.config)}"
        )

    @torch.no_grad()
    def encode(self, frames_TCHW: Tensor) -> Tensor:
        """[F, 3, H, W] in [-1, 1] -> latents [C, latent_frames(F), H/fh, W/fw]; the last frame is repeated as needed.

        Raises MegaSoraError where height or width is not a multiple of the factors: see `data.patches.pad_frames`.
        """
        return torch.cat(list(self.latents_of(frames_TCHW)), dim=1).to(frames_TCHW)

    @torch.no_grad()
    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """latents [C, T, h, w] -> frames [num_frames(T), 3, H, W]."""
        frames = [piece.to(latents_CTHW) for piece in self.frames_of(latents_CTHW.unbind(1))]
        return torch.cat(frames, dim=1).transpose(0, 1)

    @torch.no_grad()
    def encode_frames(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """[H, W, 3] each, uint8 or float32 in [-1, 1] -> float32 [H/fh, W/fw, C] each.

        Frames of images, and of Wan if they are no larger than a tile, are read as needed; of the others all are held
        in memory, because diffusers encodes them at once.
        """
        for latents in self.latents_of(map(to_tensor, frames)):
            yield from latents.permute(1, 2, 3, 0).cpu().numpy()

    @torch.no_grad()
    def decode_latents(self, latents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """float32 [h, w, C] each -> frames float32 [H, W, 3] each, about in [-1, 1]; read as by `encode_frames`."""
        for frames in self.frames_of(map(to_tensor, latents)):
            yield from frames.permute(1, 2, 3, 0).cpu().numpy()

    def latents_of(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames [3, H, W], uint8 or float -> normalised latents [C, t, h, w] of each piece, on this codec's device."""
        first, frames = peek(frames)
        height, width = first.shape[-2:]
        check_sides(height, width, self.factors)
        for z in self.calls(height, width).encode(map(self.to_pixels, frames)):
            yield (z - self.mean) / self.std

    def frames_of(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Normalised latent frames [C, h, w] -> frames [3, t, H, W] of each piece, on this codec's device."""
        first, latents = peek(latents)
        height, width = first.shape[-2] * self.factors[1], first.shape[-1] * self.factors[2]
        yield from self.calls(height, width).decode(map(self.to_z, latents))

    def to_pixels(self, frame: Tensor) -> Tensor:
        """uint8, or float in [-1, 1], [3, H, W] -> fp32 in [-1, 1]."""
        pixels = frame.to(self.device).float()
        return pixels / 127.5 - 1 if frame.dtype == torch.uint8 else pixels

    def to_z(self, latent: Tensor) -> Tensor:
        """A normalised latent frame [C, h, w] -> as the autoencoder has it, fp32."""
        return latent.to(self.device).float() * self.std[:, 0] + self.mean[:, 0]

    def calls(self, height: int, width: int) -> Calls:
        """How clips of this size, in pixels, go through the autoencoder."""
        is_tiled = any(0 < tile < size for tile, size in zip(self.config.tile, (height, width), strict=True))
        if not self.family.is_video:
            return FrameByFrame(self.vae, self.config.chunk_frames)
        if self.config.name == "wan" and not is_tiled:
            return WanStream(self.vae)
        return WholeClip(self.vae, lambda frames: self.num_frames(self.latent_frames(frames)), self.check_latent_frames)

    def check_latent_frames(self, latent_frames: int) -> None:
        """Raises MegaSoraError for a number that no clip has: CogVideoX decodes odd numbers only."""
        fitting = self.latent_frames(self.num_frames(latent_frames))
        if fitting != latent_frames:
            raise MegaSoraError(
                f"codec.name={self.config.name} decodes {fitting} latent frames, not {latent_frames}: "
                f"{self.num_frames(fitting)} frames"
            )

    # ---------------------------------------------------------------- the autoencoder

    @cached_property
    def vae(self) -> Any:
        """The autoencoder, frozen. Raises MegaSoraError if diffusers is missing, or weights are missing or damaged."""
        vae, info = self.load()
        for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if names := sorted(map(str, info[problem])):
                raise MegaSoraError(
                    f"{self.found.folder}: {problem.replace('_', ' ')} of a {self.family.class_name}: "
                    f"{printable(first_of(names, MAX_SHOWN), 300)}; config.json and weights belong to different models"
                )
        tensors = vae.state_dict()
        if wrong := [name for name, value in tensors.items() if not value.isfinite().all()]:
            raise MegaSoraError(
                f"{self.found.folder}: {first_of(wrong, MAX_SHOWN)} are NaN or infinite; download the weights again"
            )
        if any(self.config.tile):
            enable_tiling(vae, self.config.tile, self.config.tile_overlap, self.factors[1])
        return vae.eval().requires_grad_(False).to(self.device)

    def load(self) -> tuple[Any, dict[str, list]]:
        try:
            import diffusers
        except ImportError as error:
            raise MegaSoraError(
                f"codec.name={self.config.name} needs diffusers ({error}): pip install megasora[encoders]"
            ) from None
        model_class = getattr(diffusers, self.family.class_name)
        verbosity = diffusers.logging.get_verbosity()
        diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)  # what it would print becomes an error below
        try:
            return model_class.from_pretrained(
                self.found.folder, use_safetensors=True, local_files_only=True, variant=self.variant,
                torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True,
            )  # fmt: skip
        except Exception as error:  # each library raises its own exceptions on damaged files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise MegaSoraError(
                f"{self.found.folder} cannot be loaded as a {self.family.class_name} ({type(error).__name__}: "
                f"{printable(reason, 200)}); download it again"
            ) from None
        finally:
            diffusers.logging.set_verbosity(verbosity)

    @cached_property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """(mean, std) of each channel, [C, 1, 1, 1]: latents are (z - mean) / std, as in the pipelines of diffusers."""
        config, buffers = self.vae.config, dict(self.vae.named_buffers())  # LTX-Video has them among its weights
        mean, std = (buffers.get(name, config.get(name)) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            mean, std = config.get("shift_factor") or 0.0, 1.0
        scale = config.get("scaling_factor")
        values = [torch.as_tensor(x, dtype=torch.float64, device="cpu").flatten() for x in (mean, std)]
        values[1] = values[1] / (1.0 if scale is None else scale)
        if any(len(x) not in (1, self.channels) or not x.isfinite().all() for x in values) or not values[1].all():
            raise MegaSoraError(
                f"{self.found.folder}: latents_mean, latents_std, shift_factor and scaling_factor must be finite, and "
                f"one or {self.channels} numbers; download config.json again"
            )
        mean, std = (x.expand(self.channels).float().to(self.device).view(-1, 1, 1, 1) for x in values)
        return mean, std

    @property
    def mean(self) -> Tensor:
        return self.normalisation[0]

    @property
    def std(self) -> Tensor:
        return self.normalisation[1]


def peek(items: Iterable[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    """(the first item, all items). Raises MegaSoraError if there is none."""
    items = iter(items)
    first = next(items, None)
    if first is None:
        raise MegaSoraError("a clip without frames can be neither encoded nor decoded")
    return first, chain([first], items)

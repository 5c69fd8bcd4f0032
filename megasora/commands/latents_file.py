"""A file of latents: one clip that a codec has encoded, with what is needed to decode it.

FILE.safetensors   "latents" fp32 [C, T, h, w]; metadata: format, fingerprint of the codec, native size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from megasora.checkpoint.safetensors_file import write_tensors
from megasora.codec.fingerprint import without_tiles
from megasora.data.clip_writer import MAX_FPS, MIN_FPS
from megasora.errors import MegaSoraError, printable

if TYPE_CHECKING:
    from megasora.codec import Codec

LATENTS, FORMAT = "latents", "1"
MAX_SIDE, MAX_FRAMES = 1 << 16, 10**8  # as the bounds of ingest
MAX_SHOWN = 120  # characters of a fingerprint in a message


@dataclass(frozen=True)
class ClipInfo:
    """The native size of an encoded clip. `fps`: 0 for an image."""

    height: int
    width: int
    frames: int
    fps: float

    def __str__(self) -> str:
        size = f"{self.height}x{self.width} pixels"
        return f"an image of {size}" if self.frames == 1 else f"{self.frames} frames of {size}, {self.fps:g} fps"


def write_latents(path: Path, latents: Sequence[np.ndarray], info: ClipInfo, codec: Codec) -> tuple[int, ...]:
    """Writes latent frames, float32 [h, w, C] each, to a new file; returns the shape [C, T, h, w]."""
    shape = torch.Size((codec.channels, len(latents), *latents[0].shape[:2]))
    metadata = {
        "latents_format": FORMAT, "codec": codec.fingerprint, "height": str(info.height), "width": str(info.width),
        "frames": str(info.frames), "fps": repr(float(info.fps)),
    }  # fmt: skip
    values = torch.empty(shape)
    for t, latent in enumerate(latents):
        values[:, t] = torch.from_numpy(latent).permute(2, 0, 1)
    write_tensors(path, {LATENTS: shape}, lambda _: values, metadata)
    return tuple(shape)


def read_latents(path: Path, codec: Codec) -> tuple[ClipInfo, np.ndarray]:
    """The native size and the latents, fp32 [C, T, h, w], of a file that `encode_file` wrote for this codec.

    Raises MegaSoraError if it is no such file, damaged, or of a codec with other latents.
    """
    if not path.is_file():
        raise MegaSoraError(f"{path} is no file; make one with: megasora codec encode CLIP --codec PATH --out {path}")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("latents_format") != FORMAT:
                raise MegaSoraError(
                    f"{path} is no file of latents (format {FORMAT}); make one with: megasora codec encode"
                )
            check_codec(path, str(metadata.get("codec")), codec)
            info, tensor = parse_info(metadata), file.get_slice(LATENTS)
            _, fh, fw = codec.factors
            expected = [codec.channels, codec.latent_frames(info.frames), -(-info.height // fh), -(-info.width // fw)]
            if tensor.get_dtype() != "F32" or list(tensor.get_shape()) != expected:
                raise ValueError(f"{tensor.get_dtype()} {list(tensor.get_shape())}, {info} make {expected}")
            latents = file.get_tensor(LATENTS)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise MegaSoraError(f"{path} is damaged: {printable(str(error), 200)}; encode the clip again") from None
    if count := int((~np.isfinite(latents)).sum()):
        raise MegaSoraError(f"{path} has {count} latents that are not finite; look at the clip and the codec")
    return info, latents


def check_codec(path: Path, fingerprint: str, codec: Codec) -> None:
    """Raises MegaSoraError if latents were made by another encoder. A decoder that was trained further is accepted."""
    stored, own = map(without_tiles, (fingerprint, codec.fingerprint))
    if stored != own:
        raise MegaSoraError(
            f"{path} was encoded with {printable(stored, MAX_SHOWN)}, --codec is {own}; give the codec it was "
            "encoded with"
        )


def parse_info(metadata: dict[str, str]) -> ClipInfo:
    """Raises ValueError or KeyError for values that `encode_file` does not write."""
    info = ClipInfo(*(int(metadata[key]) for key in ("height", "width", "frames")), float(metadata["fps"]))
    is_size = 1 <= info.height <= MAX_SIDE and 1 <= info.width <= MAX_SIDE and 1 <= info.frames <= MAX_FRAMES
    if not is_size or not (info.fps == 0 if info.frames == 1 else MIN_FPS <= info.fps <= MAX_FPS):
        raise ValueError(f"{info} is no size of a clip")
    return info

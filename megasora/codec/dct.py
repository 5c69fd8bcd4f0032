"""`dct`: a fixed spacetime DCT as a codec, without weights.

Blocks of (factors) pixels and three colours go through an orthonormal 4-D DCT (its basis over colour is grey, red -
blue, and green against both). The lowest `channels` frequencies are stored, each divided by the standard deviation that
its frequency has in ordinary video, so that latents have about unit variance. As in causal video VAEs, the first frame
is one latent frame (a block in which it is repeated) and every further `factors[0]` frames are one: an image is a clip
of one frame, and 1 + 4k frames become 1 + k latent frames. `dct_encoder.py` has the encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from megasora.codec import clip_sizes
from megasora.codec.dct_encoder import (
    COLOR_FREQUENCY,
    LEVEL,
    POWER,
    SLOPE,
    DCTEncoder,
    dct_basis,
    select_coefficients,
)
from megasora.config import CodecConfig


class DCTCodec:
    """Frames in [-1, 1] to latents and back; `encode(decode(z)) == z` up to rounding."""

    def __init__(self, config: CodecConfig):
        self.factors = tuple(config.factors)
        self.channels = config.channels
        self.frame_encoder = DCTEncoder(config)
        coefficients, scale = select_coefficients(config)
        vectors = [dct_basis(n)[index] for n, index in zip((3, *self.factors), coefficients.T, strict=True)]
        basis = np.einsum("kc,kt,kh,kw->kcthw", *vectors).reshape(self.channels, -1)
        self.basis = torch.from_numpy(basis).float()  # [C, 3*pt*ph*pw], rows orthonormal
        self.scale = torch.from_numpy(scale).float()
        self.is_static = torch.from_numpy(coefficients[:, 1] == 0)  # [C]: constant over time

    @property
    def fingerprint(self) -> str:
        """Two codecs with the same fingerprint give the same latents."""
        return f"dct-{'x'.join(map(str, self.factors))}-{self.channels}-{LEVEL}-{SLOPE}-{POWER}-{COLOR_FREQUENCY}"

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip: 1 for the first frame, and one for every `factors[0]` further ones, rounded up."""
        return clip_sizes.latent_frames(frames, self.factors[0])

    def num_frames(self, latent_frames: int) -> int:
        """Frames that `decode` returns."""
        return clip_sizes.num_frames(latent_frames, self.factors[0])

    def encode(self, frames_TCHW: Tensor) -> Tensor:
        """[F, 3, H, W] in [-1, 1] -> latents [C, T, H/ph, W/pw]; the last frame is repeated to fill its block.

        Raises MegaSoraError where height or width is not a multiple of the factors: see `data.patches.pad_frames`.
        """
        frames = frames_TCHW.detach().permute(0, 2, 3, 1).to("cpu", torch.float32).contiguous().numpy()
        latents = torch.from_numpy(np.stack(list(self.frame_encoder.encode(frames))))
        return latents.permute(3, 0, 1, 2).contiguous().to(frames_TCHW)

    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """latents [C, T, h, w] -> frames [1 + (T-1) factors[0], 3, H, W]."""
        z = latents_CTHW.permute(1, 2, 3, 0)
        return self.to_frames(torch.cat((z[:1] * self.is_static.to(z), z[1:])))[self.factors[0] - 1 :]

    def to_frames(self, z_THWC: Tensor) -> Tensor:
        """Latents of T blocks in time [T, h, w, C] -> frames [T factors[0], 3, H, W]."""
        pt, ph, pw = self.factors
        t, h, w, _ = z_THWC.shape
        blocks = (z_THWC * self.scale.to(z_THWC)) @ self.basis.to(z_THWC)
        blocks = blocks.view(t, h, w, 3, pt, ph, pw)
        return blocks.permute(0, 4, 3, 1, 5, 2, 6).reshape(t * pt, 3, h * ph, w * pw)

    def encode_frames(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """[H, W, 3] each, uint8 or float32 in [-1, 1] -> float32 [H/ph, W/pw, C] each; frames are read as needed."""
        return self.frame_encoder.encode(frames)

    def decode_latents(self, latents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """float32 [h, w, C] each -> frames float32 [H, W, 3] each; latents are read as needed."""
        for index, latent in enumerate(latents):
            z = torch.from_numpy(latent)[None]
            frames = self.to_frames(z) if index else self.to_frames(z * self.is_static)[self.factors[0] - 1 :]
            yield from frames.permute(0, 2, 3, 1).numpy()

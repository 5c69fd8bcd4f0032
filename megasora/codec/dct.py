"""`dct`: a fixed spacetime DCT; frames to latents and back without a weight.

Blocks of (factors) pixels and the three colours go through an orthonormal 4-D DCT (over colour its basis is grey,
red - blue, and green against both); the lowest `channels` frequencies are kept, each divided by the size that its
frequency has in ordinary video, so that latents have about unit variance. Like the causal video VAEs, the first frame
is a latent of its own (a block in which it stands still) and every further `factors[0]` frames are one: an image is a
clip of one frame, and 1 + 4k frames become 1 + k latents. Frames become latents in `dct_stream.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megasora.codec.dct_stream import COLOR_FREQUENCY, LEVEL, POWER, SLOPE, DCTStream, dct_basis, kept_coefficients
from megasora.config import CodecConfig


class DCTCodec:
    """Frames in [-1, 1] to latents and back; `encode(decode(z)) == z` for what it keeps."""

    def __init__(self, config: CodecConfig):
        self.factors = tuple(config.factors)
        self.channels = config.channels
        self.stream = DCTStream(config)
        kept, scale = kept_coefficients(config)
        vectors = [dct_basis(n)[numbers] for n, numbers in zip((3, *self.factors), kept.T, strict=True)]
        basis = np.einsum("kc,kt,kh,kw->kcthw", *vectors).reshape(self.channels, -1)
        self.basis = torch.from_numpy(basis).float()  # [C, 3*pt*ph*pw], rows orthonormal
        self.scale = torch.from_numpy(scale).float()
        self.still = torch.from_numpy(kept[:, 1] == 0)  # the coefficients that a standing block has

    @property
    def fingerprint(self) -> str:
        """Two codecs with the same fingerprint give the same latents."""
        return f"dct-{'x'.join(map(str, self.factors))}-{self.channels}-{LEVEL}-{SLOPE}-{POWER}-{COLOR_FREQUENCY}"

    def latent_frames(self, frames: int) -> int:
        """1 for an image, and one more for every `factors[0]` frames begun."""
        return 1 + -(-(frames - 1) // self.factors[0])

    def num_frames(self, latent_frames: int) -> int:
        return 1 + (latent_frames - 1) * self.factors[0]

    def encode(self, frames_TCHW: Tensor) -> Tensor:
        """[F, 3, H, W] in [-1, 1] -> latents [C, T, H/ph, W/pw]; frames are repeated to whole blocks at the end.

        Raises MegaSoraError where height or width is no multiple of the factors: see `data.patches.pad_frames`.
        """
        frames = frames_TCHW.detach().permute(0, 2, 3, 1).to("cpu", torch.float32).contiguous().numpy()
        latents = torch.from_numpy(np.stack(list(self.stream.encode(frames))))
        return latents.permute(3, 0, 1, 2).contiguous().to(frames_TCHW)

    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """latents [C, T, h, w] -> frames [1 + (T-1) factors[0], 3, H, W]."""
        pt, ph, pw = self.factors
        _, t, h, w = latents_CTHW.shape
        z = latents_CTHW.permute(1, 2, 3, 0) * self.scale.to(latents_CTHW)
        z = torch.cat((z[:1] * self.still.to(z), z[1:]))
        blocks = (z @ self.basis.to(z)).view(t, h, w, 3, pt, ph, pw)
        frames = blocks.permute(0, 4, 3, 1, 5, 2, 6).reshape(t * pt, 3, h * ph, w * pw)
        return frames[pt - 1 :]

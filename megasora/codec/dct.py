"""`dct`: a fixed spacetime DCT; frames to latents and back without a weight.

Blocks of (factors) pixels and the three colours go through an orthonormal 4-D DCT (over colour its basis is grey,
red - blue, and green against both); the lowest `channels` frequencies are kept, each divided by the size that its
frequency has in ordinary video, so that latents have about unit variance. Like the causal video VAEs, the first frame
is a latent of its own (a block in which it stands still) and every further `factors[0]` frames are one: an image is a
clip of one frame, and 1 + 4k frames become 1 + k latents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megasora.config import CodecConfig
from megasora.errors import MegaSoraError

# standard deviation of an orthonormal coefficient over the block's number of pixels^0.5, as a function of frequency:
# LEVEL / (1 + SLOPE * f)^POWER, f in cycles a block along each axis, root of the sum of squares
LEVEL, SLOPE, POWER = 0.5, 2.0, 2.0
COLOR_FREQUENCY = 0.5  # one step in colour counts as this many cycles


def dct_basis(n: int) -> Tensor:
    """float64 [n, n]: row f is the orthonormal DCT-II vector of frequency f / 2 cycles."""
    f, x = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None]
    basis = torch.cos(math.pi * (x + 0.5) * f / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


class DCTCodec:
    """Frames in [-1, 1] to latents and back; `encode(decode(z)) == z` for what it keeps."""

    def __init__(self, config: CodecConfig):
        self.factors = tuple(config.factors)
        self.channels = config.channels
        pt, ph, pw = self.factors
        axes = torch.meshgrid(*(torch.arange(n) for n in (3, pt, ph, pw)), indexing="ij")
        color, t, h, w = (a.flatten() for a in axes)
        frequency = torch.sqrt((color * COLOR_FREQUENCY) ** 2 + (t / 2) ** 2 + (h / 2) ** 2 + (w / 2) ** 2)
        # ties are broken by the coefficient's number, so the order is the same everywhere
        order = torch.tensor(sorted(range(len(frequency)), key=lambda i: (round(float(frequency[i]), 6), i)))
        kept = order[: self.channels]
        bases = [dct_basis(n) for n in (3, pt, ph, pw)]
        full = torch.einsum("ac,bt,dh,ew->abdecthw", *bases).reshape(3 * pt * ph * pw, 3, pt, ph, pw)
        scale = LEVEL * math.sqrt(3 * pt * ph * pw) / (1 + SLOPE * frequency[kept].double()) ** POWER
        self.basis = (full[kept]).flatten(1).float()  # [C, 3*pt*ph*pw], rows orthonormal
        self.scale = scale.float()
        self.still = t[kept] == 0  # the coefficients that a standing block has

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
        pt, ph, pw = self.factors
        f, _, height, width = frames_TCHW.shape
        if height % ph or width % pw:
            raise MegaSoraError(f"frames of {height}x{width} pixels are no multiple of codec.factors={ph}x{pw}")
        latent_t = self.latent_frames(f)
        index = torch.cat((torch.zeros(pt - 1, dtype=torch.long), torch.arange(f)))
        index = torch.cat((index, index[-1:].expand(latent_t * pt - len(index))))
        basis, scale = self.basis.to(frames_TCHW), self.scale.to(frames_TCHW)
        blocks = frames_TCHW[index].view(latent_t, pt, 3, height // ph, ph, width // pw, pw)
        blocks = blocks.permute(0, 3, 5, 2, 1, 4, 6).flatten(3)  # [T, h, w, 3*pt*ph*pw]
        return ((blocks @ basis.T) / scale).permute(3, 0, 1, 2).contiguous()

    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """latents [C, T, h, w] -> frames [1 + (T-1) factors[0], 3, H, W]."""
        pt, ph, pw = self.factors
        _, t, h, w = latents_CTHW.shape
        z = latents_CTHW.permute(1, 2, 3, 0) * self.scale.to(latents_CTHW)
        z = torch.cat((z[:1] * self.still.to(z), z[1:]))
        blocks = (z @ self.basis.to(z)).view(t, h, w, 3, pt, ph, pw)
        frames = blocks.permute(0, 4, 3, 1, 5, 2, 6).reshape(t * pt, 3, h * ph, w * pw)
        return frames[pt - 1 :]

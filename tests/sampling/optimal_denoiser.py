"""A denoiser without weights that is exact for a finite data set, so that every kind of prompt has a known answer.

Data are clips x_1 ... x_N, all equally likely. A noised token is x_t = (1 - t) x + t noise, each with its own timestep,
so the velocity that flow matching would learn with an unlimited model and unlimited steps is

    v(x_t) = E[noise - x | x_t] = (x_t - E[x | x_t]) / t,    E[x | x_t] = sum over i of w_i x_i,
    w = softmax over i of  - sum over tokens |x_t - (1 - t) x_i|^2 / (2 s^2),    s = t, at clean tokens CLEAN_STD

where i runs over the clips with the caption of the segment, or over all if its caption is hidden.

    moving_shapes(height, width, frames) --render, encode--> x_i;   [VideoBatch, noised] --denoise--> [velocity [L, P]]

The clips are those of `megasora.testing.clips` that move on a torus, from every start on the way of the shape. So each
part of a longer clip, forward or backward in time, is again a clip of the data set, and the continuation is unique.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from megasora.batch import VideoBatch, segment_ids
from megasora.data.patches import frames_to_float, patchify
from megasora.testing.clips import SPEEDS, ClipSpec, describe, positions, render

CLEAN_STD = 0.02  # of a given value around that of the clip: a grey level of 255 is 0.008
ANY = ""  # in place of a caption: clips with every caption
COLORS, HEADINGS = ("red", "yellow"), ("right", "left")  # colours whose difference to the background is not opposite


def moving_shapes(height: int, width: int, frames: int) -> list[tuple[str, ClipSpec]]:
    """[(caption, spec)]: small circles of two colours that move right or left, from each start on their way."""
    step = SPEEDS["slow"]
    return [
        (
            describe(color, "circle", heading),
            ClipSpec(
                color, "circle", heading, "plain", "small", "slow", "wrap", height, width, frames, 12, x, 7.5, 120
            ),
        )  # fmt: skip
        for color in COLORS
        for heading in HEADINGS
        for x in np.arange(0.5, width, step).tolist()
    ]


class OptimalDenoiser:
    """The `Denoiser` of a data set. `encode_caption`: str -> [S, E]; `patch`: latents per token, see `data.patch`.

    `clips(height, width, frames)` are the (caption, spec) of the data.
    """

    def __init__(
        self,
        codec,
        encode_caption: Callable[[str], Tensor],
        patch: tuple[int, int, int] = (1, 1, 1),
        clips: Callable[[int, int, int], list[tuple[str, ClipSpec]]] = moving_shapes,
    ):
        self.codec, self.encode_caption, self.patch, self.clips = codec, encode_caption, patch, clips
        self.device, self.stages = torch.device("cpu"), []
        self.encoded: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        self.rendered: dict[tuple[int, int, int], np.ndarray] = {}
        self.captions: dict[bytes, str] = {}

    def data(self, grid: tuple[int, int, int], caption: Tensor | None) -> Tensor:
        """Patches fp64 [N, l, P] of all clips of this grid with this encoded caption; None: with any."""
        if grid not in self.encoded:
            self.encoded[grid] = self.encode_clips(grid)
        by_caption = self.encoded[grid]
        return by_caption[ANY] if caption is None else by_caption[self.captions[caption.numpy().tobytes()]]

    def encode_clips(self, grid: tuple[int, int, int]) -> dict[str, Tensor]:
        t, h, w = (n * p for n, p in zip(grid, self.patch, strict=True))
        _, ph, pw = self.codec.factors
        clips: dict[str, list[Tensor]] = {}
        for caption, spec in self.clips(h * ph, w * pw, self.codec.num_frames(t)):
            clips.setdefault(caption, []).append(patchify(self.latents(render(spec)), self.patch)[0].double())
        self.captions |= {self.encode_caption(caption).numpy().tobytes(): caption for caption in clips}
        return {ANY: torch.stack(sum(clips.values(), []))} | {c: torch.stack(x) for c, x in clips.items()}

    def latents(self, frames_FHWC: np.ndarray) -> Tensor:
        """[C, T, h, w] of uint8 frames."""
        return self.codec.encode(frames_to_float(torch.from_numpy(frames_FHWC))).float()

    def __call__(self, batches: Sequence[VideoBatch]) -> list[Tensor]:
        """The velocity, fp32 [L, P], of each noised pack; 0 at clean tokens and padding."""
        return [self.velocity(batch) for batch in batches]

    def pad_tokens(self, tokens: int) -> int:
        """As of a layout that needs a multiple of 8."""
        return -(-tokens // 8) * 8

    def velocity(self, batch: VideoBatch) -> Tensor:
        velocity_LP = torch.zeros_like(batch.patches_LP, dtype=torch.float32)
        t_L1 = batch.timesteps_R[segment_ids(batch.cu_rows, len(velocity_LP))][:, None].float()
        texts = batch.text_SE.split(batch.cu_text.diff().tolist())
        bounds = batch.cu_segments.tolist()
        for g, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            part = slice(start, stop)
            caption = None if batch.drop_text_G[g] else texts[g]
            x_lP, t_l1 = batch.patches_LP[part].float(), t_L1[part]
            mean_lP = self.posterior_mean(x_lP, t_l1, tuple(batch.grids_G3[g].tolist()), caption)
            velocity_LP[part] = torch.where(t_l1 > 0, (x_lP - mean_lP) / t_l1.clamp_min(1e-6), 0.0)
        return velocity_LP

    def posterior_mean(self, x_lP: Tensor, t_l1: Tensor, grid: tuple[int, int, int], caption: Tensor | None) -> Tensor:
        """E[x | x_t], fp32 [l, P]. Raises KeyError for a caption that no clip of the data has."""
        x_NlP = self.data(grid, caption)
        clean_l, std_l = (1 - t_l1[:, 0]).double(), torch.where(t_l1 > 0, t_l1, CLEAN_STD)[:, 0].double()
        # the squared distances without the term that all clips have, in fp64: they are differences of large numbers
        dot_Nl, square_Nl = torch.einsum("lp,nlp->nl", x_lP.double(), x_NlP), x_NlP.square().sum(2)
        distance_N = ((clean_l**2 * square_Nl - 2 * clean_l * dot_Nl) / std_l**2).sum(1)
        return torch.einsum("n,nlp->lp", torch.softmax(-distance_N / 2, 0), x_NlP).float()

    def nearest(self, frames_FHWC: np.ndarray) -> tuple[str, ClipSpec, float]:
        """(caption, spec, largest difference in grey levels) of the clip of the data set closest to these frames."""
        frames, height, width, _ = frames_FHWC.shape
        pairs = self.clips(height, width, frames)
        if (height, width, frames) not in self.rendered:
            self.rendered[height, width, frames] = np.stack([render(spec) for _, spec in pairs]).astype(np.int16)
        error_NFHWC = np.abs(self.rendered[height, width, frames] - frames_FHWC)
        best = int(error_NFHWC.mean((1, 2, 3, 4)).argmin())
        return *pairs[best], float(error_NFHWC[best].max())


def longer(spec: ClipSpec, before: int, frames: int) -> ClipSpec:
    """The clip of `frames` frames of which `spec` is a part, from `before` frames before it."""
    x, y = (positions(dataclasses.replace(spec, frames=2)) * [[1], [-1]]).sum(0) * before  # against the direction
    return dataclasses.replace(
        spec, start_x=(spec.start_x + x) % spec.width, start_y=(spec.start_y + y) % spec.height, frames=frames
    )

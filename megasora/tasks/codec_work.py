"""What one rank computes of the clips of a step: its part of each stack, and the module that reconstructs it.

    ClipStack  --build_work-->  StackWork  --PackReconstruction-->  StackOutput  --output-->  frames to compare

In ZeRO stage 3 all ranks gather each weight together, so they must call the network equally often; in every stage a
rank without clips still takes part in the sum of gradients. Fillers, without a loss, make up for missing stacks. The
stacks that ranks share come first, because their layers wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megasora.codec.vae.boundary import Boundary, ClipBoundary
from megasora.codec.vae.network import VideoVAE
from megasora.data.clip_loader import ClipStack
from megasora.parallelize_codec import ContextParallelCodec, StackPiece

MakeNoise = Callable[[list[int], tuple[int, int, int]], Tensor]  # (sample ids, grid of latents) -> [B, C, T', h, w]


@dataclass(frozen=True)
class StackWork:
    """This rank's part of a stack of clips of one size."""

    sample_ids: list[int]
    frames: Tensor  # [b, 3, t, h, W] in [-1, 1], in the dtype of the network
    noise: Tensor  # fp32 [b, channels, t', ...]
    boundary: Boundary
    target: Tensor  # fp32 [b, 3, t, H, W]: the frames of which this rank computes the loss, without padding
    piece: StackPiece | None  # None: a filler, which has no loss

    @property
    def is_filler(self) -> bool:
        return self.piece is None

    def output(self, frames: Tensor) -> Tensor:
        """The output of the network -> what `target` is compared with. All ranks of a clip must call it."""
        t, h, w = self.target.shape[2:]
        return self.piece.whole_rows(frames)[:, :, :t, :h, :w]


class StackOutput(NamedTuple):
    """What the network returns of a stack. DeepSpeed finds tensors in tuples, not in objects."""

    frames: Tensor  # [b, 3, t, h, W]
    penalty_sum: Tensor  # of `Latents`
    num_latents: int
    counts: Tensor | None  # of `Latents`


class PackReconstruction(nn.Module):
    """Reconstructs the stacks of a pack. Its parameters have the names that they have in `VideoVAE`."""

    def __init__(self, vae: VideoVAE, trains_encoder: bool):
        super().__init__()
        self.encoder, self.quantizer, self.decoder = vae.encoder, vae.quantizer, vae.decoder
        self.trains_encoder = trains_encoder
        self.encoder.requires_grad_(trains_encoder)

    def forward(self, pack: list[StackWork]) -> list[StackOutput]:
        outputs = []
        for work in pack:
            # else a codebook would learn the latents of this stack
            self.quantizer.train(self.training and self.trains_encoder and not work.is_filler)
            moments = self.encoder(work.frames, work.boundary)
            latents = self.quantizer.forward(moments, work.noise)  # it has no parameter for DeepSpeed's hooks to gather
            frames = self.decoder(latents.z, work.boundary)
            outputs.append(StackOutput(frames, latents.penalty_sum, latents.z.numel(), latents.counts))
        return outputs


class WorkBuilder:
    """Makes this rank's part of packs. `context`: divides clips over the context axis."""

    def __init__(self, context: ContextParallelCodec, channels: int, dtype: torch.dtype, device: torch.device):
        self.context, self.channels, self.dtype, self.device = context, channels, dtype, device

    def build_pack(self, stacks: list[ClipStack], make_noise: MakeNoise) -> list[StackWork]:
        """This rank's part of each stack, those that are shared first; a filler if there is none."""
        pieces = self.context.share_stacks([tuple(stack.frames_BTHWC.shape[:4]) for stack in stacks])
        pairs = [pair for pair in zip(stacks, pieces, strict=True) if pair[1] is not None]
        pairs.sort(key=lambda pair: not pair[1].split.is_split)
        return [self.build_work(stack, piece, make_noise) for stack, piece in pairs] or [self.filler()]

    def build_work(self, stack: ClipStack, piece: StackPiece, make_noise: MakeNoise) -> StackWork:
        padded = stack.frames_BTHWC.permute(0, 4, 1, 2, 3)
        (t, h, w), (ft, fh, fw) = padded.shape[2:], self.context.factors
        sample_ids = stack.sample_ids[slice(*piece.piece.clips)]
        noise = make_noise(stack.sample_ids, (1 + (t - 1) // ft, h // fh, w // fw))
        first, stop = piece.loss_frames()
        num_frames = max(0, min(stop, stack.size[0]) - first)
        target = piece.take_targets(padded)[:, :, :num_frames, : stack.size[1], : stack.size[2]]
        return StackWork(
            sample_ids,
            self.to_device(piece.take_frames(padded), self.dtype),
            piece.take_latents(noise),
            piece.boundary,
            self.to_device(target, torch.float32),
            piece,
        )

    def to_device(self, frames: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [B, 3, T, H, W] -> [-1, 1]; channels stay last in memory."""
        return frames.to(self.device).to(dtype).div_(127.5).sub_(1)

    def filler(self) -> StackWork:
        """One clip of one latent."""
        _, fh, fw = self.context.factors
        frames = torch.zeros(1, 3, 1, fh, fw, dtype=self.dtype, device=self.device)
        noise = torch.zeros(1, self.channels, 1, 1, 1, device=self.device)
        return StackWork([], frames, noise, ClipBoundary(), frames, None)

"""Clips of any length in pieces of a few frames: the same latents and frames as of the whole clip.

    encode    1 + k ft frames, then k ft, k ft, ...   ->  1 + k latent frames, then k, k, ...
    decode    1 + k latent frames, then k, k, ...     ->  1 + k ft frames, then k ft, k ft, ...

A convolution over time needs the last frames of its input in the chunk before. ChunkBoundary keeps copies of these, so
that memory depends on the chunk and not on the clip; Wan's causal cache does the same [arXiv 2503.20314]. Letters:
ft = factors[0]; k latent frames of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasora.codec.vae.boundary import Boundary

Network = Callable[[Tensor, Boundary], Tensor]  # VideoVAE.encode or VideoVAE.decode
Coder = Callable[[Tensor], Tensor]  # the next chunk [B, C, T, H, W] of a clip -> its output


class ChunkBoundary:
    """The piece is one of the consecutive chunks of a clip: before it is the end of the previous one, around it zeros.

    `next_chunk` is called between two chunks. The values kept have no gradient: chunks are for a frozen codec.
    """

    def __init__(self):
        self.starts_clip = True
        self.last_frames: dict[nn.Module, Tensor] = {}

    def extend(self, x: Tensor, frames: int, border: int, layer: nn.Module) -> Tensor:
        if not (frames or border):
            return x
        extended = F.pad(x, (border, border, border, border, frames, 0))
        if frames:
            height, width = x.shape[-2:]
            inside = extended[..., border : border + height, border : border + width]
            if not self.starts_clip:
                inside[:, :, :frames] = self.last_frames[layer]
            self.last_frames[layer] = inside[:, :, -frames:].detach().clone()  # a view would keep the chunk alive
        return extended

    def next_chunk(self) -> None:
        self.starts_clip = False


class ChunkCoder:
    """Encodes or decodes one clip: called with its chunks in order, it returns what `network` makes of each."""

    def __init__(self, network: Network):
        self.network, self.boundary = network, ChunkBoundary()

    @torch.no_grad()
    def __call__(self, chunk: Tensor) -> Tensor:
        result = self.network(chunk, self.boundary)
        self.boundary.next_chunk()
        return result


def encode_stream(coder: Coder, frames: Iterable[Tensor], ft: int, chunk_frames: int) -> Iterator[Tensor]:
    """Latents [C, t, h, w] of the chunks of a clip, from its frames [3, H, W].

    `coder`: a ChunkCoder or TileCoder of VideoVAE.encode, or of a function that converts the frames of a piece before.
    `chunk_frames` is rounded down to whole latent frames, but is at least one. The last frame is repeated to fill its
    latent frame.
    """
    first = True
    for group in groups(frames, max(1, chunk_frames // ft) * ft):
        group += group[-1:] * ((first - len(group)) % ft)
        yield coder(stack_frames(group)).squeeze(0)
        first = False


def decode_stream(coder: Coder, latents: Iterable[Tensor], ft: int, chunk_frames: int) -> Iterator[Tensor]:
    """Frames [3, t, H, W] of the chunks of a clip, from its latents [C, t, h, w] in pieces of any length."""
    latent_frames = (z for piece in latents for z in piece.unbind(1))
    for group in groups(latent_frames, max(1, chunk_frames // ft)):
        yield coder(stack_frames(group)).squeeze(0)


def stack_frames(frames: list[Tensor]) -> Tensor:
    """[C, H, W] each -> [1, C, T, H, W]. Empties the list: the frames are then in memory once."""
    chunk = torch.stack(frames, dim=1).unsqueeze(0)
    frames.clear()
    return chunk


def groups(items: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Lists of 1 + `size` items, then of `size`; the last may be shorter."""
    group: list[Tensor] = []
    end = size + 1
    for item in items:
        group.append(item)
        if len(group) == end:
            yield group
            group, end = [], size
    if group:
        yield group

"""Clips of any size in overlapping tiles, which are blended, and in chunks.

A tile is computed as if it were a whole clip, with zeros around it. Its values are wrong near an edge that lies within
the frame, up to R pixels from it, see `receptive_field`. So neighbouring tiles share V >= `codec.tile_overlap` pixels.
A tile has weight 0 in a margin next to such an edge, then weights that increase linearly to 1:

    V >= 2 R    the margin is R: only exact values are used, and the result is that of the whole frame but for rounding
    V < 2 R     the margin is 3/8 V, the ramp V/4: the result differs near the seams, the less the larger V is

Most of the error is close to the edge: without the margin, the ramp over all of V, it is 5 to 10 times as large.
(R rounded up to whole latents.) Each tile has its own ChunkBoundary, so tiles and chunks combine: memory depends on the
chunk and the size of a frame, of which the convolutions keep their last inputs, and not on the number of frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.codec.vae.network import strides
from megasora.codec.vae.stream import ChunkCoder, Network
from megasora.config import CodecConfig, VAEConfig
from megasora.errors import MegaSoraError


@dataclass(frozen=True)
class ReceptiveField:
    """How far the network looks, in pixels to each side.

    A latent depends on the pixels of its block and on `encoder` pixels around it. A decoded pixel depends on what lies
    beyond an edge of the latents if it is less than `decoder` pixels from that edge.
    """

    encoder: int
    decoder: int


def receptive_field(vae: VAEConfig, factors: Sequence[int]) -> ReceptiveField:
    """The sum, over the 3x3 convolutions, of the pixels that one of their positions covers."""
    plan = strides(vae, list(factors))
    pixels = [plan.patch[1]]
    for _, side in plan.stages:
        pixels.append(pixels[-1] * side)
    first_and_last = pixels[0] + pixels[-1]  # conv_in and conv_out
    return ReceptiveField(
        first_and_last + 2 * vae.blocks * sum(pixels), first_and_last + 2 * (vae.blocks + 1) * sum(pixels)
    )


@dataclass(frozen=True)
class Tiling:
    """Largest tile (rows, columns) and least overlap, in latents; a side of 0 is not divided."""

    tile: tuple[int, int]
    overlap: int

    @staticmethod
    def of(codec: CodecConfig, factor: int) -> Tiling:
        """Of latents of `factor` pixels: tiles are rounded down to whole ones, the overlap is rounded up.

        Raises MegaSoraError if the overlap is not smaller than a tile.
        """
        tile = tuple(max(1, side // factor) if side else 0 for side in codec.tile)
        overlap = -(-codec.tile_overlap // factor)
        for side in tile:
            if 0 < side <= overlap:
                raise MegaSoraError(
                    f"codec.tile_overlap={codec.tile_overlap} must be less than codec.tile={codec.tile}, in whole "
                    f"latents of {factor} pixels: {overlap} of {side}; use at most {(side - 1) * factor}"
                )
        return Tiling(tile, overlap)


@dataclass(frozen=True)
class Span:
    """One tile along one side, [start, stop) in latents, and its weight at each position of the output."""

    start: int
    stop: int
    weights: Tensor

    def slice(self, scale: int) -> slice:
        return slice(self.start * scale, self.stop * scale)


def split_side(length: int, tile: int, overlap: int, scale: int, radius: int) -> list[Span]:
    """Tiles of one size, at most `tile`, that cover `length` latents with overlaps of at least `overlap`.

    The output has `scale` positions per latent. Those less than `radius` positions from an edge within the frame are
    wrong. At each position, the float64 weights of all tiles sum to 1.
    """
    if tile == 0 or length <= tile:
        return [Span(0, length, torch.ones(length * scale, dtype=torch.float64))]
    count = -(-(length - overlap) // (tile - overlap))
    size = -(-(length + (count - 1) * overlap) // count)
    starts = [index * (length - size) // (count - 1) for index in range(count)]
    distance = torch.arange(size * scale, dtype=torch.float64) + 0.5  # from the first edge of a tile
    weights_NX = torch.zeros(count, length * scale, dtype=torch.float64)
    for index, start in enumerate(starts):
        weight = torch.ones_like(distance)
        if index > 0:
            weight = torch.minimum(weight, ramp(distance, (starts[index - 1] + size - start) * scale, radius))
        if index < count - 1:
            shared = (start + size - starts[index + 1]) * scale
            weight = torch.minimum(weight, ramp(distance, shared, radius).flip(0))
        weights_NX[index, start * scale : (start + size) * scale] = weight
    weights_NX /= weights_NX.sum(0)
    return [
        Span(start, start + size, weights_NX[index, start * scale : (start + size) * scale].clone())
        for index, start in enumerate(starts)
    ]


def ramp(distance: Tensor, overlap: int, radius: int) -> Tensor:
    """Weights at `distance` from an edge: 0 next to it, 1 from the end of the overlap, less the same margin, on."""
    margin = radius if overlap >= 2 * radius else min(radius, 0.375 * overlap)
    return ((distance - margin) / max(1.0, overlap - 2 * margin)).clamp(0, 1)


class TileCoder:
    """Encodes or decodes one clip: called with its chunks [B, C, T, H, W] in order, tile by tile.

    The input has `in_scale` positions per latent along a side, and the output `out_scale`; `radius`: see `split_side`.
    """

    def __init__(self, network: Network, tiling: Tiling, in_scale: int, out_scale: int, radius: int):
        self.network, self.tiling, self.in_scale = network, tiling, in_scale
        self.out_scale, self.radius = out_scale, radius
        self.tiles: list[tuple[Span, Span, ChunkCoder]] = []  # rows, columns

    def __call__(self, chunk: Tensor) -> Tensor:
        height, width = chunk.shape[-2:]
        if not self.tiles:
            rows, columns = (
                split_side(side // self.in_scale, tile, self.tiling.overlap, self.out_scale, self.radius)
                for side, tile in zip((height, width), self.tiling.tile, strict=True)
            )
            self.tiles = [(row, column, ChunkCoder(self.network)) for row in rows for column in columns]
        if len(self.tiles) == 1:
            return self.tiles[0][2](chunk)
        result: Tensor | None = None
        for row, column, coder in self.tiles:
            tile = coder(chunk[..., row.slice(self.in_scale), column.slice(self.in_scale)])
            if result is None:
                shape = (*tile.shape[:3], *(side // self.in_scale * self.out_scale for side in (height, width)))
                like = {"dtype": tile.dtype, "device": tile.device, "memory_format": torch.channels_last_3d}
                result = torch.empty(shape, **like).zero_()
            weights_HW = (row.weights[:, None] * column.weights).to(tile)
            result[..., row.slice(self.out_scale), column.slice(self.out_scale)].addcmul_(tile, weights_HW)
        return result


def build_encoder(encode: Network, vae: VAEConfig, factors: Sequence[int], codec: CodecConfig) -> TileCoder:
    """Of one clip, for `encode_stream`. `encode`: VideoVAE.encode, or a function that prepares its input and output."""
    radius = -(-receptive_field(vae, factors).encoder // factors[1])
    return TileCoder(encode, Tiling.of(codec, factors[1]), factors[1], 1, radius)


def build_decoder(decode: Network, vae: VAEConfig, factors: Sequence[int], codec: CodecConfig) -> TileCoder:
    """Of one clip, for `decode_stream`. `decode`: VideoVAE.decode, or a function that prepares its input and output."""
    return TileCoder(decode, Tiling.of(codec, factors[1]), 1, factors[1], receptive_field(vae, factors).decoder)

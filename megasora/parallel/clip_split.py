"""Divides clips over the context ranks of a codec: each rank has a range of latent frames and one of latent rows.

    sizes of the stacks of a pack  --split_stacks-->  a StackSplit each: a piece for all ranks, or whole clips

A stack is clips of one size. A piece consists of whole latents, so resampling never crosses its border. Clips with
fewer latent frames than time ranks, or fewer latent rows than rows ranks, are not split: the clips of such a stack are
divided over the ranks, and a rank computes its clips as one process would. Pure planning from the sizes, equal on all
ranks: nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

LATENTS = (1, 1, 1)  # factors of the latents themselves
Range = tuple[int, int]  # [start, stop)


@dataclass(frozen=True)
class Piece:
    """What one rank has of a stack."""

    clips: Range
    frames: Range  # latent
    rows: Range  # latent

    def take(self, x: Tensor, factors: Sequence[int] = LATENTS) -> Tensor:
        """[B, C, T, H, W] of the whole stack -> [b, C, t, h, W] of this piece; a view. `factors`: of a latent in x."""
        frames, rows = frame_range(self.frames, factors[0]), row_range(self.rows, factors[1])
        return x[slice(*self.clips), :, slice(*frames), slice(*rows)]


@dataclass(frozen=True)
class StackSplit:
    """How the context ranks divide a stack. `pieces`: by context rank, which is time rank x rows ranks + rows rank;
    None: this rank has nothing of it."""

    pieces: tuple[Piece | None, ...]
    is_split: bool  # the clips themselves, else only the stack


def split_stacks(sizes: Sequence[Sequence[int]], factors: Sequence[int], time: int, rows: int) -> list[StackSplit]:
    """The split of each stack over `time` x `rows` ranks.

    `sizes`: clips, frames, rows and columns of each stack of a pack, with 1 + a multiple of ft frames and multiples of
    fh and fw, else ValueError; `factors`: (ft, fh, fw). Of the stacks that are not split, the larger ones are divided
    first, and the ranks that have fewer pixels so far get the first clips.
    """
    load = [0] * (time * rows)
    splits = {index: split_clips(size, factors, time, rows) for index, size in enumerate(sizes)}
    pixels = [size[1] * size[2] * size[3] for size in sizes]
    for index in sorted(splits, key=lambda i: (-pixels[i], i)):
        if splits[index] is None:
            splits[index] = divide_stack(sizes[index], factors, load)
    return [split for split in splits.values() if split is not None]


def split_clips(size: Sequence[int], factors: Sequence[int], time: int, rows: int) -> StackSplit | None:
    """Pieces as equal as possible, the larger ones first; None if a rank would have none."""
    frames, height = latent_size(size, factors)
    if frames < time or height < rows:
        return None
    frame_ranges, row_ranges = even_ranges(frames, time), even_ranges(height, rows)
    return StackSplit(tuple(Piece((0, size[0]), f, r) for f in frame_ranges for r in row_ranges), True)


def divide_stack(size: Sequence[int], factors: Sequence[int], load: list[int]) -> StackSplit:
    """Whole clips for each rank. Adds their pixels to `load`, the pixels of each rank."""
    frames, height = latent_size(size, factors)
    pieces: list[Piece | None] = [None] * len(load)
    by_load = sorted(range(len(load)), key=lambda rank: (load[rank], rank))
    for rank, (start, stop) in zip(by_load, even_ranges(size[0], len(load)), strict=True):
        if stop > start:
            pieces[rank] = Piece((start, stop), (0, frames), (0, height))
            load[rank] += (stop - start) * size[1] * size[2] * size[3]
    return StackSplit(tuple(pieces), False)


def latent_size(size: Sequence[int], factors: Sequence[int]) -> tuple[int, int]:
    """Latent frames and rows of clips of this size. ValueError if they are not whole."""
    _, frames, height, width = size
    if (frames - 1) % factors[0] or height % factors[1] or width % factors[2]:
        raise ValueError(f"a clip of {(frames, height, width)} has no whole number of latents of {tuple(factors)}")
    return 1 + (frames - 1) // factors[0], height // factors[1]


def even_ranges(total: int, parts: int) -> list[Range]:
    """`total` divided into consecutive ranges of equal length, or longer by one; the longer ones first."""
    length, longer = divmod(total, parts)
    starts = [part * length + min(part, longer) for part in range(parts + 1)]
    return list(zip(starts, starts[1:], strict=False))


def frame_range(latent_frames: Range, factor: int) -> Range:
    """The frames of pixels of latent frames: one of the first latent frame, `factor` of each other."""
    start, stop = (max(0, 1 + (frame - 1) * factor) for frame in latent_frames)
    return start, stop


def row_range(latent_rows: Range, factor: int) -> Range:
    return latent_rows[0] * factor, latent_rows[1] * factor

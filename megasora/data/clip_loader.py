"""Clips for one data-parallel rank of a codec training, step by step: a listing in; stacks of crops out.

    endless order of clips --steps--> this rank's packs --ReaderPool--> ClipStacks --read_ahead--> training

An epoch is a permutation of all clips, keyed by (seed, epoch); the next one follows without a gap. Step s takes the
next data.packs_per_step packs of data.clips_per_pack clips, and data rank r every n-th of these packs. A crop is keyed
by (seed, epoch, clip). So neither the number of ranks, nor that of threads, nor a stop changes what a step trains on:
the whole state is the number of clips that were taken. Clips of one size in a pack are stacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from megasora.config import DataConfig
from megasora.data.decoded_clips import DecodedClips
from megasora.data.read_ahead import read_ahead, read_in_turn, submit_ahead
from megasora.data.reader_pool import ReaderPool
from megasora.data.shuffle import CLIPS, CROPS, permutation


@dataclass(frozen=True)
class ClipStack:
    """Clips of one size: those of a pack that are computed together."""

    sample_ids: list[int]
    frames_BTHWC: Tensor  # uint8 [B, T, H, W, 3]: padded to whole latents
    size: tuple[int, int, int]  # frames, rows, columns without the padding

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True)
class ClipBatch:
    """The packs of one optimizer step on this rank, and the position of the loader after it."""

    packs: list[list[ClipStack]]
    next_cursor: int  # clips that were taken of the order, by all ranks


@dataclass(frozen=True)
class Crop:
    """What is taken of a clip. `sides`: (first, count) of rows and of columns for a frame of (height, width)."""

    random_4: np.ndarray | None  # in [0, 1): image or video, frame, row, column; None: the first frames, the middle
    crop: tuple[int, int, int]  # frames, rows, columns; 0: all
    image_fraction: float = 0.0

    def frames(self, num_frames: int) -> tuple[int, int]:
        """(first frame, number of frames)."""
        if self.random_4 is not None and self.random_4[0] < self.image_fraction:
            return int(self.random_4[1] * num_frames), 1
        length = min(self.crop[0] or num_frames, num_frames)
        return self.first(0.0 if self.random_4 is None else self.random_4[1], num_frames - length), length

    def sides(self, frames_THWC: np.ndarray) -> np.ndarray:
        """The rows and columns of decoded frames; a view."""
        ranges = []
        for dim, share in zip((1, 2), (0.5, 0.5) if self.random_4 is None else self.random_4[2:], strict=True):
            size = frames_THWC.shape[dim]
            length = min(self.crop[dim] or size, size)
            first = self.first(share, size - length)
            ranges.append(slice(first, first + length))
        return frames_THWC[:, ranges[0], ranges[1]]

    @staticmethod
    def first(share: float, most: int) -> int:
        """A number from 0 to `most`."""
        return int(share * (most + 1))


class ClipLoader:
    """The steps of one data rank. `iter(loader)` reads ahead in threads; `steps()` does not.

    source      the clips; `sample_ids` are their permanent numbers, by index
    factors     frames, rows, columns of a latent: clips are padded to whole latents
    data_rank   of `data_size`, of the data axis; data.packs_per_step is a multiple of it
    cursor      the number of clips that earlier steps took
    """

    def __init__(
        self,
        source: DecodedClips,
        sample_ids: list[int],
        config: DataConfig,
        seed: int,
        factors: tuple[int, int, int],
        data_rank: int = 0,
        data_size: int = 1,
        cursor: int = 0,
    ):
        self.source, self.sample_ids, self.config, self.seed, self.factors = source, sample_ids, config, seed, factors
        self.data_rank, self.data_size, self.cursor = data_rank, data_size, cursor
        self.permutations: dict[int, np.ndarray] = {}  # of the newest epochs

    def __iter__(self) -> Iterator[ClipBatch]:
        """Yields steps without end; a thread reads `data.prefetch_steps` ahead. Raises DataError, see `read_ahead`."""
        readers, config = self.start_readers(), self.config
        steps = self.read_steps(readers)
        yield from read_ahead(steps, readers, config.prefetch_steps, config.read_timeout_seconds, self.source.describe)

    def steps(self) -> Iterator[ClipBatch]:
        """Yields the same steps, each read when it is requested, without a timeout."""
        readers = self.start_readers()
        yield from read_in_turn(self.read_steps(readers), readers, self.config.read_timeout_seconds)

    def start_readers(self) -> ReaderPool:
        return ReaderPool(self.read_pack, self.config.reader_threads, self.source.reader_lock)

    def read_steps(self, readers: ReaderPool) -> Iterator[ClipBatch]:
        """Yields the steps in order; their packs are submitted ahead, see `submit_ahead`."""
        packs_per_rank = self.config.packs_per_step // self.data_size
        for next_cursor, results in submit_ahead(self.planned_steps(), readers, packs_per_rank):
            yield ClipBatch(list(results()), next_cursor)
            del results  # else its packs would be kept alive while the next step is read

    def planned_steps(self) -> Iterator[tuple[int, list[range]]]:
        """The cursor after each step, and the clips of its packs on this rank."""
        clips, packs = self.config.clips_per_pack, self.config.packs_per_step
        for first in count(self.cursor, clips * packs):
            starts = [first + clips * number for number in range(self.data_rank, packs, self.data_size)]
            yield first + clips * packs, [range(start, start + clips) for start in starts]

    def read_pack(self, numbers: range, begin) -> list[ClipStack]:
        """`numbers`: of the clips in the endless order."""
        crops = []
        for number in numbers:
            epoch, place = divmod(number, len(self.sample_ids))
            clip = int(self.order_of(epoch)[place])
            begin(clip)
            sample_id = self.sample_ids[clip]
            crop = Crop(self.draw(epoch, sample_id), tuple(self.config.crop), self.config.image_fraction)
            crops.append((sample_id, crop.sides(self.source.read(clip, crop.frames))))
        return stack_clips(crops, self.factors)

    def order_of(self, epoch: int) -> np.ndarray:
        """int64 [clips]: the clips of an epoch, in order."""
        if epoch not in self.permutations:
            recent = {e: order for e, order in self.permutations.items() if e == epoch - 1}
            self.permutations = {**recent, epoch: permutation(len(self.sample_ids), self.seed, CLIPS, epoch)}
        return self.permutations[epoch]

    def draw(self, epoch: int, sample_id: int) -> np.ndarray:
        """Four random numbers in [0, 1) for a clip of an epoch."""
        seed = np.random.SeedSequence(self.seed, spawn_key=(CROPS, epoch, sample_id))
        return (np.random.PCG64(seed).random_raw(4) >> np.uint64(11)) * 2.0**-53


def stack_clips(clips: list[tuple[int, np.ndarray]], factors: tuple[int, int, int]) -> list[ClipStack]:
    """Stacks (sample id, uint8 [T, H, W, 3]) of equal size, in the order of the first clip of each size."""
    by_size: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    for sample_id, frames in clips:
        by_size.setdefault(frames.shape[:3], []).append((sample_id, frames))
    stacks = []
    for size, members in by_size.items():
        padded = torch.empty(len(members), *padded_size(size, factors), 3, dtype=torch.uint8)
        for out, (_, frames) in zip(padded, members, strict=True):
            write_padded(out.numpy(), frames)
        stacks.append(ClipStack([sample_id for sample_id, _ in members], padded, size))
    return stacks


def padded_size(size: tuple[int, ...], factors: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames: 1 + a multiple of the first factor; rows and columns: multiples of the others."""
    return (size[0] + (1 - size[0]) % factors[0], size[1] + -size[1] % factors[1], size[2] + -size[2] % factors[2])


def write_padded(out_THWC: np.ndarray, frames_THWC: np.ndarray) -> None:
    """Copies frames to the beginning of a larger array, and repeats the last frame, row and column in the rest."""
    t, h, w = frames_THWC.shape[:3]
    out_THWC[:t, :h, :w] = frames_THWC
    out_THWC[:t, :h, w:] = out_THWC[:t, :h, w - 1 : w]
    out_THWC[:t, h:] = out_THWC[:t, h - 1 : h]
    out_THWC[t:] = out_THWC[t - 1 : t]

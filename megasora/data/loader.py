"""Packs for one data-parallel rank, step by step: a packing plan and its clips in; VideoBatches out.

    PackingPlan --steps--> this rank's packs --ReaderPool--> VideoBatches --share--> StepBatch --Prefetcher--> training

The plan says which packs a step has, and which of them belong to this rank. Neither the number of ranks, nor that of
reader threads, nor a stop changes what a step trains on: the whole state is the plan's cursor.

A damaged clip ends the run. If `data.max_damaged_fraction` is above 0, it is left out of its pack, its tokens become
padding, and it is reported in `StepBatch.damaged`; so is a clip with a number that is infinite or NaN. Which clips are
left out depends on the bytes of the shards alone, and on what the file system cannot read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megasora.batch import VideoBatch
from megasora.config import DataConfig
from megasora.data.buffer_pool import BufferPool
from megasora.data.mixture import Mixture
from megasora.data.pack import PackBuffer, Record, make_batch
from megasora.data.packing_plan import Cursor, PackingPlan, PlannedPack, PlannedStep, assign_packs_to_ranks
from megasora.data.read_ahead import read_ahead, read_in_turn, submit_ahead
from megasora.data.reader_pool import ReaderPool
from megasora.data.tar import DamagedTar
from megasora.data.token_drop import draw_positions
from megasora.errors import MegaSoraError

PLACEHOLDER_ID = -1  # sample id of the token in a pack none of whose clips could be read; it has no loss

PackRead = tuple[VideoBatch, list[DamagedTar]]  # a pack, and the errors of the clips that it lacks


@dataclass(frozen=True)
class StepBatch:
    """The packs of one optimizer step on this rank, and the position of the loader after it."""

    step: int  # from 0
    packs: list[VideoBatch]  # whole packs
    shares: list[Any]  # of each pack, what this rank computes with, see `share` of PackLoader
    real_tokens: int  # of all ranks, without padding, as planned
    dropped_fraction: float  # of the tokens of their clips, by token dropping
    next_cursor: Cursor
    damaged: list[DamagedTar]  # one for each clip that was left out of these packs


class PackLoader:
    """Reads the packs of one data-parallel rank. `iter(loader)` reads ahead in threads; `steps()` does not."""

    def __init__(
        self,
        mixture: Mixture,
        config: DataConfig,
        seed: int,
        encode_caption: Callable[[str], Tensor] | None,
        attention_break_even_tokens: int,
        data_rank: int = 0,
        data_size: int = 1,
        cursor: Cursor | None = None,
        first_step: int = 0,
        share: Callable[[VideoBatch, int], Any] = lambda pack, step: pack,
    ):
        """`encode_caption`: caption -> [S, E]; None: the text features that ingest stored.

        `attention_break_even_tokens`: see PackingPlan. `data_rank` of `data_size`: of the data axis. `first_step`: the
        number of the step at the cursor. `share(pack, step)`: what this rank computes with; called while reading ahead.
        Raises MegaSoraError if `data_size` does not divide the packs of a step.
        """
        self.mixture, self.config, self.seed, self.encode_caption = mixture, config, seed, encode_caption
        self.data_rank, self.data_size, self.share = data_rank, data_size, share
        self.cursor, self.first_step = cursor or Cursor(), first_step
        if config.packs_per_step % data_size:
            raise MegaSoraError(
                f"data.packs_per_step={config.packs_per_step} must be a multiple of the {data_size} data-parallel ranks"
            )
        self.plan = PackingPlan(
            mixture.token_counts,
            mixture.weights,
            config.tokens_per_pack,
            config.packs_per_step,
            config.packing_window,
            attention_break_even_tokens,
            seed,
            config.token_drop,
        )
        packs_in_flight = (config.prefetch_steps + 2) * config.packs_per_step // data_size
        size = PackBuffer.num_bytes(config.tokens_per_pack, mixture.manifest.patch_dim, mixture.dtype)
        self.buffers = BufferPool(size, packs_in_flight)

    def __iter__(self) -> Iterator[StepBatch]:
        """Yields steps without end. A thread reads `data.prefetch_steps` steps ahead; its errors are raised here.

        Raises DataError with the name of the tar if the read of a clip takes longer than `data.read_timeout_seconds`.
        """
        readers, config = self.start_readers(), self.config
        steps = self.read_steps(readers)
        yield from read_ahead(
            steps, readers, config.prefetch_steps, config.read_timeout_seconds, self.mixture.describe_clip
        )

    def steps(self) -> Iterator[StepBatch]:
        """Yields the same steps, each read when it is requested, without a timeout."""
        readers = self.start_readers()
        yield from read_in_turn(self.read_steps(readers), readers, self.config.read_timeout_seconds)

    def start_readers(self) -> ReaderPool:
        return ReaderPool(self.read_pack, self.config.reader_threads, self.mixture.reader_lock)

    def read_steps(self, readers: ReaderPool) -> Iterator[StepBatch]:
        """Yields the steps in order; their packs are submitted ahead, see `submit_ahead`."""
        packs_per_rank = self.config.packs_per_step // self.data_size
        planned_steps = submit_ahead(self.planned_steps(), readers, packs_per_rank)
        for step, (planned, results) in enumerate(planned_steps, self.first_step):
            yield self.build_step(step, planned, list(results()))
            del results  # else its packs would be kept alive while the next step is read

    def planned_steps(self) -> Iterator[tuple[PlannedStep, list[PlannedPack]]]:
        """Each step, and its packs on this rank."""
        for planned in self.plan.steps(self.cursor):
            local_packs = assign_packs_to_ranks(planned.costs, self.data_size)[self.data_rank]
            yield planned, [planned.packs[b] for b in local_packs]

    def read_pack(self, pack: PlannedPack, begin: Callable[[int], None]) -> PackRead:
        """Reads clips to their place in the pack. If one is left out, those after it move up."""
        clips, token_counts = pack.clips.tolist(), pack.tokens.tolist()
        buffer = PackBuffer(self.buffers.acquire(), self.config.tokens_per_pack, self.mixture.dtype)
        clip_buffers = buffer.patches_LP[: sum(token_counts)].split(token_counts)
        records: list[Record] = []
        damaged: list[DamagedTar] = []
        for clip, num_kept, out_LP in zip(clips, token_counts, clip_buffers, strict=True):
            begin(clip)
            try:
                positions = self.kept_positions(clip, num_kept, pack.epoch)
                records.append(self.mixture.read(clip, self.encode_caption, positions, out_LP))
            except DamagedTar as error:
                if self.config.max_damaged_fraction == 0:
                    raise
                error.sample_id = self.mixture.sample_id(clip)  # of the mixture: unique over its datasets
                damaged.append(error)
        records = records or [self.placeholder_record()]
        return make_batch(records, self.config.tokens_per_pack, None if damaged else buffer), damaged

    def kept_positions(self, clip: int, num_kept: int, epoch: int) -> Tensor | None:
        """int64: the positions of the tokens that are kept of an entry of the mixture; None: all are."""
        num_tokens = self.mixture.tokens_I.item(clip)
        if num_kept == num_tokens:
            return None
        start, sample_id = self.mixture.start_I.item(clip), self.mixture.sample_id(clip)
        return torch.from_numpy(draw_positions(self.seed, epoch, sample_id, start, num_tokens, num_kept))

    def build_step(self, step: int, planned: PlannedStep, reads: list[PackRead]) -> StepBatch:
        packs = [pack for pack, _ in reads]
        real_tokens = int(sum(pack.tokens.sum() for pack in planned.packs))
        damaged = [error for _, errors in reads for error in errors]
        all_tokens = int(sum(self.mixture.tokens_I[pack.clips].sum() for pack in planned.packs))
        shares = [self.share(pack, step) for pack in packs]
        return StepBatch(step, packs, shares, real_tokens, 1 - real_tokens / all_tokens, planned.next_cursor, damaged)

    def placeholder_record(self) -> Record:
        """A clip of one zero token, so that a pack without clips keeps its shapes."""
        manifest, dtype = self.mixture.manifest, self.mixture.dtype
        text = torch.zeros(1, manifest.text_dim) if self.encode_caption is None else self.encode_caption("")
        patches_LP = torch.zeros(1, manifest.patch_dim, dtype=dtype)
        return Record(PLACEHOLDER_ID, patches_LP, (1, 1, 1), text, (1.0, 1.0, 1.0, 0.0))

"""Packs for one data-parallel rank, step after step: a plan and the clips it names in, VideoBatches out.

The plan says which packs step s has and which of them are this rank's; reading follows it. Neither the number of ranks,
nor that of threads, nor a stop changes what a step trains on: the whole state is the plan's cursor.

A damaged clip ends the run. In tolerant mode (`data.max_bad_fraction`) it is left out of its pack, where its tokens
become padding, and told of; which ones are left out depends on the bytes of the shards alone.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.batch import VideoBatch
from megasora.config import DataConfig
from megasora.data.dropping import kept_places
from megasora.data.mixture import Mixture
from megasora.data.pack import Blank, Record, make_batch
from megasora.data.plan import Cursor, Plan, PlannedPack, PlannedStep, deal
from megasora.data.readers import Readers, Waiting
from megasora.data.slabs import Slabs
from megasora.data.tar import DamagedTar
from megasora.errors import DataError, MegaSoraError

NO_CLIP = -1  # the sample id of what stands in a pack none of whose clips could be read; it has no loss


@dataclass(frozen=True)
class Step:
    """What one optimizer step reads on this rank, and where the loader stands after it."""

    packs: list[VideoBatch]  # whole
    shares: list[VideoBatch]  # what of each this rank computes with
    real_tokens: int  # of all ranks, as planned
    dropped: float  # the fraction of their clips' tokens that is left out
    after: Cursor
    damaged: list[DamagedTar]  # what was left out of these packs


class PackLoader:
    def __init__(
        self,
        clips: Mixture,
        config: DataConfig,
        seed: int,
        encode: Callable[[str], Tensor] | None,
        attention_length: int,
        rank: int = 0,
        ranks: int = 1,
        cursor: Cursor | None = None,
        share: Callable[[VideoBatch], VideoBatch] = lambda pack: pack,
    ):
        """`rank` of `ranks`: of the data axis. `share`: from a pack to this rank's part of it, made ahead as well.

        `attention_length`: see Plan. Raises MegaSoraError where the ranks do not divide the packs of a step.
        """
        self.clips, self.config, self.seed, self.encode = clips, config, seed, encode
        self.rank, self.ranks, self.cursor, self.share = rank, ranks, cursor or Cursor(), share
        if config.packs_per_step % ranks:
            raise MegaSoraError(
                f"data.packs_per_step={config.packs_per_step} must be a multiple of the {ranks} data-parallel ranks"
            )
        self.plan = Plan(
            clips.tokens,
            clips.weights,
            config.tokens_per_pack,
            config.packs_per_step,
            config.lookahead,
            attention_length,
            seed,
            config.drop,
        )
        in_flight = (config.prefetch + 2) * config.packs_per_step // ranks
        size = Blank.bytes_of(config.tokens_per_pack, clips.manifest.patch_dim, clips.dtype)
        self.slabs = Slabs(size, in_flight)

    def __iter__(self) -> Iterator[Step]:
        """Endless; `config.prefetch` steps are read ahead by a thread, whose errors are raised here.

        Raises DataError that names the tar where a clip is being read for more than `config.timeout` seconds.
        """
        steps: queue.Queue = queue.Queue(maxsize=self.config.prefetch)
        patience, readers, stop = self.config.timeout, self.readers(), threading.Event()

        def put(item: object) -> bool:
            while not stop.is_set():
                try:
                    steps.put(item, timeout=0.2)
                    return True
                except queue.Full:
                    continue
            return False

        def read_ahead() -> None:
            try:
                for step in self.read_steps(readers):
                    if not put(step):
                        return
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=read_ahead, name="pack-loader", daemon=True)
        thread.start()
        try:
            while True:
                try:
                    item = steps.get(timeout=min(1.0, patience / 4))
                except queue.Empty:
                    self.check_progress(readers)
                    continue
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            readers.close()
            slowest = readers.slowest()
            if slowest is None or slowest[1] <= patience:  # a thread that hangs is left behind
                thread.join(patience)
                readers.join(patience)

    def check_progress(self, readers: Readers) -> None:
        slowest = readers.slowest()
        if slowest is not None and slowest[1] > self.config.timeout:
            raise DataError(
                f"{self.clips.where(slowest[0])}: reading it has taken {slowest[1]:.1f} s, more than "
                f"data.timeout={self.config.timeout:g}; see whether its disk or its server answers, or raise the time"
            )

    def steps(self) -> Iterator[Step]:
        """The same, read when asked for, without a limit of time."""
        readers = self.readers()
        try:
            yield from self.read_steps(readers)
        finally:
            readers.close()
            readers.join(self.config.timeout)

    def readers(self) -> Readers:
        return Readers(self.read_pack, self.config.threads)

    def read_steps(self, readers: Readers) -> Iterator[Step]:
        """While a step is put together, threads read the next: as many as give each of them a pack."""
        ahead = -(-readers.count * self.ranks // self.config.packs_per_step)
        asked: deque = deque()
        for planned in self.plan.steps(self.cursor):
            mine = deal(planned.costs, self.ranks)[self.rank]
            asked.append((planned, readers.ask([planned.packs[m] for m in mine])))
            if len(asked) > ahead:
                planned, read = asked.popleft()
                yield self.make_step(planned, list(read()))
                del read  # else its packs are held while the next step is waited for

    def read_pack(
        self, pack: PlannedPack, begin: Callable[[int], None], waiting: Waiting
    ) -> tuple[VideoBatch, list[DamagedTar]]:
        """Clips are read to where they stay in the pack; where one is left out, what is behind it moves up."""
        numbers, tokens = pack.clips.tolist(), pack.tokens.tolist()
        blank = Blank(self.slabs.take(), self.config.tokens_per_pack, self.clips.dtype)
        parts = blank.patches_LP[: sum(tokens)].split(tokens)
        good: list[Record] = []
        damaged: list[DamagedTar] = []
        for number, kept, into_LP in zip(numbers, tokens, parts, strict=True):
            begin(number)
            try:
                places = self.places(number, kept, pack.epoch)
                good.append(self.clips.read(number, self.encode, places, into_LP, waiting))
            except DamagedTar as error:
                if self.config.max_bad_fraction == 0:
                    raise
                error.sample_id = self.clips.sample_id(number)  # of the run: several datasets may number theirs alike
                damaged.append(error)
        batch = make_batch(good or [self.no_clip()], self.config.tokens_per_pack, None if damaged else blank)
        return batch, damaged

    def places(self, number: int, kept: int, epoch: int) -> Tensor | None:
        """Of the tokens that are kept of a clip; None: of all."""
        tokens = self.clips.tokens_N.item(number)
        if kept == tokens:
            return None
        first, sample_id = self.clips.start_N.item(number), self.clips.sample_id(number)
        return torch.from_numpy(kept_places(self.seed, epoch, sample_id, first, tokens, kept))

    def make_step(self, planned: PlannedStep, read: list[tuple[VideoBatch, list[DamagedTar]]]) -> Step:
        packs = [pack for pack, _ in read]
        real_tokens = int(sum(pack.tokens.sum() for pack in planned.packs))
        damaged = [error for _, errors in read for error in errors]
        dropped = 1 - real_tokens / int(sum(self.clips.tokens_N[pack.clips].sum() for pack in planned.packs))
        return Step(packs, [self.share(pack) for pack in packs], real_tokens, dropped, planned.after, damaged)

    def no_clip(self) -> Record:
        """One token, so that a pack keeps its shapes."""
        manifest, dtype = self.clips.manifest, self.clips.dtype
        text = torch.zeros(1, manifest.text_dim) if self.encode is None else self.encode("")
        return Record(NO_CLIP, torch.zeros(1, manifest.patch_dim, dtype=dtype), (1, 1, 1), text, (1.0, 1.0, 1.0, 0.0))

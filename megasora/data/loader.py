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
from megasora.data.mixture import Mixture
from megasora.data.pack import Record, make_batch
from megasora.data.plan import Cursor, Plan, PlannedStep, deal
from megasora.data.readers import Readers
from megasora.data.tar import DamagedTar
from megasora.errors import DataError, MegaSoraError

NO_CLIP = -1  # the sample id of what stands in a pack none of whose clips could be read; it has no loss


@dataclass(frozen=True)
class Step:
    """What one optimizer step reads on this rank, and where the loader stands after it."""

    packs: list[VideoBatch]  # whole
    shares: list[VideoBatch]  # what of each this rank computes with
    real_tokens: int  # of all ranks, as planned
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
        self.clips, self.config, self.encode = clips, config, encode
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
        )
        self.bad: set[int] = set()  # numbers of the damaged clips that this rank has met

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
                f"{self.clips.where(slowest[0])}: reading it has taken {slowest[1]:.1f} s, more than data.timeout="
                f"{self.config.timeout:g}; see whether its disk or its server answers, or raise the time"
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
        return Readers(self.read, self.config.threads)

    def read_steps(self, readers: Readers) -> Iterator[Step]:
        """While a step is put together, threads read the next."""
        asked: deque = deque()
        for planned in self.plan.steps(self.cursor):
            mine = [planned.packs[m] for m in deal(planned.costs, self.ranks)[self.rank]]
            asked.append((planned, mine, readers.ask([int(i) for pack in mine for i in pack])))
            if len(asked) > min(1, readers.count):
                planned, mine, clips = asked.popleft()
                yield self.make_step(planned, [len(pack) for pack in mine], clips())

    def read(self, number: int) -> Record | DamagedTar:
        try:
            return self.clips.read(number, self.encode)
        except DamagedTar as error:
            if self.config.max_bad_fraction == 0:
                raise
            self.bad.add(number)
            if len(self.bad) > self.config.max_bad_fraction * len(self.clips) / self.ranks:
                raise DataError(
                    f"{len(self.bad)} damaged clips on one of {self.ranks} data-parallel ranks are more than its part "
                    f"of data.max_bad_fraction={self.config.max_bad_fraction:g} of {len(self.clips)} clips; the last: "
                    f"{error}"
                ) from None
            return error

    def make_step(self, planned: PlannedStep, sizes: list[int], clips: Iterator[Record | DamagedTar]) -> Step:
        packs, damaged = [], []
        for size in sizes:
            read = [next(clips) for _ in range(size)]
            damaged += [clip for clip in read if isinstance(clip, DamagedTar)]
            good = [clip for clip in read if isinstance(clip, Record)]
            packs.append(make_batch(good or [self.no_clip()], self.config.tokens_per_pack))
        real_tokens = int(sum(self.clips.tokens_N[pack].sum() for pack in planned.packs))
        return Step(packs, [self.share(pack) for pack in packs], real_tokens, planned.after, damaged)

    def no_clip(self) -> Record:
        """One token, so that a pack keeps its shapes."""
        manifest = self.clips.manifest
        text = torch.zeros(1, manifest.text_dim) if self.encode is None else self.encode("")
        return Record(NO_CLIP, torch.zeros(1, manifest.patch_dim), (1, 1, 1), text, (1.0, 1.0, 1.0, 0.0))

"""Packs for one data-parallel rank, step after step.

Step s of the run takes the next `packs_per_step` packs of the plan; rank r of n gets numbers r, r + n, ... of them. The
plan is a pure function of (seed, epoch), so the whole state is a cursor: an epoch and the number of packs used of it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from megasora.batch import VideoBatch
from megasora.config import DataConfig
from megasora.data.pack import make_batch, plan_epoch
from megasora.data.shards import Shards
from megasora.errors import MegaSoraError


@dataclass(frozen=True)
class Cursor:
    epoch: int = 0
    pack: int = 0


@dataclass(frozen=True)
class Step:
    """What one optimizer step reads on this rank, and where the loader stands after it."""

    packs: list[VideoBatch]  # whole
    shares: list[VideoBatch]  # what of each this rank computes with
    real_tokens: int  # of all ranks
    after: Cursor


class PackLoader:
    def __init__(
        self,
        shards: Shards,
        config: DataConfig,
        seed: int,
        encode: Callable[[str], Tensor] | None,
        rank: int = 0,
        ranks: int = 1,
        cursor: Cursor | None = None,
        share: Callable[[VideoBatch], VideoBatch] = lambda pack: pack,
    ):
        """`rank` of `ranks`: of the data axis. `share`: from a pack to this rank's part of it, made ahead as well."""
        self.shards, self.config, self.seed, self.encode = shards, config, seed, encode
        self.rank, self.ranks, self.cursor, self.share = rank, ranks, cursor or Cursor(), share
        self.tokens = shards.tokens()
        if len(shards) == 0:
            raise MegaSoraError(f"data.shards={shards.folder} has no clip in its {shards.split} split; ingest some")
        longest = int(self.tokens.argmax())
        if self.tokens[longest] > config.tokens_per_pack:
            raise MegaSoraError(
                f"data.tokens_per_pack={config.tokens_per_pack} is less than the {self.tokens[longest]} tokens of "
                f"sample {shards.entries[longest].sample_id} ({shards.meta(longest)['source']}); raise it or leave the "
                "clip out"
            )
        if config.packs_per_step % ranks:
            raise MegaSoraError(
                f"data.packs_per_step={config.packs_per_step} must be a multiple of the {ranks} data-parallel ranks"
            )

    def __iter__(self) -> Iterator[Step]:
        """Endless; `config.prefetch` steps are read ahead by a thread, whose errors are raised here."""
        steps: queue.Queue = queue.Queue(maxsize=self.config.prefetch)
        stop = threading.Event()

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
                for step in self.steps():
                    if not put(step):
                        return
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=read_ahead, name="pack-loader", daemon=True)
        thread.start()
        try:
            while True:
                item = steps.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def steps(self) -> Iterator[Step]:
        """The same, read when asked for."""
        cursor, plan = self.cursor, self.plan(self.cursor.epoch)
        while True:
            packs = []
            while len(packs) < self.config.packs_per_step:
                if cursor.pack >= len(plan):
                    cursor = Cursor(cursor.epoch + 1, 0)
                    plan = self.plan(cursor.epoch)
                packs.append(plan[cursor.pack])
                cursor = Cursor(cursor.epoch, cursor.pack + 1)
            mine = [
                make_batch([self.shards.read(i, self.encode) for i in pack], self.config.tokens_per_pack)
                for pack in packs[self.rank :: self.ranks]
            ]
            real_tokens = int(sum(self.tokens[pack].sum() for pack in packs))
            yield Step(mine, [self.share(pack) for pack in mine], real_tokens, cursor)

    def plan(self, epoch: int) -> list[list[int]]:
        return plan_epoch(self.tokens, self.config.tokens_per_pack, self.config.lookahead, self.seed, epoch)

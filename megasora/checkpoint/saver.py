"""Saves a run: each rank writes its own file, hashed while it is written; the main process gathers the digests.

    save     main process: staging folder, if the disk has room (or the first process of each node, see node_target.py)
             all ranks: copy of their values in host memory, if asynchronous; a thread writes the file, training goes on
    advance  after each step, all ranks: once all have written, the main process gathers the digests; a thread of it
             writes state.json and manifest.json and renames the folder
    wait     until the checkpoint is visible: before the next save, a rollback, a stop, the end

A save has the same bytes whether it is asynchronous or not. An error of any rank is raised on all of them, by the next
step, and nothing of the save is left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megasora.checkpoint.ranks import Ranks, failure_of, raise_first
from megasora.checkpoint.save_target import SaveTarget, SharedTarget
from megasora.checkpoint.sharded import RankFile, saved_part
from megasora.checkpoint.store import CheckpointStore
from megasora.fragment import Fragment

POLL_SECONDS = 0.2  # between two looks of `wait` at what all ranks have written
Replicas = Callable[[Fragment], tuple[int, int]]


class Task(threading.Thread):
    """Calls `action()` in a thread; then `result` or `error`."""

    def __init__(self, action: Callable[[], Any], name: str):
        super().__init__(name=name, daemon=True)
        self.action, self.result, self.error = action, None, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.action()
        except BaseException as error:  # raised on all ranks by `advance`
            self.error = error


class Cancelled(Exception):
    """Another rank has failed."""


class HostCopy:
    """A copy of tensors in host memory, which is allocated once; pinned if they are on a GPU."""

    def __init__(self, values: list[Tensor]):
        self.values = values
        self.on_gpu = any(x.is_cuda for x in values)
        flat = torch.empty(sum(x.numel() for x in values), pin_memory=self.on_gpu)
        self.copies = list(flat.split([x.numel() for x in values]))

    @torch.no_grad()
    def take(self) -> list[Tensor]:
        for copy, values in zip(self.copies, self.values, strict=True):
            copy.copy_(values, non_blocking=self.on_gpu)
        if self.on_gpu:
            torch.cuda.synchronize()
        return self.copies


@dataclass
class Save:
    """A save that is not yet visible. `task` of this rank: writing its file, then, on those that commit, the commit."""

    target: SaveTarget
    step: int
    state: dict[str, Any]
    task: Task
    is_written: bool = False  # by all ranks


class CheckpointSaver:
    """Saves the checkpoints of a run, as one rank sees them. All ranks must call each method, at the same point.

    `fragments`: all of this rank, with live values. `replicas(fragment)`: (index of this rank among the ranks that hold
    the same fragment, their number); they share the work. `on_saved(save)` is called on all ranks once a save is
    visible. Raises ValueError if fragments have different kinds.
    """

    def __init__(
        self,
        store: CheckpointStore,
        fragments: list[Fragment],
        replicas: Replicas,
        ranks: Ranks,
        asynchronous: bool = False,
        on_saved: Callable[[Save], None] = lambda save: None,
    ):
        kinds = {tuple(fragment.values) for fragment in fragments}
        if len(kinds) > 1:
            raise ValueError(f"all fragments need the same kinds of values, not {sorted(kinds)}")
        # replicated ones first: they are small, and between large ones each would cost a reader a block of its own
        in_order = sorted(fragments, key=lambda f: replicas(f)[1] == 1)
        parts = [saved_part(f, *replicas(f)) for f in in_order]
        self.store, self.fragments, self.ranks, self.asynchronous = store, fragments, ranks, asynchronous
        self.shared, self.on_saved = SharedTarget(store, ranks), on_saved
        self.file = RankFile(ranks.rank, [part for part in parts if part is not None])
        self.copy: HostCopy | None = None
        self.current: Save | None = None
        self.stage = 0  # number of times that a save began, went on or ended; the same on all ranks
        self.bytes_written, self.cancelled = 0, threading.Event()

    # ---------------------------------------------------------------- saving

    def save(
        self,
        step: int,
        state: dict[str, Any],
        heartbeat: Callable[[str], None] = lambda activity: None,
        target: SaveTarget | None = None,
    ) -> None:
        """Begins to save a checkpoint, after waiting for the one before; returns when it is visible, or as soon as the
        values may change if the saver is asynchronous. `state`: JSON values; those of the main process count.
        `target`: None for the run folder."""
        self.wait(heartbeat)
        target = target or self.shared
        target.begin(step, state, self.file)
        if self.asynchronous:
            self.copy = self.copy or HostCopy(self.file.values)
        values = self.copy.take() if self.copy is not None else self.file.values
        task = Task(lambda: target.write(step, self.file, values, self.count), "save")
        self.current, self.stage = Save(target, step, state, task), self.stage + 1
        if not self.asynchronous:
            self.wait(heartbeat)

    def count(self, size: int) -> None:
        if self.cancelled.is_set():
            raise Cancelled
        self.bytes_written += size

    # ---------------------------------------------------------------- progress

    def progress(self) -> tuple[int, int]:
        """(1 if this rank's thread is at work, 1 if it has failed) in the present `stage`; `advance` needs the sums
        over all ranks."""
        if self.current is None:
            return 0, 0
        task = self.current.task
        return int(task.is_alive()), int(not task.is_alive() and task.error is not None)

    def advance(self, busy: float, failed: float) -> None:
        """Goes on with the save under way. Raises the error of a rank on all ranks. `busy`, `failed`: sums of
        `progress` over all ranks, of the present `stage`."""
        if self.current is None:
            return
        if failed or not busy:
            self.stage += 1
        if failed:
            self.give_up()
        elif not busy and not self.current.is_written:
            self.commit()
        elif not busy:
            save, self.current = self.current, None
            self.on_saved(save)

    def commit(self) -> None:
        """All ranks have written."""
        save = self.current
        action = save.target.commit(save.step, save.state, save.task.result)
        save.is_written = True
        if action is not None:
            save.task = Task(action, "commit")

    def give_up(self) -> None:
        """Ends the save on all ranks, removes what is written, and raises the error of the first rank that has one."""
        save, self.current = self.current, None
        self.cancelled.set()
        save.task.join()
        self.cancelled.clear()
        error = None if isinstance(save.task.error, Cancelled) else save.task.error
        save.target.discard(save.step)
        raise_first(self.ranks, failure_of(error))

    def wait(self, heartbeat: Callable[[str], None] = lambda activity: None) -> None:
        """Until the save under way is visible; `heartbeat(activity)` is called while any rank goes on writing."""
        seen = -1.0
        while self.current is not None:
            self.current.task.join(POLL_SECONDS)
            own = torch.tensor([*self.progress(), self.bytes_written], dtype=torch.float64)
            busy, failed, written = self.ranks.all_reduce_sum(own).tolist()
            if written != seen:
                heartbeat(f"the save after step {self.current.step}")
            seen = written
            self.advance(busy, failed)

"""The checkpoints of a run: which save is due after a step and where it goes, and what the run resumes from.

After every checkpoint.every steps, the last one and a stop request: to the run folder. After every
checkpoint.node.every others: to the disks of the nodes, if checkpoint.node.dir is set. One save at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megasora.checkpoint.history import read_history
from megasora.checkpoint.loader import CheckpointLoader
from megasora.checkpoint.node_resume import print_line, promote
from megasora.checkpoint.node_store import (
    IDS,
    KEY,
    NodeIds,
    NodeStore,
    new_id,
    prepare,
    read_ids,
    run_folder,
    write_ids,
)
from megasora.checkpoint.node_target import Channel, NodeTarget
from megasora.checkpoint.nodes import NodeRanks, Nodes, find_nodes
from megasora.checkpoint.ranks import attempt, on_all, on_main, raise_first
from megasora.checkpoint.save_target import SaveTarget
from megasora.checkpoint.saver import CheckpointSaver, Replicas, Save
from megasora.checkpoint.start import begins
from megasora.checkpoint.store import CheckpointStore, Retention
from megasora.config.schema import CheckpointConfig
from megasora.errors import MegaSoraError, describe
from megasora.files import check_folder
from megasora.fragment import Fragment

OpenChannel = Callable[[str, int, int, int], Channel]  # (name, sender, receiver, own rank)


class RunCheckpoints:
    """All ranks call `resume` once, then `save_if_due` after each step, and the methods of `saver`.

    `fragments`, `replicas`: see CheckpointSaver; `optional_kinds`: see CheckpointLoader. `open_channel`: makes one end
    of a channel between two ranks, as `megasora.parallel.channel.Channel` does.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: CheckpointConfig,
        fragments: list[Fragment],
        replicas: Replicas,
        optional_kinds: frozenset[str],
        ranks: NodeRanks,
        open_channel: OpenChannel,
        heartbeat: Callable[[str], None],
    ):
        self.run_dir, self.settings, self.ranks = run_dir, settings, ranks
        self.open_channel, self.heartbeat = open_channel, heartbeat
        retention = Retention(settings.keep, settings.keep_every, settings.keep_best)
        self.store = CheckpointStore(run_dir / "checkpoints", retention)
        self.saver = CheckpointSaver(self.store, fragments, replicas, ranks, settings.asynchronous, self.after_save)
        self.loader = CheckpointLoader(self.store, fragments, ranks, optional_kinds, heartbeat)
        self.node: NodeTarget | None = None  # made by `resume`

    # ---------------------------------------------------------------- saving

    def save_if_due(self, step: int, must_save: bool, state: Callable[[], dict[str, Any]]) -> None:
        """Begins to save after `step` if that is due; a synchronous save is visible afterwards. `must_save`: to the run
        folder. `state()`: JSON values for state.json."""
        target = self.due(step, must_save)
        if target is not None:
            self.heartbeat(f"the save after step {step}")
            self.saver.save(step, state(), self.heartbeat, target)

    def due(self, step: int, must_save: bool) -> SaveTarget | None:
        """Where a checkpoint of this step goes; None if none is due, or it is left out because another is under way:
        one to the run folder gives way to none on the nodes."""
        busy = self.saver.current.target if self.saver.current is not None else None
        skips, shared = self.settings.when_busy == "skip", self.saver.shared
        if must_save:
            return shared
        if step % self.settings.every == 0:
            return None if skips and busy is shared else shared
        if self.node is not None and step % self.settings.node.every == 0:
            return None if skips and busy else self.node
        return None

    def after_save(self, save: Save) -> None:
        if self.node is not None:
            self.node.after_save(save)

    def finish(self) -> None:
        """Waits for the save under way; before the end of the launch."""
        self.saver.wait(self.heartbeat)
        if self.node is not None:
            self.node.finish()

    # ---------------------------------------------------------------- starting

    def resume(self, start: str) -> dict[str, Any] | None:
        """See `CheckpointLoader.resume`; before it, what is newer on the disks of the nodes is put into the run folder,
        if `run.start=start` resumes the newest checkpoint."""
        if not self.settings.node.dir:
            on_main(self.ranks, self.forget_nodes)
            return self.loader.resume(start)
        nodes, ids = find_nodes(self.ranks), on_main(self.ranks, lambda: read_ids(self.run_dir))
        folder = on_all(self.ranks, lambda: run_folder(self.settings.node.dir, ids))
        check_own_folders(folder, self.settings.node.dir, self.ranks, nodes)
        self.loader.check_same_view()
        if not on_main(self.ranks, lambda: resumes_newest(self.run_dir, start)):
            self.begin_launch(ids)  # before the choice is made: a later launch may follow it
        elif ids.launch:
            promote(NodeStore(folder / ids.launch), self.store, self.ranks, self.heartbeat)
        state = self.loader.resume(start)
        ids = self.begin_launch(ids)
        self.node = self.build_node_target(NodeStore(folder / ids.launch), nodes)
        return state

    def begin_launch(self, ids: NodeIds) -> NodeIds:
        """From now on what the nodes have of earlier launches is not used."""
        ids = dataclasses.replace(ids, launch=new_id() if self.ranks.rank == 0 else "")
        return on_main(self.ranks, lambda: write_ids(self.run_dir, ids))

    def forget_nodes(self) -> None:
        """So that a later launch does not resume from what the nodes have, while this one trains on without them."""
        if (self.run_dir / IDS).exists():
            print_line(f"{KEY} is not set, those of earlier launches are not used")
            (self.run_dir / IDS).unlink()

    def build_node_target(self, store: NodeStore, nodes: Nodes) -> NodeTarget:
        channels = {}
        raise_first(self.ranks, self.ranks.share_on_node(lambda: attempt(lambda: prepare(store))))
        if self.settings.node.copy and len(nodes) > 1:
            rank = self.ranks.rank
            channels = {pair: self.open_channel(store.folder.name, *pair, rank) for pair in nodes.pairs_of(rank)}
        elif self.settings.node.copy and self.ranks.rank == 0:
            print_line("all processes are on one machine, so there are no copies on another one")
        return NodeTarget(store, self.ranks, nodes, channels, self.settings.node.keep)


def resumes_newest(run_dir: Path, start: str) -> bool:
    """Whether a launch with this `run.start` resumes the newest checkpoint, if there is one."""
    _, _, name = start.partition(":")
    return not begins(run_dir, start) and (not name or read_history(run_dir).start == start)


def check_own_folders(folder: Path, setting: str, ranks: NodeRanks, nodes: Nodes) -> None:
    """Makes `folder`, that of the run, on each node. Raises MegaSoraError or OSError on all ranks if that fails, or two
    nodes see the same one. `setting`: checkpoint.node.dir."""
    marks = f".node-{ranks.broadcast_object(new_id() if ranks.rank == 0 else None)}-"
    own = folder / f"{marks}{nodes.number_of(ranks.rank)}.part"

    def mark() -> None:
        check_folder(folder, f"{KEY}={setting}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own.touch()
        except OSError as error:
            raise MegaSoraError(f"{KEY}={setting}: {describe(error)} (on the node of process {ranks.node})") from None

    def check() -> None:
        others = [path for path in folder.glob(f"{marks}*") if path != own]
        if others:
            raise MegaSoraError(
                f"{KEY}={setting} is the same folder on several machines; give one on each node's own disk"
            )

    try:
        raise_first(ranks, ranks.share_on_node(lambda: attempt(mark)))
        raise_first(ranks, ranks.share_on_node(lambda: attempt(check)))
    finally:
        if ranks.local_rank == 0:
            with suppress(OSError):
                own.unlink(missing_ok=True)
                folder.rmdir()  # if nothing else is in it

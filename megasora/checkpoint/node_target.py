"""Saves to the disks of the nodes, with a copy of the files of each node on the next one.

    begin    main process: the text of state.json, to all nodes; first process of each node: staging folders
    write    each rank, in its threads: writes its file, and sends it to a rank of the next node;
                                        receives that of a rank of the node before, writes and verifies it
    commit   first process of each node: manifests of its own part and of the copy
    keep     after all nodes have committed, the first process of each node deletes older parts

So a step that is deleted on one node is older than one that is whole on all.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from megasora.checkpoint.fragment_file import WrittenFile
from megasora.checkpoint.node_copy import Channel, SenderFailed, receive_file, send_failure, send_file
from megasora.checkpoint.node_store import NodeStore, Part
from megasora.checkpoint.nodes import NodeRanks, Nodes
from megasora.checkpoint.ranks import attempt, raise_first
from megasora.checkpoint.save_target import OnWritten
from megasora.checkpoint.saver import Cancelled, Save, Task
from megasora.checkpoint.sharded import RankFile, rank_file_name
from megasora.checkpoint.store import state_text

Written = list[tuple[int, str, WrittenFile]]  # (node, name, file)


class NodeTarget:
    """See `SaveTarget`. `channels`: to and from other nodes, by (sender, receiver); empty: no copies."""

    def __init__(
        self, store: NodeStore, ranks: NodeRanks, nodes: Nodes, channels: Mapping[tuple[int, int], Channel], keep: int
    ):
        self.store, self.ranks, self.nodes, self.keep = store, ranks, nodes, keep
        self.own, self.is_first = nodes.number_of(ranks.rank), ranks.local_rank == 0
        self.outgoing = next((c for (sender, _), c in channels.items() if sender == ranks.rank), None)
        self.incoming = {sender: c for (sender, _), c in channels.items() if sender != ranks.rank}
        self.stored = [self.own, (self.own - 1) % len(nodes)] if channels else [self.own]  # parts on this node
        self.bytes: list[float] = []  # of the files of each node
        self.text, self.parts = "", dict[int, Part]()  # of the save under way
        self.receivers: dict[int, Task] = {}
        self.deleting: Task | None = None

    def begin(self, step: int, state: dict[str, Any], file: RankFile) -> None:
        texts = (state_text(step, state), secrets.token_hex(8)) if self.ranks.rank == 0 else None
        self.text, save = self.ranks.broadcast_object(texts)
        bounds = {k: self.nodes.ranks(k) for k in self.stored}
        self.parts = {k: Part(save, k, len(self.nodes), r.start, r.stop) for k, r in bounds.items()}
        if not self.bytes:
            sizes = torch.zeros(len(self.nodes), dtype=torch.float64)
            sizes[self.own] = file.size
            self.bytes = self.ranks.all_reduce_sum(sizes).tolist()
        failure = self.ranks.share_on_node(lambda: attempt(lambda: self.begin_on_node(step)))
        try:
            raise_first(self.ranks, failure)
        except BaseException:
            self.discard(step)
            raise

    def begin_on_node(self, step: int) -> None:
        """On the first process of each node. Raises also what the last deletion has raised."""
        self.wait_for_deletion()
        if self.deleting is not None and self.deleting.error is not None:
            raise self.deleting.error
        self.store.begin(step, self.stored, int(sum(self.bytes[k] for k in self.stored)))

    def write(self, step: int, file: RankFile, values: Iterable[Tensor], on_written: OnWritten) -> Written:
        own, before = self.store.staging_dir(step, self.own), self.store.staging_dir(step, self.stored[-1])
        self.receivers = {
            rank: Task(lambda r=rank, c=channel: receive_file(c, before / rank_file_name(r), on_written), "receive")
            for rank, channel in self.incoming.items()
        }
        try:
            written = file.write(own, values, on_written)
        except BaseException:
            if self.outgoing is not None:
                send_failure(self.outgoing)
            raise
        if self.outgoing is not None:
            send_file(self.outgoing, own / file.name, written, on_written)
        return [(self.own, file.name, written), *self.received()]

    def received(self) -> Written:
        """Waits for the copies of other ranks' files."""
        files = []
        for rank, task in self.receivers.items():
            task.join()
            if isinstance(task.error, SenderFailed):
                raise Cancelled
            if task.error is not None:
                raise task.error
            files.append((self.stored[-1], rank_file_name(rank), task.result))
        return files

    def commit(self, step: int, state: dict[str, Any], written: Written) -> Callable[[], object] | None:
        of_node = self.ranks.gather_on_node(written)
        if of_node is None:
            return None
        text, parts = self.text, self.parts
        files: dict[int, dict[str, WrittenFile]] = {k: {} for k in parts}
        for node, name, file in (entry for entries in of_node for entry in entries):
            files[node][name] = file

        def commit_parts() -> None:
            for node, part in parts.items():
                self.store.commit(step, part, text, files[node])

        return commit_parts

    def discard(self, step: int) -> None:
        """Also waits for what is still being received; its senders have ended, too."""
        for task in self.receivers.values():
            task.join()
        self.receivers = {}
        if self.is_first:
            self.store.discard(step, self.stored)

    # ---------------------------------------------------------------- deleting

    def after_save(self, save: Save) -> None:
        """Once a save is visible everywhere, here or in the run folder: deletes in a thread what is not kept."""
        if self.is_first:
            self.wait_for_deletion()
            superseded = -1 if save.target is self else save.step
            self.deleting = Task(lambda: self.store.keep_newest(self.keep, superseded), "delete")

    def wait_for_deletion(self) -> None:
        if self.deleting is not None:
            self.deleting.join()

    def finish(self) -> None:
        """Before the end of a launch: removes the folder if it is empty, as after a save to the run folder."""
        if self.is_first:
            self.wait_for_deletion()
            with suppress(OSError):
                self.store.folder.rmdir()
                self.store.folder.parent.rmdir()

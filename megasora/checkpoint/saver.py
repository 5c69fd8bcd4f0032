"""Saves and loads a run: the fragments of all ranks and one JSON object.

save       main process: staging folder; all ranks: their fragments; main process: state.json, checksums, commit
load_newest    all ranks: verify checksums, read state.json, load this rank's fragments
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megasora.checkpoint.sharded import ShardedCheckpoint, write_fragments
from megasora.checkpoint.store import CheckpointStore, remove_incomplete, verify_checksums
from megasora.files import write_text_atomic
from megasora.fragment import Fragment

STATE_FILE = "state.json"


class CheckpointSaver:
    """The checkpoints of a run, as one rank sees them. Call `save` and `load_newest` on all ranks.

    `fragments`: all of this rank, with live values. `is_primary(fragment)`: whether this rank writes it; of replicas,
    one rank does. `barrier()` waits for all ranks. Raises ValueError if fragments have different kinds of values.
    """

    def __init__(
        self,
        store: CheckpointStore,
        fragments: list[Fragment],
        is_primary: Callable[[Fragment], bool],
        rank: int,
        barrier: Callable[[], None],
    ):
        kinds = {tuple(fragment.values) for fragment in fragments}
        if len(kinds) > 1:
            raise ValueError(f"all fragments need the same kinds of values, not {sorted(kinds)}")
        self.store, self.fragments, self.is_primary = store, fragments, is_primary
        self.rank, self.barrier = rank, barrier

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint; the main process makes it visible once all ranks have written. `state`: JSON values."""
        is_main = self.rank == 0
        if is_main:
            self.store.begin(step)
        self.barrier()
        staging = self.store.staging_dir(step)
        write_fragments(staging, self.rank, [f for f in self.fragments if self.is_primary(f)])
        self.barrier()
        if is_main:
            write_text_atomic(staging / STATE_FILE, json.dumps({"step": step, **state}) + "\n")
            self.store.commit(step)
        self.barrier()

    def load_newest(self) -> dict[str, Any] | None:
        """Loads the newest checkpoint into the fragments; returns its state with `step`, or None if there is none.

        Raises MegaSoraError with the file's name if it is damaged or does not fit.
        """
        newest = self.store.newest()
        state = None
        if newest is not None:
            verify_checksums(newest)
            state = read_state(newest)
            checkpoint = ShardedCheckpoint(newest)
            for fragment in self.fragments:
                checkpoint.load_into(fragment)
        if self.rank == 0:
            self.store.folder.mkdir(parents=True, exist_ok=True)
            remove_incomplete(self.store.folder)
        self.barrier()
        return state


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))

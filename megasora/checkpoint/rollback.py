"""Takes the fragments of a running run back to an earlier checkpoint.

The checkpoint depends on the steps of the run alone: one that a stop request has saved is used only if there is no
other, so that a run that was stopped rolls back to the same weights as one that was not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megasora.checkpoint.loader import CheckpointLoader
from megasora.checkpoint.manifest import read_manifest, step_of
from megasora.checkpoint.ranks import on_main
from megasora.checkpoint.store import CheckpointStore
from megasora.errors import MegaSoraError


def roll_back(loader: CheckpointLoader, last_step: int, every: int) -> dict[str, Any] | None:
    """Loads the newest checkpoint of at most step `last_step` into the fragments; returns its state with `step`, or
    None if there is none. A damaged one is set aside, and the one before it is loaded. All ranks must call it.

    `every`: steps between two scheduled checkpoints. Raises MegaSoraError on all ranks if they see different files.
    """
    while True:
        chosen = on_main(loader.ranks, lambda: choose_earlier(loader.store, last_step, every))
        if chosen is None:
            return None
        checkpoint, digest = chosen
        state, damage = loader.load(checkpoint.name, digest)
        if not damage:
            return state
        on_main(loader.ranks, lambda path=checkpoint, text=damage: loader.set_aside(path, text))


def choose_earlier(store: CheckpointStore, last_step: int, every: int) -> tuple[Path, str] | None:
    """The checkpoint and the digest of its manifest, empty if that is damaged; None if there is no checkpoint."""
    earlier = [path for path in store.complete() if step_of(path.name) <= last_step]
    scheduled = [path for path in earlier if step_of(path.name) % every == 0]
    if not earlier:
        return None
    checkpoint = (scheduled or earlier)[-1]
    try:
        return checkpoint, read_manifest(checkpoint).digest
    except MegaSoraError:
        return checkpoint, ""  # loading it says what is wrong

"""`megasora checkpoint prune RUN`: deletes checkpoints that none of the given rules keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.history import read_history, write_history
from megasora.checkpoint.manifest import check_kind_and_size, read_manifest, step_of
from megasora.checkpoint.retention import to_delete
from megasora.checkpoint.store import CheckpointStore, names, read_state
from megasora.checkpoint.verify import verify_checkpoint
from megasora.errors import MegaSoraError, printable
from megasora.formats.recognize import check_format
from megasora.locks import locked
from megasora.run_log.launches import LOCK


def prune(run: Path, keep: int, keep_every: int, keep_best: int, dry_run: bool) -> None:
    """Prints a line per checkpoint and the bytes that are freed.

    Holds the lock of the run, so that no training uses it. A damaged checkpoint counts for no rule and stays. Raises
    MegaSoraError if the run trains, or a rule makes no sense.
    """
    check_format(run, "run")
    if keep < 1:
        raise MegaSoraError(f"--keep {keep} must be at least 1: the newest checkpoint is always kept")
    for name, value in (("--keep-every", keep_every), ("--keep-best", keep_best)):
        if value < 0:
            raise MegaSoraError(f"{name} {value} must be at least 0")
    store = CheckpointStore(run / "checkpoints")
    with locked(run / LOCK, f"run folder {run}"):
        losses, damaged = read_losses(store)
        deleted, freed = choose(store, losses, damaged, keep, keep_every, keep_best), 0
        for checkpoint in store.complete():
            step, size = step_of(checkpoint.name), bytes_of(checkpoint)
            if step in damaged:
                print(printable(f"{checkpoint.name}  kept, not counted: {damaged[step]}"))
                continue
            loss = "" if losses[step] is None else f", validation loss {losses[step]:.4f}"
            verdict = ("would be deleted" if dry_run else "deleted") if step in deleted else "kept"
            if step in deleted:
                freed += size
                if not dry_run:
                    store.delete(checkpoint)
            print(f"{checkpoint.name}  {verdict}: {size:,} bytes{loss}", flush=True)
        if deleted and not dry_run:
            history = read_history(run)
            write_history(run, dataclasses.replace(history, saved=names(store.complete())))
    done = "would be deleted" if dry_run else "deleted"
    print(f"{len(deleted)} of {len(losses) + len(damaged)} checkpoints {done}, {freed:,} bytes")


def choose(
    store: CheckpointStore, losses: dict[int, float | None], damaged: dict[int, str], keep: int, every: int, best: int
) -> set[int]:
    """The steps to delete. Every byte of those that are kept is read: one that is damaged moves from `losses` to
    `damaged`, and another is kept in its place."""
    verified: set[int] = set()
    while True:
        deleted = to_delete(losses, losses, keep, every, best)
        unread = sorted(losses.keys() - deleted - verified)
        if not unread:
            return deleted
        for step in unread:
            try:
                verify_checkpoint(store.path(step))
                verified.add(step)
            except DamagedCheckpoint as error:
                damaged[step] = error.problem
                del losses[step]


def read_losses(store: CheckpointStore) -> tuple[dict[int, float | None], dict[int, str]]:
    """(validation loss or None by step, what is wrong by step of those that are not whole), as manifest, state.json and
    the sizes of all files say."""
    losses, damaged = {}, {}
    for checkpoint in store.complete():
        step = step_of(checkpoint.name)
        try:
            if checkpoint.is_symlink():
                raise MegaSoraError(f"{checkpoint} is a link")
            manifest, loss = read_manifest(checkpoint), read_state(checkpoint).get("validation_loss")
            for name in manifest.files:
                check_kind_and_size(checkpoint, manifest, name)
            losses[step] = float(loss) if isinstance(loss, int | float) else None
        except (MegaSoraError, OSError) as error:
            damaged[step] = str(error)
    return losses, damaged


def bytes_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())

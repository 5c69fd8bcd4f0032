"""Folders of checkpoints: saving one atomically, finding the newest, setting damaged ones aside.

    RUN/checkpoints/step-00001000/     fragments/ (one file per rank, see sharded.py), state.json, manifest.json
    RUN/checkpoints/latest             the name of the newest one, for people and scripts; nothing depends on it

A save is written to the staging folder `.step-XXXXXXXX.part`; its files are flushed, their sizes and digests go to
manifest.json, and the folder is renamed; then `latest` and the history of the run (history.py) are replaced, and older
checkpoints are deleted as the retention policy says (retention.py). The newest
checkpoint whose files agree with its manifest is the one that counts. A damaged one is renamed to
`damaged-step-XXXXXXXX`, one that a run no longer follows to `superseded-step-XXXXXXXX`; both stay until somebody
deletes them.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.checkpoint.block_file import digest_of
from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.fragment_file import WrittenFile
from megasora.checkpoint.history import read_history, write_history
from megasora.checkpoint.manifest import MANIFEST, Manifest, read_json, read_manifest, step_of, write_manifest
from megasora.checkpoint.retention import to_delete
from megasora.checkpoint.verify import verify_checkpoint
from megasora.errors import MegaSoraError
from megasora.files import read_regular_file, sync, write_text_atomic

LATEST, STATE_FILE = "latest", "state.json"
MAX_LATEST_BYTES = 4096
DAMAGED, SUPERSEDED = "damaged", "superseded"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the `keep` newest, those at multiples of `every` steps, the `best` ones by validation
    loss; 0: none."""

    keep: int = 2
    every: int = 0
    best: int = 0


class CheckpointStore:
    """The checkpoints of one run, in `folder` of its run folder."""

    def __init__(self, folder: Path, retention: Retention = Retention()):  # noqa: B008  frozen
        self.folder, self.retention, self.run_dir = folder, retention, folder.parent

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    # ---------------------------------------------------------------- saving

    def begin(self, step: int, num_bytes: int = 0) -> Path:
        """Creates the empty staging folder; on the main process, before any rank writes. Then see `commit`.

        Raises OSError if the disk has no room for `num_bytes`.
        """
        staging = self.staging_dir(step)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            check_room(staging, num_bytes, f"the checkpoint of step {step}")
        except OSError:
            staging.rmdir()
            raise
        return staging

    def staging_dir(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.part"

    def commit(self, step: int, state: dict[str, Any], files: dict[str, WrittenFile]) -> Path:
        """Makes the save visible, and deletes older ones that are not kept; on the main process, once all have written.

        `state`: JSON values for state.json. `files`: what the ranks have written into the staging folder, by name.
        """
        staging, final = self.staging_dir(step), self.path(step)
        complete_folder(staging, step, {STATE_FILE: state_text(step, state)}, files)
        self.delete(final)
        os.replace(staging, final)
        for folder in (self.folder, self.run_dir):
            sync(folder)
        self.write_latest(final)
        older = [p for p in self.complete() if step_of(p.name) <= step]
        deleted = self.not_kept(older)
        kept = [p for p in older if p not in deleted]
        write_history(self.run_dir, dataclasses.replace(read_history(self.run_dir), saved=names(kept)))
        for old in deleted:
            self.delete(old)
        return final

    def not_kept(self, checkpoints: list[Path]) -> list[Path]:
        """Those that the retention policy does not keep."""
        keep, every, best = dataclasses.astuple(self.retention)
        losses = {step_of(p.name): validation_loss(p) if best else None for p in checkpoints}
        steps = to_delete(list(losses), losses, keep, every, best)
        return [p for p in checkpoints if step_of(p.name) in steps]

    def delete(self, checkpoint: Path) -> None:
        delete_folder(checkpoint)

    def write_latest(self, checkpoint: Path) -> None:
        if self.read_latest() != checkpoint.name:
            write_text_atomic(self.folder / LATEST, checkpoint.name + "\n")

    # ---------------------------------------------------------------- finding

    def complete(self) -> list[Path]:
        """Committed checkpoints, oldest first: all folders with such a name. They may have been damaged since."""
        folders = [path for path in self.folder.glob("step-*") if step_of(path.name) is not None]
        return sorted(folders, key=lambda path: step_of(path.name))

    def newest(self) -> Path | None:
        """The newest committed checkpoint, not verified; None if there is none."""
        return next(reversed(self.complete()), None)

    def read_latest(self) -> str:
        """What `latest` says; empty if it cannot be read."""
        try:
            return read_regular_file(self.folder / LATEST, MAX_LATEST_BYTES).decode("utf-8", errors="replace").strip()
        except OSError:
            return ""

    def has_set_aside(self, name: str) -> bool:
        """Whether the checkpoint of this name was renamed to damaged-NAME or superseded-NAME."""
        new_names = {f"{kind}-{name}" for kind in (DAMAGED, SUPERSEDED)}
        return any(re.sub(r"(-\d{8,})-\d+$", r"\1", path.name) in new_names for path in self.folder.glob("*-step-*"))

    # ---------------------------------------------------------------- setting aside

    def set_aside(self, checkpoint: Path, kind: str) -> Path:
        """Renames a checkpoint to KIND-step-XXXXXXXX, KIND-step-XXXXXXXX-2 ... `kind`: DAMAGED or SUPERSEDED."""
        target, number = self.folder / f"{kind}-{checkpoint.name}", 1
        while target.exists():
            number += 1
            target = self.folder / f"{kind}-{checkpoint.name}-{number}"
        history = read_history(self.run_dir)
        if checkpoint.name not in history.saved:  # so that the run is known to have saved, whatever is left
            write_history(self.run_dir, dataclasses.replace(history, saved=sorted([*history.saved, checkpoint.name])))
        os.replace(checkpoint, target)
        sync(self.folder)
        return target

    def make_newest(self, checkpoint: Path) -> list[Path]:
        """Sets later checkpoints aside and writes `latest`; the new names of the later ones."""
        later = [p for p in self.complete() if step_of(p.name) > step_of(checkpoint.name)]
        renamed = [self.set_aside(path, SUPERSEDED) for path in later]
        self.write_latest(checkpoint)
        return renamed


def state_text(step: int, state: dict[str, Any]) -> str:
    """The text of state.json."""
    return json.dumps({"step": step, **state}) + "\n"


def complete_folder(staging: Path, step: int, texts: dict[str, str], files: dict[str, WrittenFile]) -> None:
    """Adds small files and the manifest to `files`, which are already in `staging`, and flushes all names."""
    entries = dict(files)
    for name, text in texts.items():
        write_text_atomic(staging / name, text)
        entries[name] = WrittenFile(len(text.encode()), digest_of(text.encode()).hex())
    write_manifest(staging, step, {name: (entries[name].size, entries[name].digest) for name in sorted(entries)})
    for folder in sorted({(staging / name).parent for name in entries}, reverse=True):
        sync(folder)


def delete_folder(folder: Path) -> None:
    """Removes a folder, if there is one; first its name, so that a kill does not leave half a checkpoint."""
    hidden = folder.with_name(f".{folder.name}.old.part")
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.exists():
        os.replace(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def names(checkpoints: list[Path]) -> list[str]:
    return [path.name for path in checkpoints]


def read_state(checkpoint: Path, manifest: Manifest | None = None) -> dict[str, Any]:
    """The content of state.json, verified. Raises DamagedCheckpoint if it or the manifest is damaged."""
    state = read_json(checkpoint, manifest or read_manifest(checkpoint), STATE_FILE)
    if not isinstance(state, dict) or state.get("step") != step_of(checkpoint.name):
        raise DamagedCheckpoint(checkpoint / STATE_FILE, f"is not the state of step {step_of(checkpoint.name)}")
    return state


def validation_loss(checkpoint: Path) -> float | None:
    """Of the validation at the step of the checkpoint; None if there was none, or it cannot be read."""
    try:
        return read_state(checkpoint).get("validation_loss")
    except MegaSoraError:
        return None


def check_room(folder: Path, num_bytes: int, what: str) -> None:
    """Raises OSError if the file system of `folder` has not `num_bytes` free."""
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < num_bytes:
        needed = f"{what} needs {in_bytes(num_bytes)}, {in_bytes(free)} are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed}", str(folder.parent))


def in_bytes(count: int) -> str:
    """3.22 GB, 0.5 MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def find_checkpoint(path: Path, report: Callable[[str], None]) -> Path:
    """`path` if it is a checkpoint, else the newest one of the run folder `path`; all of its files are verified.

    Damaged ones of a run folder are skipped, with a sentence to `report`. Raises MegaSoraError if none is whole.
    """
    if os.path.lexists(path / MANIFEST):
        verify_checkpoint(path)
        return path
    complete, problems = CheckpointStore(path / "checkpoints").complete(), []
    if not complete:
        raise MegaSoraError(
            f"{path} is no checkpoint (a folder step-XXXXXXXX with a {MANIFEST}), and no run folder that has one"
        )
    for checkpoint in reversed(complete):
        try:
            verify_checkpoint(checkpoint)
        except DamagedCheckpoint as error:
            if not checkpoint.exists():  # the run has saved a newer one and deleted this one
                return find_checkpoint(path, report)
            problems.append(error.problem)
            continue
        for problem in problems:
            report(f"{problem}; reading {checkpoint.name} instead")
        return checkpoint
    raise MegaSoraError(f"no checkpoint of {path} is whole: {'; '.join(problems)}; restore one from a copy")


def remove_incomplete(folder: Path) -> None:
    """Deletes the staging folders and files of interrupted saves."""
    for path in folder.glob(".*.part"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

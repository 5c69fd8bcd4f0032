"""Folders of checkpoints: saving one atomically, finding the newest, verifying checksums.

    RUN/checkpoints/latest             the name of the newest complete one
    RUN/checkpoints/step-00001000/     fragments/ (one file per rank, see sharded.py), state.json, manifest.json

A save is written to the staging folder `.step-XXXXXXXX.part`; its files are flushed, their sizes and SHA-256 go to
manifest.json, and the folder is renamed; only then is `latest` replaced. Before anything is loaded, every file is
checked against the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from megasora.errors import MegaSoraError
from megasora.files import sync, write_text_atomic

LATEST, MANIFEST = "latest", "manifest.json"


class CheckpointStore:
    """The checkpoints of one run. `keep`: how many of the newest ones `commit` keeps."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def begin(self, step: int) -> Path:
        """Creates the empty staging folder; on the main process, before any rank writes. Then see `commit`."""
        staging = self.staging_dir(step)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        return staging

    def staging_dir(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.part"

    def commit(self, step: int) -> Path:
        """Makes the save visible; on the main process, after all ranks have written. Deletes older ones beyond `keep`.

        Later checkpoints, which exist after `latest` was set back by hand, stay until their step is saved again.
        """
        staging, final = self.staging_dir(step), self.path(step)
        files = {}
        for file in sorted(p for p in staging.rglob("*") if p.is_file()):
            files[file.relative_to(staging).as_posix()] = [file.stat().st_size, sha256(file)]
            sync(file)
        write_text_atomic(staging / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
        for folder in [staging, *(p for p in staging.rglob("*") if p.is_dir())]:
            sync(folder)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staging, final)
        sync(self.folder)
        write_text_atomic(self.folder / LATEST, final.name + "\n")
        for old in [p for p in self.complete() if p.name <= final.name][: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def complete(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if (p / MANIFEST).is_file())

    def newest(self) -> Path | None:
        """The checkpoint that `latest` names, or None if nothing was ever saved.

        Raises MegaSoraError if `latest` is missing although there are checkpoints, or names an incomplete one: silently
        starting from step 0 would lose the run.
        """
        complete, pointer = self.complete(), self.folder / LATEST
        if not pointer.is_file():
            if not complete:
                return None
            raise MegaSoraError(
                f"{pointer} is missing, but {complete[-1].name} is complete; "
                f"{resume_command(complete[-1].name, pointer)}; to start from step 0, choose another run.dir"
            )
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if self.folder / name not in complete:
            names = ", ".join(p.name for p in complete) or "none"
            raise MegaSoraError(
                f"{pointer} names {name or 'nothing'}, which is not complete; complete ones: {names}; write the name "
                "of the one to resume from into it"
            )
        return self.folder / name


def find_checkpoint(path: Path) -> Path:
    """`path` if it is a checkpoint, else the newest one of the run folder `path`. Raises MegaSoraError if none."""
    if (path / MANIFEST).is_file():
        return path
    newest = CheckpointStore(path / "checkpoints").newest()
    if newest is None:
        raise MegaSoraError(
            f"{path} is no checkpoint (a folder step-XXXXXXXX with a {MANIFEST}), and no run folder that has one"
        )
    return newest


def verify_checksums(checkpoint: Path) -> dict:
    """Checks every file's size and SHA-256 against the manifest; returns the manifest.

    Raises MegaSoraError with the file's name if one is missing or damaged.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (size, digest) for name, (size, digest) in manifest["files"].items()}
        if checkpoint.name != f"step-{manifest['step']:08d}":
            raise ValueError(f"it belongs to step {manifest['step']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MegaSoraError(f"{checkpoint / MANIFEST} cannot be read: {error}; {damage_remedy(checkpoint)}") from None
    for name, (size, digest) in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise MegaSoraError(f"{file} is missing; {damage_remedy(checkpoint)}")
        if file.stat().st_size != size:
            raise MegaSoraError(
                f"{file} is damaged: {file.stat().st_size} bytes, {size} expected; {damage_remedy(checkpoint)}"
            )
        if sha256(file) != digest:
            raise MegaSoraError(f"{file} is damaged: its SHA-256 differs from {MANIFEST}; {damage_remedy(checkpoint)}")
    return manifest


def damage_remedy(checkpoint: Path) -> str:
    """For a message: how to resume from the newest complete checkpoint that is older than the damaged `checkpoint`."""
    complete = CheckpointStore(checkpoint.parent).complete()
    earlier = [path.name for path in complete if path.name < checkpoint.name]
    if not earlier:
        return "there is no earlier checkpoint; start the run again in another run.dir"
    return resume_command(earlier[-1], checkpoint.parent / LATEST)


def resume_command(name: str, pointer: Path) -> str:
    """For a message: the command that makes a run resume from checkpoint `name`. `pointer`: its file `latest`."""
    return f"to resume from {name}: echo {name} > {pointer}"


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove_incomplete(folder: Path) -> None:
    """Deletes the staging folders and files of interrupted saves."""
    for path in folder.glob(".*.part"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

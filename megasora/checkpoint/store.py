"""Where checkpoints lie, and how one is written so that it is there whole or not at all.

    RUN/checkpoints/latest             the name of the newest complete one
    RUN/checkpoints/step-00001000/     slices/ (a file a rank, see slices.py), state.json, manifest.json

A save goes to `.step-...part`; its files are flushed, hashed into manifest.json, and the folder is renamed; only then
is `latest` replaced. Before anything is loaded, every file is held against the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from megasora.errors import MegaSoraError
from megasora.files import sync, write_whole

LATEST, MANIFEST = "latest", "manifest.json"


class CheckpointStore:
    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def begin(self, step: int) -> Path:
        """An empty folder to write into, on the main process before the others write; see `commit`."""
        part = self.part(step)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        return part

    def part(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.part"

    def commit(self, step: int) -> Path:
        """Makes the save visible: main process, after all have written. Older ones beyond `keep` go.

        Later ones, there after `latest` was set back by hand, stay until their step comes again.
        """
        part, final = self.part(step), self.path(step)
        sums = {}
        for file in sorted(p for p in part.rglob("*") if p.is_file()):
            sums[file.relative_to(part).as_posix()] = [file.stat().st_size, sha256(file)]
            sync(file)
        write_whole(part / MANIFEST, json.dumps({"step": step, "files": sums}, indent=1))
        for folder in [part, *(p for p in part.rglob("*") if p.is_dir())]:
            sync(folder)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        sync(self.folder)
        write_whole(self.folder / LATEST, final.name + "\n")
        for old in [p for p in self.complete() if p.name <= final.name][: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def complete(self) -> list[Path]:
        """Finished saves, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if (p / MANIFEST).is_file())

    def newest(self) -> Path | None:
        """The checkpoint that `latest` names, or None where nothing was ever saved.

        Raises MegaSoraError when `latest` is missing although there are checkpoints, or names one that is not complete:
        starting afresh in silence would throw a training run away.
        """
        complete, pointer = self.complete(), self.folder / LATEST
        if not pointer.is_file():
            if not complete:
                return None
            raise MegaSoraError(
                f"{pointer} is missing, but {complete[-1].name} is complete; "
                f"to go on from it: echo {complete[-1].name} > {pointer}; to start afresh, choose another run.dir"
            )
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if self.folder / name not in complete:
            names = ", ".join(p.name for p in complete) or "none"
            raise MegaSoraError(
                f"{pointer} names {name or 'nothing'}, which is not complete; complete ones: {names}; write the one to "
                "go on from into it"
            )
        return self.folder / name


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path is, or the newest of a run folder. Raises MegaSoraError where there is none."""
    if (path / MANIFEST).is_file():
        return path
    newest = CheckpointStore(path / "checkpoints").newest()
    if newest is None:
        raise MegaSoraError(
            f"{path} is no checkpoint (a folder step-XXXXXXXX with a {MANIFEST}), nor a run folder with one in it"
        )
    return newest


def verify(checkpoint: Path) -> dict:
    """Holds every file against the manifest and returns it. Raises MegaSoraError that names the file."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (size, digest) for name, (size, digest) in manifest["files"].items()}
        if checkpoint.name != f"step-{manifest['step']:08d}":
            raise ValueError(f"it is of step {manifest['step']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MegaSoraError(f"{checkpoint / MANIFEST} cannot be read: {error}; use an earlier checkpoint") from None
    for name, (size, digest) in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise MegaSoraError(f"{file} is missing; use an earlier checkpoint")
        if file.stat().st_size != size or sha256(file) != digest:
            raise MegaSoraError(
                f"{file} is damaged: {file.stat().st_size} bytes, {size} expected, or another SHA-256; "
                "use an earlier checkpoint"
            )
    return manifest


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove_parts(folder: Path) -> None:
    """Clears what an interrupted save left behind."""
    for part in folder.glob(".*.part"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)

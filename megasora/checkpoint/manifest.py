"""The manifest of a checkpoint: size and SHA-256 of every file, and of the manifest itself.

    manifest.json   {"format": 1, "step": 1000, "files": {"state.json": [bytes, SHA-256], ...}, "sha256": ...}

`sha256` is that of the same JSON text without this key, and the file must be exactly the text that `write_manifest`
makes of its values: so every changed bit is found before a value is used. What the manifest does not name is not read.
Names are plain relative paths: a link, an absolute path or one with `..` is never opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.errors import MegaSoraError
from megasora.files import open_regular, write_text_atomic
from megasora.jsonl import parse_json

MANIFEST, FORMAT = "manifest.json", 1
MAX_JSON_BYTES = 1 << 28  # of the manifest or another JSON file of a checkpoint
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*", re.ASCII)
FOLDER_NAME = re.compile(r"(?:[a-z]+-)?step-(\d{8,12})(?:-\d+)?", re.ASCII)  # damaged-step-00001000-2 is one, too
PARSE_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Manifest:
    """`files`: (bytes, SHA-256) by name. `sha256`: of the manifest; it identifies the checkpoint."""

    step: int
    files: dict[str, tuple[int, str]]
    sha256: str


def write_manifest(folder: Path, step: int, files: dict[str, tuple[int, str]]) -> None:
    """Writes `folder`/manifest.json atomically."""
    values = {"format": FORMAT, "step": step, "files": {name: list(entry) for name, entry in files.items()}}
    write_text_atomic(folder / MANIFEST, manifest_text(values))


def manifest_text(values: dict[str, Any]) -> str:
    """The text of a manifest with these values and their SHA-256."""
    return json.dumps({**values, "sha256": text_sha256(values)}, indent=1) + "\n"


def text_sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, indent=1).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises DamagedCheckpoint if it is missing or damaged, MegaSoraError if another version has written it."""
    path = checkpoint / MANIFEST
    try:
        data = read_limited(path)
        values = parse_json(data)
        check_version(checkpoint, values)
        digest = values.pop("sha256")
        if data != manifest_text(values).encode():
            raise ValueError("its content differs from its own SHA-256")
        files = {name: (size, digest) for name, (size, digest) in values["files"].items()}
        for name in files:
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a file of a checkpoint")
        if step_of(checkpoint.name) != values["step"]:
            raise ValueError(f"it belongs to step {values['step']}")
    except PARSE_ERRORS as error:
        raise DamagedCheckpoint(path, f"cannot be read: {describe(error)}") from None
    return Manifest(values["step"], files, digest)


def check_version(checkpoint: Path, values: dict[str, Any]) -> None:
    """Raises MegaSoraError for the manifest of another version. Those before format 1 had no checksum of their own."""
    is_before_format_1 = values.keys() == {"step", "files"}
    if is_before_format_1 or (values["format"] != FORMAT and text_sha256(without_sha256(values)) == values["sha256"]):
        raise MegaSoraError(
            f"{checkpoint} was saved by another version of MegaSora (checkpoint format {values.get('format', 0)}, this "
            f"version reads {FORMAT}); continue with that version, or start the run again in another run.dir"
        )


def without_sha256(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "sha256"}


def verify_checksums(checkpoint: Path) -> Manifest:
    """Checks every file's size and SHA-256 against the manifest, and returns it.

    Raises DamagedCheckpoint with the file's name if one is missing, damaged or unreadable.
    """
    manifest = read_manifest(checkpoint)
    for name in manifest.files:
        verify_file(checkpoint, manifest, name)
    return manifest


def verify_file(checkpoint: Path, manifest: Manifest, name: str) -> None:
    """Checks one file of the manifest, reading it in pieces; raises DamagedCheckpoint."""
    file, (_, digest) = checkpoint / name, manifest.files[name]
    try:
        check_kind_and_size(checkpoint, manifest, name)
        if sha256(file) != digest:
            raise DamagedCheckpoint(file, f"is damaged: its SHA-256 differs from {MANIFEST}")
    except OSError as error:
        raise DamagedCheckpoint(file, f"cannot be read: {describe(error)}") from None


def read_json(checkpoint: Path, manifest: Manifest, name: str) -> Any:
    """The content of a small JSON file of the manifest, parsed after its checksum was verified.

    Raises DamagedCheckpoint, also if the manifest does not name it.
    """
    file = checkpoint / name
    if name not in manifest.files:
        raise DamagedCheckpoint(file, f"is not in {MANIFEST}")
    try:
        check_kind_and_size(checkpoint, manifest, name)
        data = read_limited(file)
        if hashlib.sha256(data).hexdigest() != manifest.files[name][1]:
            raise DamagedCheckpoint(file, f"is damaged: its SHA-256 differs from {MANIFEST}")
        return parse_json(data)
    except PARSE_ERRORS as error:
        raise DamagedCheckpoint(file, f"cannot be read: {describe(error)}") from None


def check_kind_and_size(checkpoint: Path, manifest: Manifest, name: str) -> None:
    """Raises DamagedCheckpoint unless the file is a regular one of the expected size, reached without links."""
    file, (size, _) = checkpoint / name, manifest.files[name]
    for path in (file, *list(file.parents)[: name.count("/")]):
        if path.is_symlink():
            raise DamagedCheckpoint(path, "is a link; the files of a checkpoint are in its folder")
    if not file.exists():
        raise DamagedCheckpoint(file, "is missing")
    actual = file.stat().st_size
    if file.is_file() and actual != size:
        raise DamagedCheckpoint(file, f"is damaged: {actual} bytes, {size} expected")


def read_limited(file: Path) -> bytes:
    """The content of a regular file of at most MAX_JSON_BYTES; raises OSError, or ValueError for a larger one."""
    with open_regular(file) as stream:
        size = file.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes, at most {MAX_JSON_BYTES} are expected")
        return stream.read()


def sha256(file: Path) -> str:
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def step_of(folder_name: str) -> int | None:
    """The step in the name of a checkpoint's folder; None if it is no such name."""
    match = FOLDER_NAME.fullmatch(folder_name)
    return int(match[1]) if match else None


def describe(error: BaseException) -> str:
    """An error without the path, which the message has already."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)

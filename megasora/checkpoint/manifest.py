"""The manifest of a checkpoint: size and digest (BLAKE3) of every file, and of the manifest itself.

    manifest.json   {"format": 2, "step": 1000, "files": {"state.json": [bytes, digest], ...}, "blake3": ...}

`blake3` is that of the same JSON text without this key, and the file must be exactly the text that `write_manifest`
makes of its values: so every changed bit is found before a value is used. The digest of a safetensors file is that of
its table of block digests (block_file.py), of another file that of its bytes. What the manifest does not name is not
read. Names are plain relative paths: a link, an absolute path or one with `..` is never opened.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.checkpoint.block_file import digest_of
from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.errors import MegaSoraError
from megasora.files import open_regular, write_text_atomic
from megasora.jsonl import parse_json

MANIFEST, FORMAT = "manifest.json", 2
DIGEST = "blake3"  # key of the manifest
MAX_JSON_BYTES = 1 << 28  # of the manifest or another JSON file of a checkpoint
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*", re.ASCII)
FOLDER_NAME = re.compile(r"(?:[a-z]+-)?step-(\d{8,12})(?:-\d+)?", re.ASCII)  # damaged-step-00001000-2 is one, too
PARSE_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Manifest:
    """`files`: (bytes, digest) by name. `digest`: of the manifest; it identifies the checkpoint."""

    step: int
    files: dict[str, tuple[int, str]]
    digest: str


def write_manifest(folder: Path, step: int, files: dict[str, tuple[int, str]]) -> None:
    """Writes `folder`/manifest.json atomically."""
    values = {"format": FORMAT, "step": step, "files": {name: list(entry) for name, entry in files.items()}}
    write_text_atomic(folder / MANIFEST, manifest_text(values))


def manifest_text(values: dict[str, Any]) -> str:
    """The text of a manifest with these values and their digest."""
    return json.dumps({**values, DIGEST: text_digest(values)}, indent=1) + "\n"


def text_digest(values: dict[str, Any]) -> str:
    return digest_of(json.dumps(values, indent=1).encode()).hex()


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises DamagedCheckpoint if it is missing or damaged, MegaSoraError if another version has written it."""
    path = checkpoint / MANIFEST
    try:
        data = read_limited(path)
        values = parse_json(data)
        check_version(checkpoint, values)
        digest = values.pop(DIGEST)
        if data != manifest_text(values).encode():
            raise ValueError("its content differs from its own digest")
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
    """Raises MegaSoraError for the manifest of another version: earlier ones had SHA-256, or no digest of their own."""
    is_earlier = values.keys() == {"step", "files"} or (values["format"] == 1 and "sha256" in values)
    if is_earlier or (values["format"] != FORMAT and text_digest(without_digest(values)) == values[DIGEST]):
        raise MegaSoraError(
            f"{checkpoint} was saved by another version of MegaSora (checkpoint format {values.get('format', 0)}, this "
            f"version reads {FORMAT}); continue with that version, or start the run again in another run.dir"
        )


def without_digest(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != DIGEST}


def read_json(checkpoint: Path, manifest: Manifest, name: str) -> Any:
    """The content of a small JSON file of the manifest, parsed after its digest was verified.

    Raises DamagedCheckpoint, also if the manifest does not name it.
    """
    file = checkpoint / name
    if name not in manifest.files:
        raise DamagedCheckpoint(file, f"is not in {MANIFEST}")
    try:
        return parse_json(read_verified(checkpoint, manifest, name))
    except PARSE_ERRORS as error:
        raise DamagedCheckpoint(file, f"cannot be read: {describe(error)}") from None


def read_verified(checkpoint: Path, manifest: Manifest, name: str) -> bytes:
    """The bytes of a small file of the manifest. Raises DamagedCheckpoint, OSError, or ValueError if it is large."""
    check_kind_and_size(checkpoint, manifest, name)
    data = read_limited(checkpoint / name)
    if digest_of(data).hex() != manifest.files[name][1]:
        raise DamagedCheckpoint(checkpoint / name, f"is damaged: its digest differs from {MANIFEST}")
    return data


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


def step_of(folder_name: str) -> int | None:
    """The step in the name of a checkpoint's folder; None if it is no such name."""
    match = FOLDER_NAME.fullmatch(folder_name)
    return int(match[1]) if match else None


def describe(error: BaseException) -> str:
    """An error without the path, which the message has already."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)

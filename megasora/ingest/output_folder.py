"""The output folder of an ingest: the check that a process may write into it, and the clean-up.

`ingest.json` records the source and the settings of the ingest that the folder belongs to. Every process that takes
part, or resumes, must have the same ones; the first writes the file, the others compare. The process that completes the
dataset adds what became of the files of the source, under `report`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megasora.config import Config
from megasora.data.shard_format import FORMAT
from megasora.data.shard_writer import BLOCK_DIR, LOCK_DIR, STAGING_DIR
from megasora.errors import MegaSoraError
from megasora.files import read_regular_file, write_text_atomic
from megasora.ingest.listing import ClipSource, listing_hash
from megasora.jsonl import parse_json
from megasora.locks import locked

SPEC_FILE, REPORT = "ingest.json", "report"
MAX_SPEC_BYTES = 1 << 26
PATCH_DIR = ".patches"
# keys of [ingest] that change the speed of an ingest and not its shards
SPEED_ONLY_KEYS = ("workers", "codec_processes", "worker_memory_mib", "decode_timeout_seconds")
# keys of ingest.json as messages name them; the others are keys of the configuration
KEY_NAMES = {
    "num_clips": "clips", "listing_sha256": "names, sizes or captions of the clips",
    "codec_fingerprint": "codec", "text_fingerprint": "text encoder",
}  # fmt: skip


def ingest_spec(clips: list[ClipSource], config: Config, codec: str, text: str) -> dict[str, Any]:
    """The contents of `ingest.json`: everything that determines the shards. `codec`, `text`: fingerprints."""
    settings = {key: value for key, value in asdict(config.ingest).items() if key not in SPEED_ONLY_KEYS}
    return {
        "format": FORMAT, "num_clips": len(clips), "listing_sha256": listing_hash(clips),
        "codec_fingerprint": codec, "text_fingerprint": text,
        "text.max_tokens": config.text.max_tokens, "data.patch": list(config.data.patch),
        **{f"ingest.{key}": value for key, value in settings.items()},
    }  # fmt: skip


def claim_output(out: Path, spec: dict[str, Any]) -> bool:
    """Creates `out` for the ingest `spec`, or checks that it belongs to it. True if this process wrote ingest.json.

    Raises MegaSoraError where `out` holds other files, or another ingest, with every key that differs.
    """
    path = out / SPEC_FILE
    if out.exists() and not (path.exists() or is_unclaimed(out)):
        raise MegaSoraError(f"{out} exists and is not empty; remove it or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / LOCK_DIR / "ingest", f"{path}", wait=True):
        if not path.exists():
            write_text_atomic(path, json.dumps(spec, indent=2) + "\n")
            return True
        differences = differing_keys(path, spec)
    if differences:
        raise MegaSoraError(
            f"{out} was made from other clips or settings ({'; '.join(differences)}); resume it with its own, or "
            "choose another --out"
        )
    return False


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Writes `report` into ingest.json, which has the other keys already."""
    path = out / SPEC_FILE
    with locked(out / LOCK_DIR / "ingest", f"{path}", wait=True):
        saved = parse_json(path.read_text(encoding="utf-8"))
        if saved.get(REPORT) != report:
            write_text_atomic(path, json.dumps({**saved, REPORT: report}, indent=2) + "\n")


def is_unclaimed(out: Path) -> bool:
    """Whether `out` is a folder that is empty, apart from the files of processes that are claiming it."""
    return out.is_dir() and all(p.name in (LOCK_DIR, SPEC_FILE, f".{SPEC_FILE}.part") for p in out.iterdir())


def differing_keys(path: Path, spec: dict[str, Any]) -> list[str]:
    """`NAME: SAVED -> NEW` for each key of `spec` whose value in the file `path` is another.

    Raises MegaSoraError if the file is damaged or another version wrote it.
    """
    try:
        saved = parse_json(read_regular_file(path, MAX_SPEC_BYTES).decode("utf-8"))
        same_version = saved.keys() - {REPORT} == spec.keys() and saved["format"] == spec["format"]
    except (ValueError, AttributeError) as error:
        raise MegaSoraError(f"{path} is damaged: {error}; remove {path.parent} or choose another --out") from None
    if not same_version:
        raise MegaSoraError(f"{path} was written by another version of MegaSora; choose another --out")
    return [
        f"{KEY_NAMES.get(key, key)}: {shorten_hashes(saved[key])} -> {shorten_hashes(value)}"
        for key, value in spec.items()
        if saved[key] != value
    ]


def shorten_hashes(value: Any) -> str:
    """The text of `value`, with the first 8 of the 64 digits of each SHA-256."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", str(value))


def discard_output(out: Path) -> None:
    """Deletes the files of an ingest that has no complete clip. Only for a folder that `claim_output` accepted."""
    for name in (BLOCK_DIR, STAGING_DIR, PATCH_DIR, LOCK_DIR):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / SPEC_FILE).unlink(missing_ok=True)


def remove_empty_folders(folders: list[Path]) -> None:
    """Removes those of `folders`, innermost first, that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def temporary_patch_dir(folder: Path) -> Iterator[Path]:
    """A folder for the patches of clips that are not in a shard yet: empty on entry, removed on exit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()

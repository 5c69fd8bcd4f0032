"""Provenance of samples: what a file says of its origin, and a signed sidecar with the whole record.

    out.mp4, out.png    a comment in the file: that it is generated, by which run, from which prompt
    out.json            the record of how it was made, a manifest in the terms of C2PA, SHA-256 of the file, a signature

The signature is by the key of the installation (`provenance_key.py`), over the canonical JSON of everything else in the
sidecar. A comment can be removed and a sidecar lost; neither can be changed without notice.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from megasora import __version__
from megasora.data.media import Media, sha256
from megasora.data.media_formats import FFMPEG_NAMES, FIRST_BYTES, real_format
from megasora.errors import MegaSoraError, describe
from megasora.files import open_regular, read_regular_file
from megasora.jsonl import parse_json
from megasora.sampling.provenance_key import (
    ALGORITHM,
    installation_key,
    is_signed_by,
    key_path,
    load_key,
    public_key_of,
)

MAX_SIDECAR_BYTES = 1 << 26
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
WITH_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
FORMATS = {".mp4": "video/mp4", ".png": "image/png"}


def provenance_comment(run: str, step: int, prompt: str, seed: int) -> str:
    """JSON text for the metadata of a file: that it is generated, and by which run."""
    return json.dumps(
        {"ai_generated": True, "by": "MegaSora", "run": run, "step": step, "prompt": prompt, "seed": seed}
    )


def signed_record(record: dict[str, Any], media: Path) -> dict[str, Any]:
    """`record` with the manifest of the file `media` and a signature: the content of its sidecar.

    `record["given"]`: [{"as", "file", "sha256"}], what the sample was made from. Where there is no key and none can be
    made, the record is not signed, which is said on standard error: a sample that took hours is not lost.
    """
    document = {**record, "manifest": manifest_of(media, record.get("given", []))}
    try:
        key = installation_key()
    except (OSError, MegaSoraError, ImportError) as error:
        print(f"megasora: warning: {media.name} has no signature: {describe(error)}", file=sys.stderr)
        return document
    value = key.sign(canonical(document)).hex()
    return {**document, "signature": {"algorithm": ALGORITHM, "public_key": public_key_of(key), "value": value}}


def manifest_of(media: Path, given: list[dict[str, str]]) -> dict[str, Any]:
    """Claims about a file, with the names of C2PA 2.1."""
    source, action = (WITH_GENERATED, "c2pa.edited") if given else (GENERATED, "c2pa.created")
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "claim_generator": f"MegaSora/{__version__}",
        "title": media.name,
        "format": FORMATS.get(media.suffix, "application/octet-stream"),
        "ingredients": [
            {
                "title": Path(entry["file"]).name,
                "hash": entry["sha256"],
                "relationship": "parentOf" if entry["as"] == "video" else "componentOf",
            }
            for entry in given
        ],
        "assertions": [
            {
                "label": "c2pa.actions",
                "data": {"actions": [{"action": action, "when": when, "digitalSourceType": source}]},
            },
            {"label": "c2pa.hash.data", "data": {"alg": "sha256", "hash": sha256(Media(media))}},
        ],
    }


def canonical(document: dict[str, Any]) -> bytes:
    """The bytes that are signed: JSON without a signature, keys sorted, without spaces."""
    unsigned = {key: value for key, value in document.items() if key != "signature"}
    return json.dumps(unsigned, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class SidecarState:
    """`problem`: what does not fit, empty if the sidecar is that of the file and unchanged."""

    record: dict[str, Any]
    problem: str = ""
    signed_by: str = ""  # the public key; empty: there is no signature
    is_own: bool = False  # the key is that of this installation


def read_sidecar(media: Path) -> SidecarState | None:
    """What the sidecar of a file says; None if there is none. JSON of other programs beside a clip is no sidecar."""
    path = media.with_suffix(".json")
    if not path.is_file():
        return None
    try:
        document = json.loads(read_regular_file(path, MAX_SIDECAR_BYTES), object_pairs_hook=unique_keys)
        if isinstance(document, dict) and not {"manifest", "signature"} & document.keys():
            return None
        assertions = {entry["label"]: entry["data"] for entry in document["manifest"]["assertions"]}
        expected = assertions["c2pa.hash.data"]["hash"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return SidecarState({}, f"{path.name} is no sidecar of a sample, or it is damaged")
    actual = sha256(Media(media))
    problem = (
        "" if expected == actual else f"the file has the SHA-256 {actual[:16]}..., its sidecar {str(expected)[:16]}..."
    )
    signature = document.get("signature")
    if signature is None:
        return SidecarState(document, problem)
    try:
        public_key, value = str(signature["public_key"]), str(signature["value"])
        is_valid = signature["algorithm"] == ALGORITHM and is_signed_by(public_key, value, canonical(document))
    except (TypeError, KeyError, ValueError):
        public_key, is_valid = "", False
    if not is_valid:
        problem = problem or f"{path.name} was changed: its signature does not fit"
    return SidecarState(document, problem, public_key, public_key == own_public_key())


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises ValueError for a key that occurs twice: readers differ in which they take."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def own_public_key() -> str:
    """The public key of this installation; empty if it has none yet."""
    try:
        path = key_path()
        return public_key_of(load_key(path)) if path.exists() else ""
    except OSError:
        return ""


def read_comment(media: Path) -> dict[str, Any] | None:
    """What the metadata inside a file say of its origin; None if nothing, or if it cannot be read."""
    try:
        with open_regular(media) as file:
            format = real_format(file.read(FIRST_BYTES))
            file.seek(0)
            text = png_comment(file) if format == "PNG" else container_comment(file, FFMPEG_NAMES.get(format or "", ""))
        values = parse_json(text.encode())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and values.get("ai_generated") is True else None


def png_comment(file: BinaryIO) -> str:
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:
            return str(image.info.get("Comment", ""))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None


def container_comment(file: BinaryIO, format: str) -> str:
    """`format`: FFmpeg's name of it. Never guessed: a guessing demuxer would follow a text file to other files."""
    import av

    if not format:
        return ""
    try:
        with av.open(file, format=format, metadata_errors="replace") as container:
            return str(container.metadata.get("comment", ""))
    except av.FFmpegError as error:
        raise ValueError(str(error)) from None

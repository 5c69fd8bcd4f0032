"""The clips of a source, numbered by their position: the position of a clip is its permanent sample id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

from megasora.data.media import Media
from megasora.ingest.file_counts import FileCounts
from megasora.ingest.results import Rejection


@dataclass(frozen=True)
class ClipSource:
    """One clip of a listing: where its bytes are, its split and its caption."""

    media: Media
    name: str  # for people: the path below the source, or TAR/MEMBER
    size: int  # bytes
    split: str
    caption: str | None
    caption_rejection: Rejection | None = None  # why its caption cannot be read


@dataclass(frozen=True)
class Listing:
    """The clips of a source in the order of sample ids, and the counts of all its files."""

    clips: list[ClipSource]
    files: FileCounts


def listing_hash(clips: Iterable[ClipSource]) -> str:
    """SHA-256 of names, sizes, times, splits and captions. Another hash means that sample ids may differ."""
    digest = hashlib.sha256()
    for clip in clips:
        media = clip.media
        reason = clip.caption_rejection.reason if clip.caption_rejection else ""
        values = [clip.name, clip.size, media.start, media.end, clip.split, clip.caption, reason]
        digest.update(json.dumps(values).encode())
    return digest.hexdigest()


def split_of(name: str | PurePath) -> str:
    """The split of a path relative to the source: what is in its folder `val` is for validation."""
    return "val" if PurePath(name).parts[0] == "val" else "train"

"""Every byte of a folder of shards, held against its index and manifest: what is wrong, file by file.

Each byte is read once, in order, in pieces that fit a small memory, and patches are searched for NaN and Inf on the
way. Records lie one behind the other from byte 0 of a tar, and behind the last there is the end of the archive, so
checksums of records and that end cover the whole file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from zlib_ng.zlib_ng import crc32

from megasora.data.folder import LocalFolder, RemoteFolder
from megasora.data.shards import (
    MANIFEST,
    Index,
    Manifest,
    count_clips,
    find_damage,
    index_name,
    read_index,
    read_manifest,
    remedy,
)
from megasora.data.tar import END
from megasora.errors import MegaSoraError

CHUNK = 1 << 20  # bytes read at once
EXPONENTS = {"f16": 0x7C00, "bf16": 0x7F80}  # of NaN and Inf, whose mantissas are not 0, and 0
SMALL = 64 << 20  # bytes: a damaged record up to here is read whole, to name the file that is hit


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong; `offset` and `sample_id` are None where a whole file is."""

    file: str
    offset: int | None
    sample_id: int | None
    what: str


def num_bytes(manifest: Manifest) -> int:
    """Bytes of all tars."""
    return sum(facts["bytes"] for counts in manifest.splits.values() for facts in counts["shards"].values())


def verify(place: LocalFolder | RemoteFolder, advance: Callable[[int], None] = lambda count: None) -> Iterator[Fault]:
    """Every fault of a folder; none where it is whole. `advance` is told the bytes done, `num_bytes` of them in all.

    Raises MegaSoraError where there is no manifest that can be read.
    """
    manifest, sizes = read_manifest(place), place.sizes()
    for split, counts in manifest.splits.items():
        tables = []
        for name, facts in counts["shards"].items():
            index = index_name(name)
            if index not in sizes:
                yield Fault(index, None, None, f"is missing; {remedy(place, name)}")
                advance(facts["bytes"])
                continue
            try:
                rows = read_index(place.read_whole([index])[0], f"{place}/{index}", facts["index"], remedy(place, name))
            except MegaSoraError as error:
                yield Fault(index, None, None, str(error))
                advance(facts["bytes"])
                continue
            tables.append(rows)
            if len(rows) != facts["clips"]:
                yield Fault(MANIFEST, None, None, f"says {facts['clips']} clips of {name}, its index {len(rows)}")
            if name not in sizes:
                yield Fault(name, None, None, f"is missing with its {len(rows)} clips; {remedy(place, name)}")
                advance(facts["bytes"])
                continue
            if sizes[name] != facts["bytes"]:
                what = f"has {sizes[name]} bytes, {MANIFEST} says {facts['bytes']}; {remedy(place, name)}"
                yield Fault(name, min(sizes[name], facts["bytes"]), None, what)
            with place.open(name) as file:
                yield from verify_tar(file, name, rows, manifest, advance)
        if len(tables) == len(counts["shards"]) and tables:
            yield from verify_counts(split, np.concatenate(tables), counts)


def verify_tar(
    file: BinaryIO, name: str, rows: np.ndarray, manifest: Manifest, advance: Callable[[int], None]
) -> Iterator[Fault]:
    entries, at = Index(rows, manifest.dtype), 0
    for row, entry in zip(rows, entries, strict=True):
        start, size, _ = row["record"].item()
        if start != at:
            yield Fault(
                name, at, entry.sample_id, f"the record begins at byte {start}: {start - at} bytes are nobody's"
            )
        at = start + size
        counted = NonFinite(row, manifest.dtype)
        if (what := verify_record(file, row, entries.files, advance, counted)) is not None:
            yield Fault(name, what[0], entry.sample_id, f"{what[1]} of sample {entry.sample_id} is damaged")
            continue
        if counted.first is not None:
            what = f"sample {entry.sample_id}: its patches hold {counted.nan} NaN and {counted.inf} Inf"
            yield Fault(name, counted.first, entry.sample_id, f"{what}; leave its clip out and ingest again")
        if wrong := contradictions(file, entry, row, manifest):
            yield Fault(name, start, entry.sample_id, f"sample {entry.sample_id}: {wrong}")
    file.seek(at)
    tail = file.read(len(END) + 1)
    advance(len(tail))
    if tail != END:
        yield Fault(name, at, None, f"the archive does not end here with {len(END)} zeros")


def verify_record(
    file: BinaryIO, row: np.void, files: tuple[str, ...], advance: Callable[[int], None], counted: NonFinite
) -> tuple[int, str] | None:
    """Where in the tar, and what, is damaged. `counted` looks at every byte too."""
    start, size, checksum = row["record"].item()
    file.seek(start)
    found, done = 0, 0
    while done < size and (chunk := file.read(min(CHUNK, size - done))):
        found = crc32(chunk, found)
        counted.add(chunk, start + done)
        done += len(chunk)
        advance(len(chunk))
    if done == size and found == checksum:
        return None
    if size > SMALL:
        what = f"checksum {found:08x}, expected {checksum:08x}" if done == size else f"{done} are there"
        return start if done == size else start + done, f"the record ({size} bytes, {what})"
    file.seek(start)
    return find_damage(row, file.read(size), files)


class NonFinite:
    """Counts NaN and Inf in the patches of a record, whose bytes pass in order."""

    def __init__(self, row: np.void, dtype: str):
        begin, size, _ = row["patches"].item()
        self.begin, self.end, self.exponent = begin, begin + size, EXPONENTS[dtype]
        self.nan, self.inf = 0, 0
        self.first: int | None = None  # byte of the tar

    def add(self, chunk: bytes, offset: int) -> None:
        """`offset`: of the chunk in the tar, even; so are those of files in a tar."""
        low, high = max(self.begin, offset) - offset, min(self.end, offset + len(chunk)) - offset
        if high - low < 2:
            return
        magnitudes = np.frombuffer(chunk, "<u2", (high - low) // 2, low) & 0x7FFF
        if magnitudes.max() < self.exponent:
            return
        self.nan += int((magnitudes > self.exponent).sum())
        self.inf += int((magnitudes == self.exponent).sum())
        if self.first is None:
            self.first = offset + low + 2 * int(np.argmax(magnitudes >= self.exponent))


def contradictions(file: BinaryIO, entry: Any, row: np.void, manifest: Manifest) -> str:
    """What whole bytes say that the index or the manifest does not."""

    def read(member: str) -> bytes:
        file.seek(int(row[member]["offset"]))
        return file.read(int(row[member]["size"]))

    try:
        meta = json.loads(read("meta"))
        read("caption").decode("utf-8")
    except ValueError as error:
        return f"meta.json or caption.txt cannot be read: {error}"
    height, width, frames, fps = entry.native
    expected = {
        "sample_id": entry.sample_id, "grid": list(entry.grid), "shape": [entry.tokens, manifest.patch_dim],
        "dtype": manifest.dtype, "height": height, "width": width, "frames": frames, "fps": fps,
    }  # fmt: skip
    for key, value in expected.items():
        if meta.get(key) != value:
            return f"meta.json says {key} {meta.get(key)}, the index and {MANIFEST} {value}"
    if bool(manifest.text_dim) != bool(row["text"]["offset"]) or row["text"]["size"] % (2 * manifest.text_dim or 1):
        return f"text features of {row['text']['size']} bytes, {manifest.text_dim} numbers a token"
    if (found := int(row["patches"]["size"])) != (size := 2 * entry.tokens * manifest.patch_dim):
        return f"patches of {found} bytes, {entry.tokens} tokens have {size}"
    return ""


def verify_counts(split: str, rows: np.ndarray, declared: dict[str, Any]) -> Iterator[Fault]:
    for key, count in count_clips(rows).items():
        if declared.get(key) != count:
            yield Fault(MANIFEST, None, None, f"says {key} {declared.get(key)} of {split}, its indices {count}")
    for i in np.flatnonzero(np.diff(rows["sample_id"]) <= 0):
        yield Fault(MANIFEST, None, int(rows["sample_id"][i + 1]), "is there twice or out of order")

"""Verifies a folder of shards: every byte is checked against its index and manifest. Yields a Fault per problem.

Each byte is read once, in order, in chunks, and patches are searched for NaN and Inf in the same pass. The records of a
tar are contiguous from byte 0 and followed by the end of the archive, so the checksums of the records and that end
cover the whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from zlib_ng.zlib_ng import crc32

from megasora.data.folder import Folder
from megasora.data.shard_damage import locate_damage, remedy_text
from megasora.data.shard_format import (
    MANIFEST,
    Entry,
    Index,
    Manifest,
    count_clips,
    index_name,
    read_index,
    read_manifest,
)
from megasora.data.shard_reader import check_values
from megasora.data.tar import END_OF_ARCHIVE
from megasora.errors import MegaSoraError
from megasora.jsonl import parse_json

CHUNK_BYTES = 1 << 20  # read at once
MAX_LOCATED_BYTES = 64 << 20  # a damaged record up to this size is read whole, to name the damaged file
# exponent bits of NaN (with a mantissa that is not 0) and Inf (with mantissa 0)
EXPONENTS = {"f16": 0x7C00, "bf16": 0x7F80}


@dataclass(frozen=True)
class Fault:
    """One problem. `offset` and `sample_id` are None if it concerns a whole file."""

    file: str
    offset: int | None
    sample_id: int | None
    problem: str


def num_bytes(manifest: Manifest) -> int:
    """The size of all tars."""
    return sum(facts["bytes"] for counts in manifest.splits.values() for facts in counts["shards"].values())


def verify(folder: Folder, advance: Callable[[int], None] = lambda count: None) -> Iterator[Fault]:
    """Yields every fault of a folder. `advance(count)` is called for every `count` bytes done, `num_bytes` in all.

    Raises MegaSoraError if there is no readable manifest.
    """
    manifest = read_manifest(folder)
    sizes = folder.sizes(manifest.file_names())
    for split, counts in manifest.splits.items():
        tables = []
        for name, facts in counts["shards"].items():
            remedy = remedy_text(folder, name)
            rows, fault = load_index(folder, name, sizes, facts["index_crc32"])
            if fault is not None:
                yield fault
                advance(facts["bytes"])
                continue
            try:
                check_values(folder, split, Index(rows))
            except MegaSoraError as error:
                yield Fault(index_name(name), None, None, str(error))
                advance(facts["bytes"])
                continue
            tables.append(rows)
            if len(rows) != facts["clips"]:
                yield Fault(MANIFEST, None, None, f"says {facts['clips']} clips of {name}, its index {len(rows)}")
            if name not in sizes:
                yield Fault(name, None, None, f"is missing with its {len(rows)} clips; {remedy}")
                advance(facts["bytes"])
                continue
            if sizes[name] != facts["bytes"]:
                problem = f"has {sizes[name]} bytes, {MANIFEST} says {facts['bytes']}; {remedy}"
                yield Fault(name, min(sizes[name], facts["bytes"]), None, problem)
            with folder.open(name) as file:
                yield from verify_tar(file, name, rows, manifest, facts["bytes"], advance)
        if len(tables) == len(counts["shards"]) and tables:
            yield from verify_counts(split, np.concatenate(tables), counts)


def load_index(
    folder: Folder, name: str, sizes: dict[str, int], checksum: int
) -> tuple[np.ndarray | None, Fault | None]:
    """The rows of a tar's index, or why they cannot be read."""
    index, remedy = index_name(name), remedy_text(folder, name)
    if index not in sizes:
        return None, Fault(index, None, None, f"is missing; {remedy}")
    try:
        return read_index(folder.read_whole([index])[0], f"{folder}/{index}", checksum, remedy), None
    except MegaSoraError as error:
        return None, Fault(index, None, None, str(error))


def verify_tar(
    file: BinaryIO, name: str, rows: np.ndarray, manifest: Manifest, tar_bytes: int, advance: Callable[[int], None]
) -> Iterator[Fault]:
    """Yields the faults of one tar. `tar_bytes`: its declared size."""
    index, at = Index(rows, manifest.dtype), 0
    for i, (row, entry) in enumerate(zip(rows, index, strict=True)):
        if not index.spans_fit(i, tar_bytes):
            problem = f"sample {entry.sample_id}: byte ranges beyond the end of the tar; {remedy_text('.', name)}"
            yield Fault(index_name(name), None, entry.sample_id, problem)
            continue
        start, size, _ = row["record"].item()
        if start != at:
            problem = f"the record begins at byte {start}: {start - at} bytes belong to no record"
            yield Fault(name, at, entry.sample_id, problem)
        at = start + size
        nonfinite = NonFinite(row, manifest.dtype)
        damage = verify_record(file, row, index.member_files, advance, nonfinite)
        if damage is not None:
            yield Fault(name, damage[0], entry.sample_id, f"{damage[1]} of sample {entry.sample_id} is damaged")
            continue
        if nonfinite.first_offset is not None:
            problem = f"sample {entry.sample_id}: its patches have {nonfinite.num_nan} NaN and {nonfinite.num_inf} Inf"
            problem += "; leave its clip out and ingest again"
            yield Fault(name, nonfinite.first_offset, entry.sample_id, problem)
        if problem := find_contradiction(file, entry, row, manifest):
            yield Fault(name, start, entry.sample_id, f"sample {entry.sample_id}: {problem}")
    file.seek(at)
    tail = file.read(len(END_OF_ARCHIVE) + 1)
    advance(len(tail))
    if tail != END_OF_ARCHIVE:
        yield Fault(name, at, None, f"the archive does not end here with {len(END_OF_ARCHIVE)} zeros")


def verify_record(
    file: BinaryIO, row: np.void, member_files: tuple[str, ...], advance: Callable[[int], None], nonfinite: NonFinite
) -> tuple[int, str] | None:
    """(offset in the tar, description) of the damage of a record, or None. Adds its bytes to `nonfinite`."""
    start, size, checksum = row["record"].item()
    file.seek(start)
    actual, done = 0, 0
    while done < size and (chunk := file.read(min(CHUNK_BYTES, size - done))):
        actual = crc32(chunk, actual)
        nonfinite.add(chunk, start + done)
        done += len(chunk)
        advance(len(chunk))
    if done == size and actual == checksum:
        return None
    if size <= MAX_LOCATED_BYTES:
        file.seek(start)
        return locate_damage(row, file.read(size), member_files)
    if done < size:
        return start + done, f"the record ({done} of {size} bytes: the tar was cut)"
    return start, f"the record ({size} bytes, checksum {actual:08x}, expected {checksum:08x})"


class NonFinite:
    """Counts NaN and Inf in the patches of a record, whose bytes are added in order."""

    def __init__(self, row: np.void, dtype: str):
        start, size, _ = row["patches"].item()
        self.start, self.end, self.exponent = start, start + size, EXPONENTS[dtype]
        self.num_nan, self.num_inf = 0, 0
        self.first_offset: int | None = None  # of the first such value in the tar

    def add(self, chunk: bytes, offset: int) -> None:
        """`offset`: of the chunk in the tar; even, as are those of all files in a tar."""
        low, high = max(self.start, offset) - offset, min(self.end, offset + len(chunk)) - offset
        if high - low < 2:
            return
        magnitudes = np.frombuffer(chunk, "<u2", (high - low) // 2, low) & 0x7FFF
        if magnitudes.max() < self.exponent:
            return
        self.num_nan += int((magnitudes > self.exponent).sum())
        self.num_inf += int((magnitudes == self.exponent).sum())
        if self.first_offset is None:
            self.first_offset = offset + low + 2 * int(np.argmax(magnitudes >= self.exponent))


def find_contradiction(file: BinaryIO, entry: Entry, row: np.void, manifest: Manifest) -> str:
    """How an undamaged record contradicts the index or the manifest; empty if it does not."""

    def read(member: str) -> bytes:
        file.seek(int(row[member]["offset"]))
        return file.read(int(row[member]["size"]))

    try:
        meta = parse_json(read("meta"))
        read("caption").decode("utf-8")
    except ValueError as error:
        return f"meta.json or caption.txt cannot be read: {error}"
    if not isinstance(meta, dict):
        return "meta.json is no JSON object"
    height, width, frames, fps = entry.native_size
    expected = {
        "sample_id": entry.sample_id, "grid": list(entry.grid), "shape": [entry.num_tokens, manifest.patch_dim],
        "dtype": manifest.dtype, "height": height, "width": width, "frames": frames, "fps": fps,
    }  # fmt: skip
    for key, value in expected.items():
        if meta.get(key) != value:
            return f"meta.json says {key} {meta.get(key)}, the index and {MANIFEST} {value}"
    if bool(manifest.text_dim) != bool(row["text"]["offset"]) or row["text"]["size"] % (2 * manifest.text_dim or 1):
        return f"text features of {row['text']['size']} bytes, {manifest.text_dim} features per token"
    if (actual := int(row["patches"]["size"])) != (size := 2 * entry.num_tokens * manifest.patch_dim):
        return f"patches of {actual} bytes, {entry.num_tokens} tokens have {size}"
    return ""


def verify_counts(split: str, rows: np.ndarray, declared: dict[str, object]) -> Iterator[Fault]:
    """Yields where the counts of the manifest are not those of the indices, and sample ids that do not ascend."""
    for key, count in count_clips(rows).items():
        if declared.get(key) != count:
            yield Fault(MANIFEST, None, None, f"says {key} {declared.get(key)} of {split}, its indices {count}")
    for i in np.flatnonzero(np.diff(rows["sample_id"]) <= 0):
        yield Fault(MANIFEST, None, int(rows["sample_id"][i + 1]), "occurs twice or out of order")

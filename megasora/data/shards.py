"""Shards: clips as the model reads them, in WebDataset tars, with an index beside each tar and one manifest.

    dataset.json                  format, fingerprints of codec and text encoder, patch, counts by split, every tar
    train-000000-000.tar          KEY.caption.txt  KEY.meta.json  [KEY.text.f16]  KEY.patches.f16 (or .bf16)
    train-000000-000.index.npy    a row a clip: sample id, grid, native size, and where its record lies, with checksums

The plan of a run is made from the indices alone: columns, so that a million clips are open in a fraction of a second. A
clip is read by one range of bytes and its checksum, which covers the tar's headers too. `blocks.py` writes them.
`webdataset.WebDataset("train-000000-000.tar")` reads the same tars. No pickle anywhere.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from megasora.data.folder import READY, LocalFolder, RemoteFolder, open_folder
from megasora.data.pack import Record
from megasora.data.tar import BLOCK, DamagedTar, read_header
from megasora.errors import DataError, MegaSoraError

FORMAT = 1
MANIFEST = "dataset.json"
SPLITS = ("train", "val")
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}

SPAN = [("offset", "<u8"), ("size", "<u8"), ("crc32", "<u4")]  # bytes of a tar
MEMBERS = ("caption", "meta", "text", "patches")  # in the order in which they lie; without text, its offset is 0
INDEX = np.dtype(
    [("sample_id", "<i8"), ("grid", "<i4", 3), ("native", "<f8", 4), ("record", SPAN)]
    + [(name, SPAN) for name in MEMBERS]
)


@dataclass
class Manifest:
    codec: str  # fingerprint
    text: str
    patch: list[int]
    patch_dim: int  # numbers in a token
    splits: dict[str, dict[str, Any]]  # what `count_clips` gives, and shards: name -> clips, bytes, index (CRC-32)
    rejected: dict[str, int]  # reason -> clips
    text_dim: int = 0  # numbers in a stored text token; 0: captions are read by a trained encoder
    dtype: str = "f16"  # of the patches: f16 | bf16
    codec_settings: dict[str, Any] = field(default_factory=dict)  # what builds the codec again
    format: int = FORMAT


@dataclass(frozen=True)
class Entry:
    """A row of an index: one clip, without its pixels."""

    sample_id: int
    grid: tuple[int, int, int]
    native: tuple[float, float, float, float]
    members: dict[str, tuple[int, int, int]]  # file -> offset, bytes, CRC-32

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def member_names(dtype: str) -> tuple[str, ...]:
    """The files of a record, as MEMBERS; `dtype` of its patches."""
    return ("caption.txt", "meta.json", "text.f16", f"patches.{dtype}")


class Index(Sequence):
    """The clips of a split as columns; `index[i]` is an Entry. `rows`: [n] of the type INDEX."""

    def __init__(self, rows: np.ndarray, dtype: str = "f16"):
        self.rows, self.files = rows, member_names(dtype)

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Index:
        """Clips that lie in no tar."""
        rows = np.zeros(len(entries), INDEX)
        for row, entry in zip(rows, entries, strict=True):
            row["sample_id"], row["grid"], row["native"] = entry.sample_id, entry.grid, entry.native
        return cls(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Entry:
        sample_id, grid, native, _, *spans = self.rows[number]
        members = {file: span.item() for file, span in zip(self.files, spans, strict=True) if span["offset"]}
        return Entry(int(sample_id), tuple(grid.tolist()), tuple(native.tolist()), members)

    @property
    def sample_ids(self) -> np.ndarray:
        return self.rows["sample_id"]

    @property
    def tokens(self) -> np.ndarray:
        return self.rows["grid"].prod(axis=1, dtype=np.int64)


@dataclass
class Shards:
    """One split, open for reading."""

    folder: LocalFolder | RemoteFolder
    split: str
    manifest: Manifest
    entries: Index
    shard_of: np.ndarray  # [n]: the tar of each entry, a place in `names`
    names: list[str]

    @classmethod
    def open(cls, folder: str | Path, split: str, strict: bool = True) -> Shards:
        """Reads the manifest and the indices; of the tars, only their lengths. `folder`: see `open_folder`.

        Raises DataError (DamagedTar where it is a tar), and MegaSoraError where there are no shards. Without `strict`,
        tars that are missing or have another length are found when a clip of theirs is read.
        """
        place = open_folder(folder)
        manifest = read_manifest(place)
        declared = manifest.splits.get(split, {"clips": 0, "tokens": 0, "shards": {}})
        sizes = place.sizes() if declared["shards"] else {}
        for name, facts in declared["shards"].items():
            if strict:
                check_length(place, name, sizes.get(name), facts["bytes"])
            if index_name(name) not in sizes:
                raise DataError(f"{place}/{index_name(name)}: {missing(place, name)}")
        files = place.read_whole([index_name(name) for name in declared["shards"]])
        tables = [
            read_index(data, f"{place}/{index_name(name)}", facts["index"], remedy(place, name))
            for data, (name, facts) in zip(files, declared["shards"].items(), strict=True)
        ]
        rows = np.concatenate(tables) if tables else np.zeros(0, INDEX)
        entries = Index(rows, manifest.dtype)
        for what, count in {"clips": len(entries), "tokens": int(entries.tokens.sum())}.items():
            if count != declared[what]:
                raise DataError(
                    f"the indices of {place}/{split}-*.tar hold {count} {what}, {place}/{MANIFEST} says "
                    f"{declared[what]}: it was changed; restore it or ingest again"
                )
        twice = np.flatnonzero(np.diff(entries.sample_ids) <= 0)
        if len(twice):
            raise DataError(f"{place}: sample {entries.sample_ids[twice[0] + 1]} is there twice or out of order")
        shard_of = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables])
        return cls(place, split, manifest, entries, shard_of, list(declared["shards"]))

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def dtype(self) -> torch.dtype:
        """Of the patches."""
        return DTYPES[self.manifest.dtype]

    def tokens(self) -> np.ndarray:
        """int64 [n]."""
        return self.entries.tokens

    def read(
        self,
        number: int,
        encode: Callable[[str], Tensor] | None,
        into_LP: Tensor | None = None,
        waiting: AbstractContextManager = READY,
    ) -> Record:
        """Clip `number`. `encode` reads the caption now; None takes the features that ingest stored.

        `into_LP`: where its patches go, of its size and dtype; None: new memory. What is in it after an error is
        undefined. `waiting`: in which its bytes are waited for. May be called by several threads. Raises DamagedTar.
        """
        row = self.entries.rows[number]
        sample_id, grid, native, (start, size, checksum), *spans = row.item()  # plain numbers, in one call
        (caption_at, caption_bytes, _), _, (text_at, text_bytes, _), (patches_at, patches_bytes, _) = spans
        if into_LP is None:
            into_LP = torch.empty(math.prod(grid.tolist()), self.manifest.patch_dim, dtype=self.dtype)
        patches = into_LP.view(torch.uint8).numpy().data.cast("B")
        before, behind = patches_at - start, start + size - patches_at - patches_bytes
        if len(patches) != patches_bytes or min(before, behind) < 0:
            raise DataError(
                f"{self.folder}: the index says that sample {sample_id} has {patches_bytes} bytes of patches at byte "
                f"{patches_at} of a record from {start} to {start + size}; they are {len(patches)}; ingest again"
            )
        head = memoryview(bytearray(before))
        pieces = head, patches, memoryview(bytearray(behind))  # patches are the last file of a record
        self.fill(number, start, pieces, waiting)
        found = 0
        for piece in pieces:
            found = crc32(piece, found)
        if found != checksum:
            raise self.damage(number, *find_damage(row, b"".join(pieces), self.entries.files))
        caption = str(head[caption_at - start :][:caption_bytes], "utf-8")
        if encode is None:
            text = torch.frombuffer(head[text_at - start :][:text_bytes], dtype=torch.float16).float()
            text = text.view(-1, self.manifest.text_dim)
        else:
            text = encode(caption)
        return Record(sample_id, into_LP, tuple(grid.tolist()), text, tuple(native.tolist()), caption)

    def meta(self, number: int) -> dict[str, Any]:
        """Its meta.json, without reading the patches. Raises DamagedTar."""
        offset, size, checksum = self.entries.rows[number]["meta"].item()
        data = bytearray(size)
        self.fill(number, offset, [memoryview(data)])
        if crc32(data) != checksum:
            raise self.damage(number, offset, "meta.json")
        return json.loads(data)

    def fill(
        self, number: int, offset: int, pieces: Sequence[memoryview], waiting: AbstractContextManager = READY
    ) -> None:
        """Reads what lies from `offset` on in the tar of clip `number`. Raises DamagedTar where the tar ends before."""
        name, size = self.names[self.shard_of[number]], sum(map(len, pieces))
        try:
            found = self.folder.read_into(name, offset, pieces, waiting)
        except FileNotFoundError:
            sample_id = int(self.entries.sample_ids[number])
            raise DamagedTar(f"{self.folder}/{name}", offset, missing(self.folder, name), sample_id) from None
        if found < size:
            what = f"the record ({found} of {size} bytes: the tar was cut)"
            raise self.damage(number, offset + found, what)

    def damage(self, number: int, offset: int, what: str) -> DamagedTar:
        name, sample_id = self.names[self.shard_of[number]], int(self.entries.sample_ids[number])
        what = f"{what} of sample {sample_id} is damaged; {remedy(self.folder, name)}"
        return DamagedTar(f"{self.folder}/{name}", offset, what, sample_id)


def find_damage(row: np.void, data: bytes, files: Sequence[str]) -> tuple[int, str]:
    """Where in the tar, and what, of a record whose bytes are not those of its `row`."""
    start, size, _ = row["record"].item()
    if len(data) < size:
        return start + len(data), f"the record ({len(data)} of {size} bytes: the tar was cut)"
    for member, file in zip(MEMBERS, files, strict=True):
        offset, length, checksum = row[member].item()
        if not offset:
            continue
        here = offset - start
        try:
            _, name, declared = read_header(bytes(data[here - BLOCK : here]), offset - BLOCK, "")
            whole = declared == length and name == f"{row['sample_id']:09d}.{file}".encode()
        except DamagedTar:
            whole = False
        if not whole:
            return offset - BLOCK, f"the header of {file}"
        if (actual := crc32(data[here : here + length])) != checksum:
            return offset, f"{file} ({length} bytes, checksum {actual:08x}, expected {checksum:08x})"
    return start, "a header or the padding behind a file"


# ---------------------------------------------------------------- the index


def index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".index.npy"


def index_bytes(rows: np.ndarray) -> bytes:
    """`rows` [n] of the type INDEX as a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, rows, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


# what numpy writes before the number of rows; the length of the text stands in bytes 8 and 9
NPY_MAGIC, NPY_TEXT = (lambda data: (data[:8], data[10 : data.index(b"'shape'")]))(index_bytes(np.zeros(0, INDEX)))


def read_index(data: bytes, path: str, checksum: int, remedy: str) -> np.ndarray:
    """The inverse of `index_bytes`, held against its CRC-32. Reads INDEX and nothing else, whatever it declares."""
    actual = crc32(data)
    if actual != checksum:
        raise DataError(f"{path} is damaged: its checksum is {actual:08x}, {MANIFEST} says {checksum:08x}; {remedy}")
    start = 10 + int.from_bytes(data[8:10], "little")
    if not data.startswith(NPY_MAGIC) or not data[10:].startswith(NPY_TEXT) or (len(data) - start) % INDEX.itemsize:
        raise DataError(f"{path} is no index of format {FORMAT}; {remedy}")
    return np.frombuffer(data, INDEX, offset=start)


def count_clips(rows: np.ndarray) -> dict[str, Any]:
    """Counts of clips, and `histogram`: how many have 1, 2 to 3, 4 to 7, 8 to 15 ... tokens. `rows`: [n] of INDEX."""
    tokens, frames = Index(rows).tokens, rows["native"][:, 2]
    bins = np.frexp(tokens.astype(np.float64))[1] - 1 if len(rows) else np.zeros(0, np.int64)
    return {
        "clips": len(rows),
        "images": int((frames == 1).sum()),
        "frames": int(frames.sum()),
        "tokens": int(tokens.sum()),
        "longest": int(tokens.max(initial=0)),
        "histogram": np.bincount(bins).tolist(),
    }


def add_counts(total: dict[str, Any], more: dict[str, Any]) -> None:
    """`total` becomes the counts of both; shards of `more` come behind those of `total`."""
    for key in ("clips", "images", "frames", "tokens"):
        total[key] += more[key]
    total["longest"] = max(total["longest"], more["longest"])
    a, b = sorted((total["histogram"], more["histogram"]), key=len)
    total["histogram"] = [x + y for x, y in zip(a + [0] * (len(b) - len(a)), b, strict=True)]
    total["shards"].update(more["shards"])


# ---------------------------------------------------------------- the manifest


def read_manifest(folder: str | Path | LocalFolder | RemoteFolder) -> Manifest:
    place = open_folder(folder)
    path = f"{place}/{MANIFEST}"
    try:
        (data,) = place.read_whole([MANIFEST])
    except (FileNotFoundError, NotADirectoryError):
        raise MegaSoraError(
            f"no {MANIFEST} in {place}; make shards with: megasora ingest CLIPS --out {place}"
        ) from None
    try:
        values = json.loads(data.decode("utf-8"))
        if values.get("format") != FORMAT:
            raise MegaSoraError(f"{path} has format {values.get('format')}, this version reads {FORMAT}; ingest again")
        manifest = Manifest(**values)
        check_manifest(manifest)
        return manifest
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"{path} is damaged: {error}; ingest again") from None


def check_manifest(manifest: Manifest) -> None:
    """Raises ValueError or KeyError for what no ingest has written; names are names of files in the folder."""
    if manifest.dtype not in DTYPES:
        raise ValueError(f"patches of type {manifest.dtype!r}")
    for counts in manifest.splits.values():
        if not all(isinstance(counts[key], int) for key in ("clips", "images", "frames", "tokens", "longest")):
            raise ValueError("a count is no whole number")
        for name, facts in counts["shards"].items():
            if not re.fullmatch(r"[a-z]+-\d+-\d+\.tar", name, re.ASCII):
                raise ValueError(f"{name!r} is no name of a shard")
            if not all(isinstance(facts[key], int) for key in ("clips", "bytes", "index")):
                raise ValueError(f"a fact of {name} is no whole number")


def check_fingerprints(manifest: Manifest, folder: object, codec: str, text: str, patch: list[int]) -> None:
    """Shards of another codec, text encoder or patch would train silently wrong."""
    for key, theirs, ours in (
        ("codec", manifest.codec, codec), ("text", manifest.text, text), ("data.patch", manifest.patch, patch)
    ):  # fmt: skip
        if theirs != ours:
            raise MegaSoraError(
                f"{folder} was made with {key} {theirs}, this run has {ours}; ingest again with the run's settings, "
                "or give the run those of the shards"
            )


# ---------------------------------------------------------------- words for what is wrong


def check_length(folder: object, name: str, found: int | None, declared: int) -> None:
    """Raises DamagedTar for a tar that is missing (None), or has other than the declared number of bytes."""
    if found is None:
        raise DamagedTar(f"{folder}/{name}", 0, missing(folder, name))
    if found != declared:
        what = f"the file has {found} bytes, it was written with {declared}: it was cut or changed"
        raise DamagedTar(f"{folder}/{name}", min(found, declared), f"{what}; {remedy(folder, name)}")


def missing(folder: object, name: str) -> str:
    return f"the file is missing; {remedy(folder, name)}"


def remedy(folder: object, name: str) -> str:
    return f"restore it, or remove {folder}/blocks/{name.split('-')[1]}.json and ingest again"

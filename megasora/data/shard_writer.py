"""Writes ingest blocks: shards of consecutive clips, each block atomically.

    with BlockWriter(folder, block, max_bytes) as writer:
        writer.add(split, record, meta)        ... in the order of sample ids
        writer.commit(rejected, details)

    .locks/000003                 held by the writer of block 3; the system releases it when that process ends
    .staging/000003/              the block's files until `commit`
    train-000003-000.tar ...      renamed into place by `commit`
    blocks/000003.json            the marker, written last: block 3 is complete, and its contents

A block is written by one process into tars of its own, so shards do not depend on the number of processes. The next
writer of a block removes what a killed one left; complete blocks are never touched. manifest_writer.py merges the
complete blocks into a dataset.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from megasora.data.pack import Record
from megasora.data.shard_format import (
    DTYPES,
    INDEX_DTYPE,
    MEMBERS,
    SPLITS,
    count_clips,
    index_bytes,
    index_name,
    member_files,
)
from megasora.data.tar import BLOCK_BYTES, END_OF_ARCHIVE, group_by_key, padded_size, read_members, write_header
from megasora.errors import MegaSoraError
from megasora.files import atomic_writer, errors_naming, sync, write_text_atomic
from megasora.locks import create_in, locked

CHUNK_BYTES = 1 << 18  # of a file in memory at once: small enough to stay in the CPU cache
BLOCK_DIR, LOCK_DIR, STAGING_DIR = "blocks", ".locks", ".staging"


@dataclass(frozen=True)
class PatchFile:
    """Patches in a file, for clips that do not fit into memory: raw, little-endian, in the writer's dtype."""

    path: Path
    shape: tuple[int, int]  # [l, P]

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class BlockInfo:
    """The contents of a complete ingest block: blocks/BLOCK.json."""

    block: int
    dtype: str
    patch_dim: int  # 0: the block has no clip
    text_dim: int
    first_sample_id: int  # -1: the block has no clip
    last_sample_id: int
    splits: dict[str, dict[str, Any]]  # `count_clips`, and shards: name -> clips, bytes, index_crc32
    rejected: dict[str, int]  # reason -> clips
    details: dict[str, Any]  # of the caller of `commit`

    @property
    def is_empty(self) -> bool:
        """Whether all clips of the block were rejected."""
        return self.first_sample_id < 0


class BlockWriter:
    """Writes one ingest block. Entering locks it and removes what a killed writer left; leaving without `commit`
    discards it.

    Raises MegaSoraError if another process writes this block, or it is complete.
    """

    def __init__(self, folder: Path, block: int, max_bytes: int, dtype: str = "f16"):
        """`max_bytes`: a tar is closed when it reaches this size. `dtype` of the stored patches: f16 | bf16."""
        self.folder, self.block, self.max_bytes, self.dtype = Path(folder), block, max_bytes, dtype
        self.staging = self.folder / STAGING_DIR / block_name(block)
        self.open: dict[str, ShardFile] = {}  # by split
        self.shards: dict[str, list[ShardFile]] = {}  # by split, the open one last
        self.first_sample_id = self.last_sample_id = -1
        self.patch_dim = self.text_dim = 0

    def __enter__(self) -> BlockWriter:
        self.lock = locked(self.folder / LOCK_DIR / block_name(self.block), f"block {self.block} of {self.folder}")
        self.lock.__enter__()
        try:
            marker = marker_path(self.folder, self.block)
            if marker.exists():
                raise MegaSoraError(
                    f"block {self.block} of {self.folder} is complete; to write it again, remove {marker}"
                )
            self.remove_incomplete()
            create_in(self.staging.parent, self.staging.mkdir)
        except BaseException:
            self.lock.__exit__(None, None, None)
            raise
        return self

    def add(self, split: str, record: Record, meta: Mapping[str, Any], text_features: Tensor | None = None) -> None:
        """Writes a clip. `record.patches_LP`: a float tensor [l, P], or a PatchFile; `text_features`: [S, E].

        `meta`: `source` (a name for messages), `sha256` (of the source file), and any other JSON values; stored in
        meta.json together with those of the record. Raises ValueError if the record is inconsistent, sample ids do not
        ascend, or values are not finite in `dtype`.
        """
        text_dim = 0 if text_features is None else text_features.shape[1]
        self.check(split, record, text_dim)
        files = self.record_files(record, meta, text_features)
        shard = self.open.get(split) or self.open_shard(split)
        shard.add(record, files)
        if self.first_sample_id < 0:
            self.first_sample_id = record.sample_id
        self.last_sample_id, self.patch_dim, self.text_dim = record.sample_id, record.patches_LP.shape[1], text_dim
        if shard.file.tell() >= self.max_bytes:
            self.open.pop(split).close()

    def check(self, split: str, record: Record, text_dim: int) -> None:
        """Raises ValueError if the record contradicts itself or the records before it."""
        shape = tuple(record.patches_LP.shape)
        if shape[0] != int(np.prod(record.grid)):
            raise ValueError(f"patches of shape {shape} do not fill a grid of {tuple(record.grid)}")
        if record.sample_id <= self.last_sample_id:
            raise ValueError(
                f"sample_id={record.sample_id} comes after {self.last_sample_id}: ids must ascend in a block"
            )
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is none of {SPLITS}")
        if self.patch_dim not in (0, shape[1]):
            raise ValueError(f"patches of {shape[1]} features in a block of {self.patch_dim}")
        if self.first_sample_id >= 0 and text_dim != self.text_dim:
            raise ValueError(f"text_features of {text_dim} features in a block of {self.text_dim}")

    def record_files(
        self, record: Record, meta: Mapping[str, Any], text_features: Tensor | None
    ) -> dict[str, bytes | PatchFile]:
        """The files of a record: extension -> content, in the order of the tar."""
        files: dict[str, bytes | PatchFile] = {
            "caption.txt": record.caption.encode("utf-8"),
            "meta.json": meta_json(record, self.dtype, meta),
        }
        if text_features is not None:
            files["text.f16"] = raw_bytes(text_features, "f16", "text_features")
        patches = record.patches_LP
        if isinstance(patches, PatchFile):
            if (size := patches.path.stat().st_size) != 2 * patches.shape[0] * patches.shape[1]:
                raise ValueError(f"{patches.path} has {size} bytes, patches of shape {patches.shape} have another size")
            files[f"patches.{self.dtype}"] = patches
        else:
            files[f"patches.{self.dtype}"] = raw_bytes(patches, self.dtype, "patches_LP")
        return files

    def open_shard(self, split: str) -> ShardFile:
        shards = self.shards.setdefault(split, [])
        name = f"{split}-{block_name(self.block)}-{len(shards):03d}.tar"
        self.open[split] = ShardFile(self.staging / name, self.dtype)
        shards.append(self.open[split])
        return self.open[split]

    def commit(self, rejected: Mapping[str, int], details: Mapping[str, Any]) -> BlockInfo:
        """Moves the block into place, flushed to the disk. `rejected`: reason -> clips; `details`: JSON values.

        Raises OSError if the disk is full or fails, MegaSoraError if it returns other bytes than were written.
        """
        while self.open:
            self.open.popitem()[1].close()
        splits = {}
        for split in sorted(self.shards):
            shards = self.shards[split]
            index_entries = np.concatenate([shard.index_entries for shard in shards])
            splits[split] = {**count_clips(index_entries), "shards": {s.path.name: s.manifest_entry for s in shards}}
        info = BlockInfo(
            self.block, self.dtype, self.patch_dim, self.text_dim, self.first_sample_id, self.last_sample_id, splits,
            dict(sorted(rejected.items())), dict(details),
        )  # fmt: skip
        for shards in self.shards.values():
            for shard in shards:
                for name in (shard.path.name, index_name(shard.path.name)):
                    os.replace(self.staging / name, self.folder / name)
        sync(self.folder)
        marker = marker_path(self.folder, self.block)
        marker.parent.mkdir(exist_ok=True)
        write_text_atomic(marker, json_text(asdict(info)))
        sync(marker.parent)
        return info

    def __exit__(self, *_: object) -> None:
        for shard in self.open.values():
            with suppress(OSError):
                shard.file.close()
        try:
            self.remove_incomplete()
        finally:
            self.lock.__exit__(None, None, None)

    def remove_incomplete(self) -> None:
        """Removes the staging folder, and, if the block is not complete, files of it that are in place already."""
        shutil.rmtree(self.staging, ignore_errors=True)
        with suppress(OSError):
            self.staging.parent.rmdir()  # fails while other blocks are staged
        if not marker_path(self.folder, self.block).exists():
            for split in SPLITS:
                for path in self.folder.glob(f"{split}-{block_name(self.block)}-*"):
                    path.unlink()


class ShardFile:
    """One tar while it is written, and then its index."""

    def __init__(self, path: Path, dtype: str):
        self.path, self.dtype = path, dtype
        self.file = open(path, "wb")  # noqa: SIM115
        self.written: list[tuple[Record, dict[str, int]]] = []  # per clip: file -> CRC-32
        self.index_entries = np.zeros(0, INDEX_DTYPE)
        self.manifest_entry: dict[str, int] = {}  # clips, bytes, index_crc32

    def add(self, record: Record, files: dict[str, bytes | PatchFile]) -> None:
        with errors_naming(self.path):
            self.written.append((record, self.write_members(record, files)))

    def write_members(self, record: Record, files: dict[str, bytes | PatchFile]) -> dict[str, int]:
        """Returns the CRC-32 of each file."""
        checksums = {}
        for name, content in files.items():
            size = content.path.stat().st_size if isinstance(content, PatchFile) else len(content)
            self.file.write(write_header(f"{record.sample_id:09d}.{name}", size))
            checksum = done = 0
            for chunk in content_chunks(content):
                self.file.write(chunk)
                checksum, done = crc32(chunk, checksum), done + len(chunk)
            if done != size:
                raise MegaSoraError(f"{content.path} changed while it was read: {done} of {size} bytes")
            self.file.write(bytes(padded_size(size) - size))
            checksums[name] = checksum
        return checksums

    def close(self) -> None:
        """Flushes the tar to the disk, reads it back, and writes its index."""
        with errors_naming(self.path):
            self.file.write(END_OF_ARCHIVE)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        with open(self.path, "rb") as file:
            self.index_entries = self.read_back(file)
            size = file.seek(0, 2)
        index = index_bytes(self.index_entries)
        with atomic_writer(self.path.with_name(index_name(self.path.name))) as file:
            file.write(index)
        self.manifest_entry = {"clips": len(self.index_entries), "bytes": size, "index_crc32": crc32(index)}

    def read_back(self, file: BinaryIO) -> np.ndarray:
        """The index entries of the tar, from its bytes on the disk. Raises MegaSoraError if those were changed."""
        names = member_files(self.dtype)
        records = group_by_key(read_members(file, names, str(self.path)))
        index_entries = np.zeros(len(self.written), INDEX_DTYPE)
        if len(records) != len(self.written):
            raise MegaSoraError(
                f"{self.path}: {len(records)} of {len(self.written)} clips are read back; check the disk"
            )
        for entry, (record, checksums), spans in zip(index_entries, self.written, records.values(), strict=True):
            entry["sample_id"], entry["grid"], entry["native_size"] = record.sample_id, record.grid, record.native_size
            start = min(offset for offset, _ in spans.values()) - BLOCK_BYTES
            size = max(offset + padded_size(size) for offset, size in spans.values()) - start
            record_crc, file_crcs = range_checksums(file, start, size, spans)
            entry["record"] = (start, size, record_crc)
            for member, name in zip(MEMBERS, names, strict=True):
                if name in checksums:
                    entry[member] = (*spans[name], file_crcs[name])
                    if file_crcs[name] != checksums[name]:
                        raise MegaSoraError(
                            f"{self.path}: {name} of sample {record.sample_id} is read back with checksum "
                            f"{file_crcs[name]:08x}, written with {checksums[name]:08x}; check disk and memory"
                        )
        return index_entries


def meta_json(record: Record, dtype: str, meta: Mapping[str, Any]) -> bytes:
    """meta.json of a record. Raises ValueError if `meta` lacks `source` or `sha256`, or has keys of the record."""
    height, width, frames, fps = record.native_size
    values = {
        "sample_id": record.sample_id, "height": height, "width": width, "frames": frames, "fps": fps,
        "duration": frames / fps if fps else 0.0, "grid": list(record.grid), "shape": list(record.patches_LP.shape),
        "dtype": dtype,
    }  # fmt: skip
    if wrong := [key for key in ("source", "sha256") if key not in meta] or sorted(values.keys() & meta.keys()):
        raise ValueError(f"meta must have source and sha256 and none of {sorted(values)}: see {', '.join(wrong)}")
    return json.dumps({"sample_id": values.pop("sample_id"), "source": meta["source"], **values, **meta}).encode()


def raw_bytes(values: Tensor, dtype: str, name: str) -> bytes:
    """Little-endian bytes of a tensor in `dtype`. Raises ValueError if a value is not finite in it."""
    stored = values.detach().to("cpu", DTYPES[dtype]).contiguous()
    if not torch.isfinite(stored).all():
        raise ValueError(f"{name} has values that are not finite in {dtype}")
    return stored.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def content_chunks(content: bytes | PatchFile) -> Iterator[bytes | memoryview]:
    """Each chunk is valid until the next is requested."""
    if isinstance(content, bytes):
        yield content
        return
    with open(content.path, "rb", buffering=0) as file:
        yield from read_chunks(file, content.path.stat().st_size)


def read_chunks(file: BinaryIO, size: int) -> Iterator[memoryview]:
    """The next `size` bytes of a file, or fewer at its end; each chunk is valid until the next is requested."""
    buffer = memoryview(bytearray(min(size, CHUNK_BYTES)))
    while size and (count := file.readinto(buffer[:size])):
        yield buffer[:count]
        size -= count


def range_checksums(
    file: BinaryIO, start: int, size: int, spans: Mapping[str, tuple[int, int]]
) -> tuple[int, dict[str, int]]:
    """CRC-32 of a byte range of a file, and of `spans` in it, name -> (offset, size). Reads each byte once."""
    range_crc, span_crcs, at = 0, {}, start
    file.seek(start)
    ordered = sorted((offset, length, name) for name, (offset, length) in spans.items())
    for offset, length, name in [*ordered, (start + size, 0, None)]:
        for chunk in read_chunks(file, offset - at):
            range_crc = crc32(chunk, range_crc)
        span_crc = 0
        for chunk in read_chunks(file, length):
            range_crc, span_crc = crc32(chunk, range_crc), crc32(chunk, span_crc)
        if name is not None:
            span_crcs[name] = span_crc
        at = offset + length
    return range_crc, span_crcs


def block_name(block: int) -> str:
    return f"{block:06d}"


def marker_path(folder: Path, block: int) -> Path:
    """The file whose presence means that the block is complete."""
    return folder / BLOCK_DIR / f"{block_name(block)}.json"


def json_text(values: object) -> str:
    return json.dumps(values, indent=1) + "\n"

"""Writing shards: blocks of consecutive clips, each whole or not there, and the manifest over them.

    with BlockWriter(folder, block, max_bytes) as writer:
        writer.add(split, record, meta)        ... in the order of sample ids
        writer.commit(rejected, details)
    write_manifest(folder, ...)                when all blocks are there

    .locks/000003                 who writes block 3; the system lets go of it when that process ends, however it ends
    .parts/000003/                its files until they are whole
    train-000003-000.tar ...      renamed into place by `commit`
    blocks/000003.json            written last: the sign that block 3 is complete, and what is in it

A block is written by one process into tars of its own, so shards do not depend on how many processes there were. What a
killed writer left is removed by the next writer of its block; what was complete is never touched.
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
from megasora.data.shards import (
    DTYPES,
    INDEX,
    MANIFEST,
    MEMBERS,
    SPLITS,
    Manifest,
    add_counts,
    check_length,
    count_clips,
    index_bytes,
    index_name,
    member_names,
    missing,
)
from megasora.data.tar import BLOCK, END, group, padded, read_members, write_header
from megasora.errors import MegaSoraError
from megasora.files import locked, make_below, sync, whole_file, write_whole

CHUNK = 1 << 18  # bytes of a file in memory at once: few enough to stay in the cache from one use to the next
BLOCKS, LOCKS, PARTS = "blocks", ".locks", ".parts"


@dataclass(frozen=True)
class RawPatches:
    """Patches in a file, for clips too long for memory: raw, little-endian, of the writer's dtype, nothing else."""

    path: Path
    shape: tuple[int, int]  # [l, P]

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class BlockFacts:
    """What a complete block holds."""

    block: int
    dtype: str
    patch_dim: int  # 0: the block has no clip
    text_dim: int
    first: int  # sample ids; -1 without a clip
    last: int
    splits: dict[str, dict[str, Any]]  # what `count_clips` gives, and shards: name -> clips, bytes, index (CRC-32)
    rejected: dict[str, int]  # reason -> clips
    details: dict[str, Any]  # for who commits


class BlockWriter:
    """One block. Entering it takes its lock and removes what a dead writer left; leaving without `commit`, all of it.

    Raises MegaSoraError where somebody else writes this block, or it is complete.
    """

    def __init__(self, folder: Path, block: int, max_bytes: int, dtype: str = "f16"):
        """`max_bytes`: a tar that reaches it is closed. `dtype` of the stored patches: f16 | bf16."""
        self.folder, self.block, self.max_bytes, self.dtype = Path(folder), block, max_bytes, dtype
        self.parts = self.folder / PARTS / block_name(block)
        self.open: dict[str, ShardFile] = {}
        self.done: dict[str, list[ShardFile]] = {}
        self.last, self.patch_dim, self.text_dim = -1, 0, 0
        self.first = -1

    def __enter__(self) -> BlockWriter:
        self.lock = locked(self.folder / LOCKS / block_name(self.block), f"block {self.block} of {self.folder}")
        self.lock.__enter__()
        try:
            if block_path(self.folder, self.block).exists():
                raise MegaSoraError(
                    f"block {self.block} of {self.folder} is complete; to write it anew, remove "
                    f"{block_path(self.folder, self.block)}"
                )
            self.clean()
            make_below(self.parts.parent, self.parts.mkdir)
        except BaseException:
            self.lock.__exit__(None, None, None)
            raise
        return self

    def add(self, split: str, record: Record, meta: Mapping[str, Any], text_features: Tensor | None = None) -> None:
        """Writes a clip. `record.patches_LP`: a float tensor [l, P], or RawPatches; `text_features`: [S, E].

        `meta`: `source` (its name, for people), `sha256` (of the source file's bytes), and what else is known, as JSON;
        put into meta.json with what the record says. Raises ValueError where the record contradicts itself, ids do not
        ascend, or numbers are not finite in `dtype`.
        """
        patches, count = record.patches_LP, int(np.prod(record.grid))
        length, width = patches.shape
        if length != count:
            raise ValueError(f"patches of shape {tuple(patches.shape)} do not fill a grid of {tuple(record.grid)}")
        if record.sample_id <= self.last:
            raise ValueError(f"sample_id={record.sample_id} comes after {self.last}: ids must ascend in a block")
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is none of {SPLITS}")
        if self.patch_dim not in (0, width):
            raise ValueError(f"patches of {width} numbers in a block of {self.patch_dim}")
        text_dim = 0 if text_features is None else text_features.shape[1]
        if self.first >= 0 and text_dim != self.text_dim:
            raise ValueError(f"text_features of {text_dim} numbers in a block of {self.text_dim}")
        height, pixels_wide, frames, fps = record.native
        facts = {
            "sample_id": record.sample_id, "height": height, "width": pixels_wide, "frames": frames, "fps": fps,
            "duration": frames / fps if fps else 0.0, "grid": list(record.grid), "shape": [length, width],
            "dtype": self.dtype,
        }  # fmt: skip
        if wrong := [key for key in ("source", "sha256") if key not in meta] or sorted(facts.keys() & meta.keys()):
            raise ValueError(f"meta must have source and sha256 and none of {sorted(facts)}: see {', '.join(wrong)}")
        meta_json = json.dumps({"sample_id": facts.pop("sample_id"), "source": meta["source"], **facts, **meta})
        files: dict[str, bytes | RawPatches] = {
            "caption.txt": record.caption.encode("utf-8"),
            "meta.json": meta_json.encode(),
        }
        if text_features is not None:
            files["text.f16"] = raw_bytes(text_features, "f16", "text_features")
        if isinstance(patches, RawPatches):
            if (found := patches.path.stat().st_size) != 2 * length * width:
                raise ValueError(
                    f"{patches.path} has {found} bytes, patches of shape {patches.shape} have another size"
                )
            files[f"patches.{self.dtype}"] = patches
        else:
            files[f"patches.{self.dtype}"] = raw_bytes(patches, self.dtype, "patches_LP")

        shard = self.open.get(split)
        if shard is None:
            shards = self.done.setdefault(split, [])
            shard = ShardFile(self.parts / f"{split}-{block_name(self.block)}-{len(shards):03d}.tar", self.dtype)
            self.open[split] = shard
            shards.append(shard)
        shard.add(record, files)
        self.last, self.patch_dim, self.text_dim = record.sample_id, width, text_dim
        self.first = record.sample_id if self.first < 0 else self.first
        if shard.file.tell() >= self.max_bytes:
            self.open.pop(split).close()

    def commit(self, rejected: Mapping[str, int], details: Mapping[str, Any]) -> BlockFacts:
        """Puts the block into place, on disk. `rejected`: reason -> clips; `details`: JSON, given back by `read_block`.

        Raises OSError where the disk does not take it, MegaSoraError where it gives back something else.
        """
        while self.open:
            self.open.popitem()[1].close()
        splits = {}
        for split in sorted(self.done):
            rows = np.concatenate([shard.rows for shard in self.done[split]])
            splits[split] = {**count_clips(rows), "shards": {s.path.name: s.facts for s in self.done[split]}}
        facts = BlockFacts(
            self.block, self.dtype, self.patch_dim, self.text_dim, self.first, self.last, splits,
            dict(sorted(rejected.items())), dict(details),
        )  # fmt: skip
        for shards in self.done.values():
            for shard in shards:
                for name in (shard.path.name, index_name(shard.path.name)):
                    os.replace(self.parts / name, self.folder / name)
        sync(self.folder)
        sign = block_path(self.folder, self.block)
        sign.parent.mkdir(exist_ok=True)
        write_whole(sign, json_text(asdict(facts)))
        sync(sign.parent)
        return facts

    def __exit__(self, *_: object) -> None:
        for shard in self.open.values():
            with suppress(OSError):
                shard.file.close()
        try:
            self.clean()
        finally:
            self.lock.__exit__(None, None, None)

    def clean(self) -> None:
        """Removes what is not whole: the parts, and, of a block that is not complete, files already in their place."""
        shutil.rmtree(self.parts, ignore_errors=True)
        with suppress(OSError):
            self.parts.parent.rmdir()  # where no other block has parts
        if not block_path(self.folder, self.block).exists():
            for split in SPLITS:
                for path in self.folder.glob(f"{split}-{block_name(self.block)}-*"):
                    path.unlink()


class ShardFile:
    """One tar while it is written, then its index."""

    def __init__(self, path: Path, dtype: str):
        self.path, self.dtype = path, dtype
        self.file = open(path, "wb")  # noqa: SIM115
        self.written: list[tuple[Record, dict[str, int]]] = []  # of each clip: file -> CRC-32
        self.rows = np.zeros(0, INDEX)
        self.facts: dict[str, int] = {}

    def add(self, record: Record, files: dict[str, bytes | RawPatches]) -> None:
        checksums = {}
        for name, content in files.items():
            size = content.path.stat().st_size if isinstance(content, RawPatches) else len(content)
            self.file.write(write_header(f"{record.sample_id:09d}.{name}", size))
            checksum = done = 0
            for chunk in chunks_of(content):
                self.file.write(chunk)
                checksum, done = crc32(chunk, checksum), done + len(chunk)
            if done != size:
                raise MegaSoraError(f"{content.path} changed while it was read: {done} of {size} bytes")
            self.file.write(bytes(padded(size) - size))
            checksums[name] = checksum
        self.written.append((record, checksums))

    def close(self) -> None:
        """Flushes the tar to disk and makes its index from what is read back."""
        self.file.write(END)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        with open(self.path, "rb") as file:
            self.rows = self.read_back(file)
            size = file.seek(0, 2)
        index = index_bytes(self.rows)
        with whole_file(self.path.with_name(index_name(self.path.name))) as file:
            file.write(index)
        self.facts = {"clips": len(self.rows), "bytes": size, "index": crc32(index)}

    def read_back(self, file: BinaryIO) -> np.ndarray:
        names = member_names(self.dtype)
        found = group(read_members(file, names, str(self.path)))
        rows = np.zeros(len(self.written), INDEX)
        if len(found) != len(self.written):
            raise MegaSoraError(f"{self.path}: {len(found)} of {len(self.written)} clips are read back; check the disk")
        for row, (record, checksums), spans in zip(rows, self.written, found.values(), strict=True):
            row["sample_id"], row["grid"], row["native"] = record.sample_id, record.grid, record.native
            start = min(offset for offset, _ in spans.values()) - BLOCK
            size = max(offset + padded(size) for offset, size in spans.values()) - start
            whole, found_crc = checksums_of(file, start, size, spans)
            row["record"] = (start, size, whole)
            for member, name in zip(MEMBERS, names, strict=True):
                if name in checksums:
                    row[member] = (*spans[name], found_crc[name])
                    if found_crc[name] != checksums[name]:
                        raise MegaSoraError(
                            f"{self.path}: {name} of sample {record.sample_id} is read back with checksum "
                            f"{found_crc[name]:08x}, written with {checksums[name]:08x}; check disk and memory"
                        )
        return rows


def raw_bytes(values: Tensor, dtype: str, name: str) -> bytes:
    stored = values.detach().to("cpu", DTYPES[dtype]).contiguous()
    if not torch.isfinite(stored).all():
        raise ValueError(f"{name} has numbers that are not finite in {dtype}")
    return stored.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def chunks_of(content: bytes | RawPatches) -> Iterator[bytes | memoryview]:
    """Each is valid until the next is asked for."""
    if isinstance(content, bytes):
        yield content
        return
    with open(content.path, "rb", buffering=0) as file:
        yield from read_chunks(file, content.path.stat().st_size)


def read_chunks(file: BinaryIO, size: int) -> Iterator[memoryview]:
    """The next `size` bytes of a file, or what is there of them; each piece is valid until the next is asked for."""
    buffer = memoryview(bytearray(min(size, CHUNK)))
    while size and (count := file.readinto(buffer[:size])):
        yield buffer[:count]
        size -= count


def checksums_of(
    file: BinaryIO, start: int, size: int, spans: Mapping[str, tuple[int, int]]
) -> tuple[int, dict[str, int]]:
    """CRC-32 of a range of a file, and of `spans` of it, name -> (offset, size), read once."""
    whole, parts, at = 0, {}, start
    file.seek(start)
    inner = sorted((offset, length, name) for name, (offset, length) in spans.items())
    for offset, length, name in [*inner, (start + size, 0, None)]:
        for chunk in read_chunks(file, offset - at):
            whole = crc32(chunk, whole)
        part = 0
        for chunk in read_chunks(file, length):
            whole, part = crc32(chunk, whole), crc32(chunk, part)
        if name is not None:
            parts[name] = part
        at = offset + length
    return whole, parts


# ---------------------------------------------------------------- complete blocks


def block_name(block: int) -> str:
    return f"{block:06d}"


def block_path(folder: Path, block: int) -> Path:
    return folder / BLOCKS / f"{block_name(block)}.json"


def read_block(folder: Path, block: int) -> BlockFacts | None:
    """What is in a complete block; None for one that is not. Raises MegaSoraError where a file of it is gone or cut."""
    path = block_path(folder, block)
    try:
        facts = BlockFacts(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise MegaSoraError(f"{path} is damaged: {error}; remove it and ingest again") from None
    for counts in facts.splits.values():
        for name, shard in counts["shards"].items():
            tar = folder / name
            check_length(folder, name, tar.stat().st_size if tar.is_file() else None, shard["bytes"])
            if not (folder / index_name(name)).is_file():
                raise MegaSoraError(f"{folder / index_name(name)}: {missing(folder, name)}")
    return facts


def write_manifest(
    folder: Path, codec: str, text: str, patch: list[int], num_blocks: int, codec_settings: Mapping[str, Any]
) -> Manifest:
    """dataset.json of all blocks, the same bytes whoever wrote them, and no trace left of how they were written.

    `codec`, `text`: fingerprints. `codec_settings`: the configuration of the codec, from which it can be built again.
    Raises MegaSoraError where blocks are missing or do not fit together. May be called by several processes.
    """
    with locked(folder / LOCKS / "manifest", f"the manifest of {folder}", wait=True):
        manifest = merge_blocks(folder, codec, text, patch, num_blocks, codec_settings)
        write_whole(folder / MANIFEST, json_text(asdict(manifest)))
        sync(folder)
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # of writers that were killed when their block was complete
        for left in (folder / LOCKS).glob("[0-9]*"):
            left.unlink(missing_ok=True)
    return manifest


def merge_blocks(
    folder: Path, codec: str, text: str, patch: list[int], num_blocks: int, codec_settings: Mapping[str, Any]
) -> Manifest:
    found = [read_block(folder, block) for block in range(num_blocks)]
    if absent := [block for block, facts in enumerate(found) if facts is None]:
        shown = ", ".join(map(str, absent[:10])) + (" ..." if len(absent) > 10 else "")
        raise MegaSoraError(f"{folder}: {len(absent)} of {num_blocks} blocks are missing: {shown}; ingest again")
    names = {block_path(folder, block).name for block in range(num_blocks)}
    if extra := sorted(path.name for path in (folder / BLOCKS).glob("*.json") if path.name not in names):
        raise MegaSoraError(f"{folder / BLOCKS / extra[0]} is beyond the {num_blocks} blocks of this ingest; remove it")
    manifest = Manifest(codec, text, list(patch), 0, {}, {}, codec_settings=dict(codec_settings))
    rejected: dict[str, int] = {}
    filled = [facts for facts in found if facts.first >= 0]
    for split in SPLITS:
        manifest.splits[split] = {**count_clips(np.zeros(0, INDEX)), "shards": {}}
    for before, facts in zip([None, *filled], filled, strict=False):
        if before is not None and facts.first <= before.last:
            raise MegaSoraError(f"{folder}: blocks {before.block} and {facts.block} both hold sample {facts.first}")
        for key in ("dtype", "patch_dim", "text_dim"):
            if before is not None and getattr(facts, key) != getattr(before, key):
                raise MegaSoraError(
                    f"{folder}: {key} is {getattr(before, key)} in block {before.block} and {getattr(facts, key)} in "
                    f"block {facts.block}; remove one of them from {folder / BLOCKS} and ingest again"
                )
            setattr(manifest, key, getattr(facts, key))
        for split, counts in facts.splits.items():
            add_counts(manifest.splits[split], counts)
    for facts in found:
        for reason, count in facts.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
    manifest.rejected = dict(sorted(rejected.items()))
    return manifest


def json_text(values: object) -> str:
    return json.dumps(values, indent=1) + "\n"

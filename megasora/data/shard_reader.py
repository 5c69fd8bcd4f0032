"""Reading shards: opens a split of a shard folder from its manifest and indices, and reads clips by index.

    ShardSplit.open(folder, "train") --read(i)--> Record: patches, caption or text features, sizes

A clip is one byte range of its tar. The checksum of the whole range, which includes the tar headers, is checked at
every read. Patches are the last file of a record, so they are read directly to their place in a pack.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from megasora.data.folder import LocalFolder, RemoteFolder, open_folder
from megasora.data.pack import Record
from megasora.data.shard_damage import check_tar_size, damaged_record, locate_damage, missing_text, remedy_text
from megasora.data.shard_format import (
    DTYPES,
    INDEX_DTYPE,
    MANIFEST,
    Index,
    Manifest,
    index_name,
    read_index,
    read_manifest,
)
from megasora.data.tar import DamagedTar
from megasora.errors import DataError


@dataclass
class ShardSplit:
    """One split of a shard folder, open for reading."""

    folder: LocalFolder | RemoteFolder
    split: str
    manifest: Manifest
    index: Index
    shard_of: np.ndarray  # int32 [n]: the tar of each clip, an index into `names`
    names: list[str]  # of the tars

    @classmethod
    def open(cls, folder: str | Path | LocalFolder | RemoteFolder, split: str, strict: bool = True) -> ShardSplit:
        """Reads the manifest and the indices, and the sizes of the tars. `folder`: see `open_folder`.

        `strict=False`: missing tars and tars of another size are not checked here but when a clip is read from them.
        Raises DataError for damage (DamagedTar if it is of a tar), MegaSoraError if there are no shards.
        """
        folder = open_folder(folder)
        manifest = read_manifest(folder)
        declared = manifest.splits.get(split, {"clips": 0, "tokens": 0, "shards": {}})
        sizes = folder.sizes() if declared["shards"] else {}
        for name, facts in declared["shards"].items():
            if strict:
                check_tar_size(folder, name, sizes.get(name), facts["bytes"])
            if index_name(name) not in sizes:
                raise DataError(f"{folder}/{index_name(name)}: {missing_text(folder, name)}")
        files = folder.read_whole([index_name(name) for name in declared["shards"]])
        tables = [
            read_index(data, f"{folder}/{index_name(name)}", facts["index_crc32"], remedy_text(folder, name))
            for data, (name, facts) in zip(files, declared["shards"].items(), strict=True)
        ]
        index = Index(np.concatenate(tables) if tables else np.zeros(0, INDEX_DTYPE), manifest.dtype)
        check_counts(folder, split, index, declared)
        shard_of = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables])
        return cls(folder, split, manifest, index, shard_of, list(declared["shards"]))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored patches."""
        return DTYPES[self.manifest.dtype]

    def shard_name(self, i: int) -> str:
        """The tar of clip `i`."""
        return self.names[self.shard_of[i]]

    def read(self, i: int, encode_caption: Callable[[str], Tensor] | None, out_LP: Tensor | None = None) -> Record:
        """Reads clip `i` of the split and checks its checksum. Thread-safe.

        `encode_caption`: caption -> [S, E]; None: the text features that ingest stored. `out_LP`: buffer for the
        patches, of their shape and dtype, undefined after an error; None: allocate one. Raises DamagedTar.
        """
        row = self.index.rows[i]
        sample_id, grid, native_size, (start, size, checksum), *spans = row.item()  # Python numbers, in one call
        (caption_at, caption_bytes, _), _, (text_at, text_bytes, _), (patches_at, patches_bytes, _) = spans
        if out_LP is None:
            out_LP = torch.empty(math.prod(grid.tolist()), self.manifest.patch_dim, dtype=self.dtype)
        patches = out_LP.view(torch.uint8).numpy().data.cast("B")
        head_bytes, tail_bytes = patches_at - start, start + size - patches_at - patches_bytes
        if len(patches) != patches_bytes or min(head_bytes, tail_bytes) < 0:
            raise DataError(
                f"{self.folder}: the index says that sample {sample_id} has {patches_bytes} bytes of patches at byte "
                f"{patches_at} of a record from {start} to {start + size}; its grid has {len(patches)}; ingest again"
            )
        head = memoryview(bytearray(head_bytes))
        buffers = head, patches, memoryview(bytearray(tail_bytes))
        self.read_range(i, start, buffers)
        actual = 0
        for buffer in buffers:
            actual = crc32(buffer, actual)
        if actual != checksum:
            raise self.damaged_error(i, *locate_damage(row, b"".join(buffers), self.index.member_files))
        caption = str(head[caption_at - start :][:caption_bytes], "utf-8")
        if encode_caption is None:
            text = torch.frombuffer(head[text_at - start :][:text_bytes], dtype=torch.float16).float()
            text = text.view(-1, self.manifest.text_dim)
        else:
            text = encode_caption(caption)
        return Record(sample_id, out_LP, tuple(grid.tolist()), text, tuple(native_size.tolist()), caption)

    def read_meta(self, i: int) -> dict[str, Any]:
        """meta.json of clip `i`, without reading its patches. Raises DamagedTar."""
        offset, size, checksum = self.index.rows[i]["meta"].item()
        data = bytearray(size)
        self.read_range(i, offset, [memoryview(data)])
        if crc32(data) != checksum:
            raise self.damaged_error(i, offset, "meta.json")
        return json.loads(data)

    def read_range(self, i: int, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fills `buffers` from the tar of clip `i`, from `offset` on. Raises DamagedTar if the tar is too short."""
        name, size = self.shard_name(i), sum(map(len, buffers))
        try:
            count = self.folder.read_into(name, offset, buffers)
        except FileNotFoundError:
            sample_id = int(self.index.sample_ids[i])
            raise DamagedTar(f"{self.folder}/{name}", offset, missing_text(self.folder, name), sample_id) from None
        if count < size:
            raise self.damaged_error(i, offset + count, f"the record ({count} of {size} bytes: the tar was cut)")

    def damaged_error(self, i: int, offset: int, part: str) -> DamagedTar:
        return damaged_record(self.folder, self.shard_name(i), offset, part, int(self.index.sample_ids[i]))


def check_counts(folder: object, split: str, index: Index, declared: dict[str, Any]) -> None:
    """Raises DataError if the indices contradict the counts of the manifest, or sample ids do not ascend."""
    for what, count in {"clips": len(index), "tokens": int(index.token_counts.sum())}.items():
        if count != declared[what]:
            raise DataError(
                f"the indices of {folder}/{split}-*.tar have {count} {what}, {folder}/{MANIFEST} says "
                f"{declared[what]}: it was changed; restore it or ingest again"
            )
    unordered = np.flatnonzero(np.diff(index.sample_ids) <= 0)
    if len(unordered):
        raise DataError(f"{folder}: sample {index.sample_ids[unordered[0] + 1]} occurs twice or out of order")

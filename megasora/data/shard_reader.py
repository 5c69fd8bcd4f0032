"""Reading shards: opens a split of a shard folder from its manifest and indices, and reads clips by index.

    ShardSplit.open(folder, "train") --read(i)--> Record: patches, caption or text features, sizes

A clip is one byte range of its tar. The checksum of the whole range, which includes the tar headers, is checked at
every read. Patches are the last file of a record, so they are read directly to their place in a pack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from megasora.data.folder import Folder, open_folder
from megasora.data.pack import Record
from megasora.data.shard_damage import (
    OUT_OF_RESOURCES,
    check_tar_size,
    damaged_record,
    first_non_finite,
    locate_damage,
    missing_text,
    read_error_text,
    remedy_text,
)
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
from megasora.data.tar import BLOCK_BYTES, DamagedTar
from megasora.errors import DataError
from megasora.jsonl import parse_json

MAX_HEAD_BYTES = 1 << 30  # of a record, before its patches: caption, meta.json and text features


@dataclass
class ShardSplit:
    """One split of a shard folder, open for reading."""

    folder: Folder
    split: str
    manifest: Manifest
    index: Index
    shard_of: np.ndarray  # int32 [n]: the tar of each clip, an index into `names`
    names: list[str]  # of the tars
    check_finite: bool = False  # whether a number of a clip that is infinite or NaN is damage

    @classmethod
    def open(cls, folder: str | Path | Folder, split: str, strict: bool = True) -> ShardSplit:
        """Reads the manifest and the indices, and the sizes of the tars. `folder`: see `open_folder`.

        `strict=False`, to leave damaged clips out: missing tars and tars of another size are not checked here but when
        a clip is read from them, and numbers that are infinite or NaN are damage.
        Raises DataError for damage (DamagedTar if it is of a tar), MegaSoraError if there are no shards.
        """
        folder = open_folder(folder)
        manifest = read_manifest(folder)
        declared = manifest.splits.get(split, {"clips": 0, "tokens": 0, "shards": {}})
        names = list(declared["shards"])
        sizes = folder.sizes({*names, *map(index_name, names)}) if names else {}
        for name, facts in declared["shards"].items():
            if strict:
                check_tar_size(folder, name, sizes.get(name), facts["bytes"])
            if index_name(name) not in sizes:
                raise DataError(f"{folder}/{index_name(name)}: {missing_text(folder, name)}")
        try:
            files = folder.read_whole([index_name(name) for name in names])
        except OSError as error:
            raise DataError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from None
        tables = [
            read_index(data, f"{folder}/{index_name(name)}", facts["index_crc32"], remedy_text(folder, name))
            for data, (name, facts) in zip(files, declared["shards"].items(), strict=True)
        ]
        index = Index(np.concatenate(tables) if tables else np.zeros(0, INDEX_DTYPE), manifest.dtype)
        check_values(folder, split, index)
        check_counts(folder, split, index, declared)
        shard_of = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables])
        return cls(folder, split, manifest, index, shard_of, names, check_finite=not strict)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored patches."""
        return DTYPES[self.manifest.dtype]

    def shard_name(self, i: int) -> str:
        """The tar of clip `i`."""
        return self.names[self.shard_of[i]]

    def tar_bytes(self, i: int) -> int:
        """The declared size of the tar of clip `i`."""
        return self.manifest.splits[self.split]["shards"][self.shard_name(i)]["bytes"]

    def read(self, i: int, encode_caption: Callable[[str], Tensor] | None, out_LP: Tensor | None = None) -> Record:
        """Reads clip `i` of the split and checks its checksum. Thread-safe.

        `encode_caption`: caption -> [S, E]; None: the text features that ingest stored. `out_LP`: buffer for the
        patches, of their shape and dtype, undefined after an error; None: allocate one. Raises DamagedTar.
        """
        row = self.index.rows[i]
        sample_id, grid, native_size, (start, size, checksum), *spans = row.item()  # Python numbers, in one call
        caption_span, _, text_span, (patches_at, patches_bytes, _) = spans
        num_tokens, dim, grid = math.prod(grid.tolist()), self.manifest.patch_dim, tuple(grid.tolist())
        head_bytes, tail_bytes = patches_at - start, start + size - patches_at - patches_bytes
        in_head = [caption_span, *([text_span] if encode_caption is None else [])]
        fits = 0 <= head_bytes <= MAX_HEAD_BYTES and 0 <= tail_bytes <= BLOCK_BYTES
        fits = fits and start + size <= self.tar_bytes(i)
        fits = fits and all(start <= at and at + count <= patches_at for at, count, _ in in_head)
        if not fits or patches_bytes != num_tokens * dim * self.dtype.itemsize:
            raise self.damaged_index(
                i, f"{patches_bytes} bytes of patches at byte {patches_at} of a record from {start} to {start + size}; "
                f"its grid is {' x '.join(map(str, grid))}"
            )  # fmt: skip
        if out_LP is None:
            out_LP = torch.empty(num_tokens, dim, dtype=self.dtype)
        patches = out_LP.view(torch.uint8).numpy().data.cast("B")
        head = memoryview(bytearray(head_bytes))
        buffers = head, patches, memoryview(bytearray(tail_bytes))
        self.read_range(i, start, buffers)
        actual = 0
        for buffer in buffers:
            actual = crc32(buffer, actual)
        if actual != checksum:
            raise self.damaged_error(i, *locate_damage(row, b"".join(buffers), self.index.member_files))
        if self.check_finite and (at := first_non_finite(patches, self.dtype)) is not None:
            raise self.damaged_error(i, patches_at + at, "a number, infinite or NaN, in the patches")
        caption = self.decode_caption(i, caption_span[0], head[caption_span[0] - start :][: caption_span[1]])
        if encode_caption is None:
            text = self.text_features(i, text_span[0], head[text_span[0] - start :][: text_span[1]])
        else:
            text = encode_caption(caption)
        return Record(sample_id, out_LP, grid, text, tuple(native_size.tolist()), caption)

    def decode_caption(self, i: int, offset: int, data: memoryview) -> str:
        """`offset`: of the caption in the tar. Raises DamagedTar if it is not UTF-8."""
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged_error(i, offset + error.start, "caption.txt (not UTF-8 text)") from None

    def text_features(self, i: int, offset: int, data: memoryview) -> Tensor:
        """float32 [S, E]. `offset`: of the features in the tar. Raises DamagedTar if these are no such numbers."""
        dim = self.manifest.text_dim
        if not data or not dim or len(data) % (dim * torch.float16.itemsize):
            raise self.damaged_error(i, offset, f"text.f16 ({len(data)} bytes, no text tokens of {dim} features)")
        if self.check_finite and (at := first_non_finite(data, torch.float16)) is not None:
            raise self.damaged_error(i, offset + at, "a number, infinite or NaN, in the text features")
        return torch.frombuffer(data, dtype=torch.float16).float().view(-1, dim)

    def read_meta(self, i: int) -> dict[str, Any]:
        """meta.json of clip `i`, without reading its patches. Raises DamagedTar."""
        offset, size, checksum = self.index.rows[i]["meta"].item()
        if size > MAX_HEAD_BYTES or not self.index.spans_fit(i, self.tar_bytes(i)):
            raise self.damaged_index(i, f"{size} bytes of meta.json at byte {offset}")
        data = bytearray(size)
        self.read_range(i, offset, [memoryview(data)])
        if crc32(data) != checksum:
            raise self.damaged_error(i, offset, "meta.json")
        try:
            values = parse_json(bytes(data))
        except ValueError as error:
            raise self.damaged_error(i, offset, f"meta.json ({error})") from None
        if not isinstance(values, dict):
            raise self.damaged_error(i, offset, "meta.json (no JSON object)")
        return values

    def read_range(self, i: int, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fills `buffers` from the tar of clip `i`, from `offset` on.

        Raises DamagedTar if the tar is too short or the system cannot read it.
        """
        name, size = self.shard_name(i), sum(map(len, buffers))
        try:
            count = self.folder.read_into(name, offset, buffers)
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                raise
            text = read_error_text(self.folder, name, error)
            raise DamagedTar(f"{self.folder}/{name}", offset, text, int(self.index.sample_ids[i])) from None
        if count < size:
            raise self.damaged_error(i, offset + count, f"the record ({count} of {size} bytes: the tar was cut)")

    def damaged_index(self, i: int, problem: str) -> DamagedTar:
        """The error for byte ranges of clip `i` that cannot be right. `problem`: what the index says it has."""
        name, sample_id = self.shard_name(i), int(self.index.sample_ids[i])
        text = f"the index says that sample {sample_id} has {problem}; {remedy_text(self.folder, name)}"
        return DamagedTar(f"{self.folder}/{name}", int(self.index.rows[i]["record"]["offset"]), text, sample_id)

    def damaged_error(self, i: int, offset: int, part: str) -> DamagedTar:
        return damaged_record(self.folder, self.shard_name(i), offset, part, int(self.index.sample_ids[i]))


def check_values(folder: object, split: str, index: Index) -> None:
    """Raises DataError for a sample id, a grid or a native size that no ingest writes: negative, NaN or far too large.

    The byte ranges of a clip are checked when it is read.
    """
    rows = index.rows
    tokens = rows["grid"].prod(axis=1, dtype=np.float64)
    valid = (rows["sample_id"] >= 0) & (rows["sample_id"] < 1 << 40)  # above are the numbers of a mixture's datasets
    valid &= (rows["grid"] > 0).all(axis=1) & (tokens < 1 << 40)
    valid &= ((rows["native_size"] >= 0) & (rows["native_size"] < 1e12)).all(axis=1)
    if not valid.all():
        row = rows[np.flatnonzero(~valid)[0]]
        raise DataError(
            f"an index of {folder}/{split}-*.tar has sample {row['sample_id']} with grid {row['grid'].tolist()} and "
            f"size {row['native_size'].tolist()}, which no ingest writes; restore it or ingest again"
        )


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

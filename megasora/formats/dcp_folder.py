"""Reads a folder of torch.distributed.checkpoint (DCP): what is in it, and its tensors one at a time.

    FOLDER/.metadata         pickle: of each tensor its dtype, size and chunks, and the file and bytes of each chunk
    FOLDER/__0_0.distcp      chunks, one after the other, each an archive of torch.save; one file or more per rank

Both are read with the tables of allowed_pickle.py: nothing of them is run. A tensor that several ranks have saved, as
FSDP and DTensor do, is put together from its chunks.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megasora.errors import MegaSoraError, first_of, printable
from megasora.files import open_regular
from megasora.formats.allowed_pickle import (
    DTYPES,
    PARSE_ERRORS,
    Record,
    StoredTensor,
    load_pickle,
    load_torch,
    record,
    size_of,
)
from megasora.formats.recognize import check_format

METADATA = ".metadata"
RANK_METADATA = re.compile(r"__\d+\.metadata", re.ASCII)
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
MAX_GRID = 1 << 24  # cells between the borders of a tensor's chunks
STORED = "torch.distributed.checkpoint.metadata."
PATHS = [f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")]


def metadata_table() -> dict[str, Any]:
    """What `.metadata` may hold, in any version of torch: records, dtypes and sizes."""
    names = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex")
    others = (
        *(f"{STORED}{name}" for name in (*names, "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",  # before torch 2.3
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        *PATHS,
    )
    return {**DTYPES, **{name: record(name) for name in others}}


@dataclass(frozen=True)
class Chunk:
    offsets: tuple[int, ...]
    sizes: torch.Size
    file: str
    start: int  # byte of the file
    length: int  # bytes


@dataclass(frozen=True)
class DCPTensor:
    dtype: torch.dtype
    shape: torch.Size
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class DCPFolder:
    """`tensors`, and `objects` that are none, by their dotted names. Made by `open_dcp`."""

    path: Path
    tensors: dict[str, DCPTensor]
    objects: dict[str, Chunk]

    def read(self, name: str) -> Tensor:
        """A full tensor in its own dtype. Raises MegaSoraError if a file is not what `.metadata` says of it."""
        tensor = self.tensors[name]
        full = torch.empty(tensor.shape, dtype=tensor.dtype) if len(tensor.chunks) != 1 else None
        for chunk in tensor.chunks:
            stored = self.load(chunk)
            if not isinstance(stored, StoredTensor) or (stored.shape, stored.dtype) != (chunk.sizes, tensor.dtype):
                raise MegaSoraError(
                    f"{self.path / chunk.file} has no {tensor.dtype} {list(chunk.sizes)} of {printable(name, 200)} "
                    f"where {METADATA} says; copy or save the folder again"
                )
            if full is None:
                return stored.read()
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            full[box] = stored.read()
        return full

    def read_object(self, name: str) -> Any:
        """A value that is no tensor, of plain types. Raises MegaSoraError for another one, by the name of its type."""
        return self.load(self.objects[name])

    def load(self, chunk: Chunk) -> Any:
        path = self.path / chunk.file
        try:
            with open_regular(path) as file:
                return load_torch(file, path, span=(chunk.start, chunk.length))
        except FileNotFoundError:
            raise MegaSoraError(f"{self.path} lacks {chunk.file}; copy the whole folder") from None


def open_dcp(folder: Path) -> DCPFolder:
    """Reads `.metadata`, and checks that each tensor is there once and as a whole, and its files are there.

    Raises MegaSoraError for a folder of another format, half a folder, or a pickle that holds other things.
    """
    check_dcp(folder)
    path = folder / METADATA
    with open_regular(path) as file:
        metadata = load_pickle(file, path, metadata_table())
    try:
        result = parse_metadata(folder, metadata)
    except PARSE_ERRORS as error:
        raise MegaSoraError(f"{path} describes no checkpoint: {printable(str(error), 200)}; save it again") from None
    check_files(result)
    return result


def check_dcp(folder: Path) -> None:
    """Raises MegaSoraError for a folder without `.metadata`, with what it is instead."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    if METADATA not in names and any(RANK_METADATA.fullmatch(name) for name in names):
        raise MegaSoraError(
            f"{folder} has a metadata file per rank; save it with use_collectives=True, which writes one {METADATA}"
        )
    inner = [name for name in names if (folder / name / METADATA).exists()]
    if METADATA not in names and inner:
        raise MegaSoraError(f"{folder} has no {METADATA}; use a folder in it, e.g. {folder / inner[-1]}")
    check_format(folder, "dcp")


def parse_metadata(folder: Path, metadata: Any) -> DCPFolder:
    """Raises ValueError, KeyError, TypeError or AttributeError for metadata that contradict themselves."""
    places: dict[str, dict[tuple[int, ...] | None, Chunk]] = {}
    for index, info in metadata["storage_data"].items():
        if info.get("transform_descriptors"):
            raise ValueError(f"{index['fqn']} is stored with {info['transform_descriptors']}")
        file, start, length = info["relative_path"], info["offset"], info["length"]
        if not (isinstance(file, str) and FILE_NAME.fullmatch(file)):
            raise ValueError(f"{file} is no name of a file of the folder")
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in (start, length)):
            raise ValueError(f"{index['fqn']} is at bytes {start} to {start} + {length}")
        offset = index.get("offset")
        key = None if offset is None else tuple(offset)
        places.setdefault(index["fqn"], {})[key] = Chunk(key or (), torch.Size(), file, start, length)
    tensors, objects = {}, {}
    for name, entry in metadata["state_dict_metadata"].items():
        if not isinstance(name, str):
            raise ValueError(f"the name {name}")
        if type(entry).__name__ == "BytesStorageMetadata":
            objects[name] = places[name][None]
        else:
            tensors[name] = parse_tensor(name, entry, places[name])
    return DCPFolder(folder, tensors, objects)


def parse_tensor(name: str, entry: Record, places: Mapping[tuple[int, ...] | None, Chunk]) -> DCPTensor:
    shape, properties = size_of(entry["size"]), entry["properties"]
    dtype = properties.state[0] if isinstance(properties.state, tuple) else properties["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} has the dtype {dtype}")
    chunks = []
    for chunk in entry["chunks"]:
        offsets, sizes = size_of(chunk["offsets"]), size_of(chunk["sizes"])
        place = places[tuple(offsets)]
        if sizes.numel() * dtype.itemsize > place.length:
            raise ValueError(f"a chunk {list(sizes)} of {name} has {place.length} bytes")
        chunks.append(Chunk(offsets, sizes, place.file, place.start, place.length))
    if not are_cover(shape, chunks):
        raise ValueError(f"the chunks of {name} do not cover its {list(shape)} exactly once")
    return DCPTensor(dtype, shape, tuple(chunks))


def are_cover(shape: torch.Size, chunks: list[Chunk]) -> bool:
    """Whether each element of `shape` is in exactly one chunk. Raises ValueError for too many chunks to tell."""
    for chunk in chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
            return False
        if any(o + n > size for o, n, size in zip(chunk.offsets, chunk.sizes, shape, strict=True)):
            return False
    if not shape.numel():
        return True
    filled = [chunk for chunk in chunks if chunk.sizes.numel()]
    borders = []
    for dim in range(len(shape)):
        ends = itertools.chain.from_iterable((c.offsets[dim], c.offsets[dim] + c.sizes[dim]) for c in filled)
        borders.append({border: index for index, border in enumerate(sorted({0, shape[dim], *ends}))})
    cells = [len(border) - 1 for border in borders]
    if math.prod(cells) > MAX_GRID:
        raise ValueError(f"chunks with {math.prod(cells)} different parts")
    count = np.zeros(cells, np.int64)
    for c in filled:
        box = zip(borders, c.offsets, c.sizes, strict=True)
        count[tuple(slice(border[o], border[o + n]) for border, o, n in box)] += 1
    return bool((count == 1).all())


def check_files(folder: DCPFolder) -> None:
    """Raises MegaSoraError with the names of files that are missing or shorter than `.metadata` says."""
    ends: dict[str, int] = {}
    for chunk in (*(c for tensor in folder.tensors.values() for c in tensor.chunks), *folder.objects.values()):
        ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
    if missing := sorted(name for name in ends if not (folder.path / name).is_file()):
        raise MegaSoraError(f"{folder.path} lacks {first_of(missing, 4)}; copy the whole folder")
    for name, end in sorted(ends.items()):
        size = (folder.path / name).stat().st_size
        if size < end:
            raise MegaSoraError(f"{folder.path / name} has {size} bytes, {end} expected; copy the whole folder again")

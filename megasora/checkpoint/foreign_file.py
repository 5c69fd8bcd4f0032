"""Safetensors files of any program, read by byte ranges: one file, or a folder with an index of its files.

    FOLDER/NAME.safetensors              all tensors
    FOLDER/NAME.safetensors.index.json   {"weight_map": {tensor: file of FOLDER}}, as diffusers and transformers write

The safetensors library checks the header; then no more of a file is read than the ranges that are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megasora.files import open_regular, read_regular_file
from megasora.jsonl import parse_json
from megasora.placement import Runs

DTYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}
INDEX_SUFFIX = ".safetensors.index.json"
BUFFER_BYTES = 8 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_FILES = 10_000


@dataclass(frozen=True)
class ForeignTensor:
    """Where a tensor is. `dtype`: as in the header, e.g. BF16."""

    path: Path
    offset: int  # of its first byte in the file
    shape: torch.Size
    dtype: str

    def read(self, runs: Runs) -> Iterator[tuple[slice, slice, Tensor]]:
        """The elements of `runs`: (runs, elements of each, their values, fp32, on the CPU), at most BUFFER_BYTES at
        once. Raises OSError. `dtype` is one of DTYPES."""
        dtype = DTYPES[self.dtype]
        width = max(1, min(runs.length, BUFFER_BYTES // dtype.itemsize))
        height = max(1, min(runs.count, BUFFER_BYTES // (width * dtype.itemsize)))
        buffer = torch.empty(height * width, dtype=dtype)
        with open_regular(self.path) as file:
            for row in range(0, runs.count, height):
                rows = range(row, min(row + height, runs.count))
                for column in range(0, runs.length, width):
                    columns = slice(column, min(column + width, runs.length))
                    values = buffer[: len(rows) * (columns.stop - column)].view(len(rows), -1)
                    for r, run in zip(rows, values, strict=True):
                        element = runs.first + r * runs.stride + column
                        read_into(file.fileno(), self.offset + element * dtype.itemsize, run, self.path)
                    yield slice(rows.start, rows.stop), columns, values.to(torch.float32)


def read_into(handle: int, offset: int, out: Tensor, path: Path) -> None:
    """Fills `out`, contiguous, with the bytes of a file from `offset` on."""
    view = memoryview(out.view(torch.uint8).numpy())
    while view:
        count = os.preadv(handle, [view], offset)
        if not count:
            raise OSError(f"{path} was truncated while it was read")
        view, offset = view[count:], offset + count


def open_foreign(path: Path) -> dict[str, ForeignTensor]:
    """The tensors of a file or a folder, by name. Raises OSError or ValueError, or what safetensors raises."""
    if not path.is_dir():
        return read_header(path)
    file = weights_of_folder(path)
    if not file.name.endswith(INDEX_SUFFIX):
        return read_header(file)
    weight_map = parse_json(read_regular_file(file, MAX_INDEX_BYTES))["weight_map"]
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{file.name} names the file {name!r}, which is none of its folder")
    if len(names) > MAX_FILES:
        raise ValueError(f"{file.name} names {len(names)} files, more than {MAX_FILES}")
    tensors = {name: read_header(path / name) for name in names}
    for tensor, name in weight_map.items():
        if tensor not in tensors[name]:
            raise ValueError(f"{name} has no tensor {tensor!r}, which {file.name} says it has")
    return {tensor: tensors[name][tensor] for tensor, name in weight_map.items()}


def weights_of_folder(folder: Path) -> Path:
    """The index, or the one safetensors file. Raises ValueError unless there is one."""
    for suffix in (INDEX_SUFFIX, ".safetensors"):
        found = sorted(folder.glob(f"[!.]*{suffix}"))
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"it has {len(found)} files *{suffix}, {found[0].name} and {found[1].name}; give one file")
    raise ValueError(f"it is a folder without *{INDEX_SUFFIX} or *.safetensors")


def read_header(path: Path) -> dict[str, ForeignTensor]:
    with open_regular(path) as file:  # no device, no FIFO
        with safe_open(path, "pt"):  # checks that the ranges of all tensors fit their shapes and the file
            pass
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: ForeignTensor(path, 8 + length + entry["data_offsets"][0], torch.Size(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }

"""Safetensors files of fp32 tensors: written one tensor at a time, read by ranges of elements.

Memory holds one tensor, however large the file, and a file is written atomically. Format: the length of a JSON header
as 8 bytes, the header with the byte range of each tensor, then the tensors' bytes, little-endian.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.errors import MegaSoraError
from megasora.files import atomic_writer
from megasora.jsonl import parse_json

MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_tensors(
    path: Path,
    shapes: Mapping[str, torch.Size],
    value_of: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    on_written: Callable[[int], None] = lambda size: None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Calls `value_of` once per tensor, in the order of `shapes`, and `on_written(bytes)` after each is written.
    `dtype`: one of DTYPE_NAMES, to which values are rounded."""
    with atomic_writer(path) as file:
        file.write(build_header(shapes, metadata, dtype))
        for name, shape in shapes.items():
            value = value_of(name).detach()
            assert value.shape == shape, f"{name} is {list(value.shape)}, not {list(shape)}"
            data = value.to("cpu", dtype).contiguous().view(torch.uint8).numpy()
            file.write(data)
            on_written(data.nbytes)


def build_header(
    shapes: Mapping[str, torch.Size], metadata: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, shape in shapes.items():
        size = dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligned, as the format requires
    return len(text).to_bytes(8, "little") + text


class TensorEntry(NamedTuple):
    """Where a tensor is in a file."""

    offset: int  # of its first byte
    count: int  # elements


@dataclass(frozen=True)
class TensorFile:
    """The header of a file that `write_tensors` wrote; `read` reads elements."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, TensorEntry]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Raises DamagedCheckpoint if the file is truncated or not of this format."""
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
                    raise ValueError(f"a header of {length} bytes")
                header = parse_json(file.read(length))
            metadata = header.pop("__metadata__")
            entries, end = {}, 8 + length
            for name, tensor in header.items():
                start, stop = tensor["data_offsets"]
                count = math.prod(tensor["shape"])
                if (tensor["dtype"], 8 + length + start, stop - start) != ("F32", end, 4 * count):
                    raise ValueError(f"{name} is {tensor}")
                entries[name], end = TensorEntry(end, count), end + 4 * count
            if path.stat().st_size != end:
                raise ValueError(f"{path.stat().st_size} bytes, {end} expected")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(path, f"cannot be read: {error}") from None
        return cls(path, metadata, entries)

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements `start .. start + count - 1` of a flattened tensor, fp32 [count]; reads only their bytes."""
        offset, size = self.entries[name]
        assert 0 <= start <= start + count <= size, f"{name} has {size} elements, not {start} to {start + count}"
        values = np.fromfile(self.path, "<f4", count, offset=offset + 4 * start)
        if len(values) != count:
            raise DamagedCheckpoint(
                self.path, f"was truncated while it was read: {len(values)} of {count} elements of {name}"
            )
        return torch.from_numpy(values.astype(np.float32, copy=False))


def check_new_file(out: Path) -> None:
    """Raises MegaSoraError unless `out` can be created as a safetensors file."""
    if out.suffix != ".safetensors":
        raise MegaSoraError(f"{out} must end in .safetensors")
    if out.exists():
        raise MegaSoraError(f"{out} exists; remove it or choose another name")
    if not out.parent.is_dir():
        raise MegaSoraError(f"there is no folder {out.parent}; make it first")

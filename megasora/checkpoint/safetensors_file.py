"""Safetensors files, written atomically and one tensor at a time: memory holds one tensor, however large the file.

Format: the length of a JSON header as 8 bytes, the header with the byte range of each tensor, then the tensors' bytes,
little-endian.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.errors import MegaSoraError
from megasora.files import atomic_writer

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
            data = value.to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy()
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
    return header_bytes(header)


def header_bytes(header: dict[str, Any]) -> bytes:
    """The first bytes of a file: the length of the JSON text, and the text, aligned as the format requires."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_new_file(out: Path) -> None:
    """Raises MegaSoraError unless `out` can be created as a safetensors file."""
    if out.suffix != ".safetensors":
        raise MegaSoraError(f"{out} must end in .safetensors")
    if out.exists():
        raise MegaSoraError(f"{out} exists; remove it or choose another name")
    if not out.parent.is_dir():
        raise MegaSoraError(f"there is no folder {out.parent}; make it first")

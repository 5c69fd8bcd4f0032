"""Files of fp32 tensors in the safetensors format, written one tensor at a time and read by runs of numbers.

Memory holds one tensor, however large the file; what is written is there whole or not at all. The format: the length of
a JSON text as 8 bytes, the text, which says where each tensor lies, then the numbers, little-endian.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megasora.errors import MegaSoraError
from megasora.files import whole_file

LONGEST_HEADER = 1 << 30  # bytes


def write_tensors(
    path: Path,
    shapes: Mapping[str, torch.Size],
    value_of: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    wrote: Callable[[int], None] = lambda size: None,
) -> None:
    """`value_of` is asked for each tensor when its turn comes; `wrote` is told the bytes of each."""
    with whole_file(path) as file:
        file.write(header(shapes, metadata))
        for name, shape in shapes.items():
            value = value_of(name).detach()
            assert value.shape == shape, f"{name} is {list(value.shape)}, not {list(shape)}"
            data = value.cpu().contiguous().numpy().astype("<f4", copy=False)
            file.write(data)
            wrote(data.nbytes)


def header(shapes: Mapping[str, torch.Size], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    place = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # aligned, as the format asks
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class TensorFile:
    """A file that `write_tensors` wrote, its numbers not yet read."""

    path: Path
    metadata: dict[str, str]
    places: dict[str, tuple[int, int]]  # of each tensor: its first byte, its numbers

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Raises MegaSoraError where it is no such file, or not all of it is there."""
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(LONGEST_HEADER, path.stat().st_size - 8):
                    raise ValueError(f"a header of {length} bytes")
                entries = json.loads(file.read(length))
            metadata = entries.pop("__metadata__")
            places, end = {}, 8 + length
            for name, entry in entries.items():
                first, last = entry["data_offsets"]
                count = math.prod(entry["shape"])
                if (entry["dtype"], 8 + length + first, last - first) != ("F32", end, 4 * count):
                    raise ValueError(f"{name} is {entry}")
                places[name], end = (end, count), end + 4 * count
            if path.stat().st_size != end:
                raise ValueError(f"{path.stat().st_size} bytes, {end} expected")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MegaSoraError(f"{path} cannot be read: {error}; use an earlier checkpoint") from None
        return cls(path, metadata, places)

    def read(self, name: str, start: int, count: int) -> Tensor:
        """`count` numbers of the flattened tensor from `start` on, fp32; only these are read."""
        first, size = self.places[name]
        assert 0 <= start <= start + count <= size, f"{name} has {size} numbers, not {start} to {start + count}"
        numbers = np.fromfile(self.path, "<f4", count, offset=first + 4 * start)
        if len(numbers) != count:
            raise MegaSoraError(f"{self.path} was cut while it was read: {len(numbers)} of {count} numbers of {name}")
        return torch.from_numpy(numbers.astype(np.float32, copy=False))


def check_new_file(out: Path) -> None:
    """Raises MegaSoraError where `out` cannot become a new file of weights."""
    if out.suffix != ".safetensors":
        raise MegaSoraError(f"{out} must end in .safetensors")
    if out.exists():
        raise MegaSoraError(f"{out} exists; remove it or choose another name")
    if not out.parent.is_dir():
        raise MegaSoraError(f"there is no folder {out.parent}; make it first")

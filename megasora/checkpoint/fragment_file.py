"""The file of one rank in a checkpoint: a safetensors file in blocks with digests, see block_file.py.

Tensors `kind/name`, fp32 [n]; metadata: where each fragment is in its full parameter; the last tensor, `digests`, is
the table of block digests, uint8 [blocks, 32]. So any program that reads safetensors reads the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.checkpoint.block_file import DIGEST_BYTES, BlockLayout, BlockReader, BlockWriter
from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.safetensors_file import MAX_HEADER_BYTES, header_bytes
from megasora.files import atomic_writer
from megasora.fragment import Fragment
from megasora.jsonl import parse_json

METADATA, DIGESTS = "fragments", "digests"
ITEM_BYTES = 4  # fp32


@dataclass(frozen=True)
class WrittenFile:
    size: int
    digest: str  # hexadecimal


def fragment_metadata(f: Fragment) -> dict[str, Any]:
    return {
        "shape": list(f.shape), "shard_dim": f.placement.shard_dim, "num_chunks": f.placement.num_chunks,
        "tensor_rank": f.tensor_rank, "tensor_size": f.tensor_size, "start": f.start,
    }  # fmt: skip


def unsharded_metadata(shape: torch.Size) -> dict[str, Any]:
    """Of a fragment that is the full parameter."""
    return {"shape": list(shape), "shard_dim": None, "num_chunks": 1, "tensor_rank": 0, "tensor_size": 1, "start": 0}


def file_header(counts: Mapping[str, int], fragments: Mapping[str, Any]) -> bytes:
    """The first bytes of a file with tensors of so many elements, in this order, and the metadata of each fragment."""
    entries, offset = {}, 0
    for key, count in counts.items():
        end = offset + ITEM_BYTES * count
        entries[key] = {"dtype": "F32", "shape": [count], "data_offsets": [offset, end]}
        offset = end
    blocks = BlockLayout(0, offset).num_blocks
    end = offset + DIGEST_BYTES * blocks
    table = {"dtype": "U8", "shape": [blocks, DIGEST_BYTES], "data_offsets": [offset, end]}
    return header_bytes({"__metadata__": {"format": "pt", METADATA: json.dumps(fragments)}, **entries, DIGESTS: table})


def file_bytes(header: bytes, counts: Mapping[str, int]) -> int:
    return BlockLayout(len(header), len(header) + ITEM_BYTES * sum(counts.values())).file_bytes


def write_fragment_file(
    path: Path,
    header: bytes,
    values: Iterable[Tensor],
    on_written: Callable[[int], None] = lambda size: None,
) -> WrittenFile:
    """Writes the file atomically, flushed to the disk. `values`: fp32 [n] on any device, in the order of the header."""
    with atomic_writer(path) as file:
        with BlockWriter(file, header, on_written) as writer:
            for tensor in values:
                assert tensor.dtype == torch.float32, tensor.dtype
                writer.write(memoryview(tensor.detach().cpu().contiguous().numpy()).cast("B"))
        size = file.tell()
    return WrittenFile(size, writer.digest.hex())


class FragmentFile:
    """Reads such a file, verified. Raises DamagedCheckpoint if it is not what was written."""

    def __init__(self, path: Path, written: WrittenFile):
        self.path, self.reader = path, BlockReader(path, written.size, bytes.fromhex(written.digest))

    def read_header(self) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
        """(metadata of the fragments by name, (offset in the file, elements) of each tensor)."""
        content = self.reader.content_bytes
        try:
            length = int.from_bytes(self.read_bytes(0, 8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, content - 8):
                raise ValueError(f"a header of {length} bytes")
            header = parse_json(self.read_bytes(8, length))
            fragments = parse_json(header.pop("__metadata__")[METADATA].encode())
            table, entries, end = header.pop(DIGESTS), {}, 8 + length
            for key, tensor in header.items():
                (start, stop), (count,) = tensor["data_offsets"], tensor["shape"]
                if (tensor["dtype"], 8 + length + start, stop - start) != ("F32", end, ITEM_BYTES * count):
                    raise ValueError(f"{key} is {tensor}")
                entries[key], end = (end, count), end + ITEM_BYTES * count
            if end != content or 8 + length + table["data_offsets"][0] != end:
                raise ValueError(f"{content} bytes of tensors, {end} expected")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpoint(self.path, f"cannot be read: {error}") from None
        return fragments, entries

    def read_bytes(self, start: int, count: int) -> bytes:
        data = bytearray(count)
        self.reader.read_into(start, memoryview(data))
        return bytes(data)

    def read(self, offset: int, out: Tensor) -> None:
        """Fills `out`, fp32 on the CPU and contiguous, with the elements from byte `offset` on."""
        self.reader.read_into(offset, memoryview(out.numpy()).cast("B"))

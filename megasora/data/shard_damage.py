"""Damage of shards: where in a record it is, and how an error describes it."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import numpy as np
import torch
from zlib_ng.zlib_ng import crc32

from megasora.data.shard_format import MEMBERS
from megasora.data.tar import BLOCK_BYTES, DamagedTar, read_header

OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # errors of this process, not of a file
FIRST_INFINITE = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}  # bits of infinity; those of NaN are above


def locate_damage(row: np.void, record: bytes, member_files: Sequence[str]) -> tuple[int, str]:
    """(offset in the tar, description) of the damage of a record whose checksum is wrong.

    `row`: its row of the index; `record`: the bytes read, fewer than indexed if the tar was cut.
    """
    start, size, _ = row["record"].item()
    if len(record) < size:
        return start + len(record), f"the record ({len(record)} of {size} bytes: the tar was cut)"
    for member, file in zip(MEMBERS, member_files, strict=True):
        offset, length, checksum = row[member].item()
        if not offset:
            continue
        begin = offset - start
        header = bytes(record[begin - BLOCK_BYTES : begin])
        if not is_header_of(header, f"{row['sample_id']:09d}.{file}", length):
            return offset - BLOCK_BYTES, f"the header of {file}"
        if (actual := crc32(record[begin : begin + length])) != checksum:
            return offset, f"{file} ({length} bytes, checksum {actual:08x}, expected {checksum:08x})"
    return start, "a header or the padding after a file"


def is_header_of(header: bytes, name: str, size: int) -> bool:
    """True if a tar header declares this file name and size."""
    if len(header) < BLOCK_BYTES:
        return False
    try:
        _, declared_name, declared_size = read_header(header, 0, "")
    except DamagedTar:
        return False
    return declared_size == size and declared_name == name.encode()


def check_tar_size(folder: object, name: str, actual: int | None, declared: int) -> None:
    """Raises DamagedTar for a tar that is missing (None), or has another number of bytes than declared."""
    if actual is None:
        raise DamagedTar(f"{folder}/{name}", 0, missing_text(folder, name))
    if actual != declared:
        problem = f"the file has {actual} bytes, it was written with {declared}: it was cut or changed"
        raise DamagedTar(f"{folder}/{name}", min(actual, declared), f"{problem}; {remedy_text(folder, name)}")


def damaged_record(folder: object, name: str, offset: int, part: str, sample_id: int) -> DamagedTar:
    """The error for a damaged `part` of a sample, as `locate_damage` describes it, in the tar `name`."""
    problem = f"{part} of sample {sample_id} is damaged; {remedy_text(folder, name)}"
    return DamagedTar(f"{folder}/{name}", offset, problem, sample_id)


def read_error_text(folder: object, name: str, error: OSError) -> str:
    """What the system says when it cannot read a tar, and the remedy."""
    if isinstance(error, FileNotFoundError):
        return missing_text(folder, name)
    return f"it cannot be read: {error.strerror or error}; {remedy_text(folder, name)}"


def first_non_finite(data: memoryview, dtype: torch.dtype) -> int | None:
    """The byte offset of the first number that is infinite or NaN, among numbers of `dtype`: float16 or bfloat16."""
    bits, limit = np.frombuffer(data, np.uint16), FIRST_INFINITE[dtype]
    if bits.view(np.int16).max(initial=0) < limit and bits.max(initial=0) < 0x8000 + limit:  # with sign: 0x8000 above
        return None
    return int(np.flatnonzero((bits & 0x7FFF) >= limit)[0]) * 2


def missing_text(folder: object, name: str) -> str:
    return f"the file is missing; {remedy_text(folder, name)}"


def remedy_text(folder: object, name: str) -> str:
    """What to do about a damaged tar or index; `name`: of the tar."""
    return f"restore it, or remove {folder}/blocks/{name.split('-')[1]}.json and ingest again"

"""JSON values, and JSONL files: one JSON object per line."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

TAIL_BYTES = 1 << 16


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for all other text, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def finite_or_none(values: Any) -> Any:
    """`values` with None in place of each number that is not finite, which JSON does not have; in dicts and lists
    too."""
    if isinstance(values, dict):
        return {key: finite_or_none(value) for key, value in values.items()}
    if isinstance(values, list):
        return [finite_or_none(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


class JsonlWriter:
    """Appends one JSON object per line to a file, unbuffered; closes a line that a killed process left incomplete."""

    def __init__(self, path: Path):
        self.file = open(path, "ab+", buffering=0)  # noqa: SIM115
        if not self.file.seekable():  # a FIFO
            self.file.close()
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        end = self.file.seek(0, os.SEEK_END)
        if end and os.pread(self.file.fileno(), 1, end - 1) != b"\n":
            self.append(b"\n")

    def write(self, values: dict[str, Any]) -> None:
        """Raises ValueError for NaN and infinite numbers, which JSON does not have, and OSError with the file."""
        self.append(json.dumps(values, allow_nan=False).encode() + b"\n")

    def append(self, data: bytes) -> None:
        """Writes all of `data`: on a full disk one write may take only a part."""
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError as error:
            error.filename = error.filename or self.file.name
            raise

    def close(self) -> None:
        self.file.close()


def read_tail(path: Path) -> list[dict[str, Any]]:
    """The objects in the last TAIL_BYTES of a JSONL file; lines that cannot be read are skipped."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    values = []
    for line in lines if size <= TAIL_BYTES else lines[1:]:
        try:
            values.append(parse_json(line))
        except ValueError:
            continue
    return [value for value in values if isinstance(value, dict)]

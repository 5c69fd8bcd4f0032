"""JSONL files: one JSON object per line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class JsonlWriter:
    """Appends one JSON object per line to a file, unbuffered; closes a line that a killed process left incomplete."""

    def __init__(self, path: Path):
        self.file = open(path, "ab+", buffering=0)  # noqa: SIM115
        end = self.file.seek(0, os.SEEK_END)
        if end and os.pread(self.file.fileno(), 1, end - 1) != b"\n":
            self.file.write(b"\n")

    def write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values).encode() + b"\n")

    def close(self) -> None:
        self.file.close()

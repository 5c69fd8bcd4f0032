"""Verifies every byte of a checkpoint against its manifest, with several threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megasora.checkpoint.block_file import BlockReader
from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.manifest import Manifest, check_kind_and_size, describe, read_manifest, read_verified

BLOCKS_PER_TASK = 16
MAX_THREADS = 8
Action = Callable[[], object]


def verify_checkpoint(
    checkpoint: Path, threads: int = 0, on_read: Callable[[int], None] = lambda size: None
) -> Manifest:
    """Reads all files and returns the manifest. `threads`: 0: one per core, at most MAX_THREADS. `on_read(bytes)` is
    called as they are read, by any thread.

    Raises DamagedCheckpoint with the file if one is missing, damaged or unreadable.
    """
    manifest = read_manifest(checkpoint)
    with ThreadPoolExecutor(threads or min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        for name in manifest.files:  # one file after the other: a few threads read a disk best in sequence
            for _ in pool.map(lambda action: action(), file_actions(checkpoint, manifest, name, on_read)):
                pass
    return manifest


def file_actions(checkpoint: Path, manifest: Manifest, name: str, on_read: Callable[[int], None]) -> list[Action]:
    """The parts of the verification of a file."""
    size, digest = manifest.files[name]
    try:
        check_kind_and_size(checkpoint, manifest, name)
        if not name.endswith(".safetensors"):
            read_verified(checkpoint, manifest, name)
            on_read(size)
            return []
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(checkpoint / name, f"cannot be read: {describe(error)}") from None
    reader = BlockReader(checkpoint / name, size, bytes.fromhex(digest))
    return [
        lambda first=first: reader.verify_blocks(first, first + BLOCKS_PER_TASK, on_read)
        for first in range(0, reader.layout.num_blocks, BLOCKS_PER_TASK)
    ]

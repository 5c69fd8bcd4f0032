"""Merges the complete ingest blocks of a folder (shard_writer.py) into a dataset: checks them, writes dataset.json."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megasora.data.shard_damage import check_tar_size, missing_text
from megasora.data.shard_format import INDEX_DTYPE, MANIFEST, SPLITS, Manifest, add_counts, count_clips, index_name
from megasora.data.shard_writer import BLOCK_DIR, LOCK_DIR, STAGING_DIR, BlockInfo, json_text, marker_path
from megasora.errors import MegaSoraError
from megasora.files import read_regular_file, sync, write_text_atomic
from megasora.jsonl import parse_json
from megasora.locks import locked

MAX_BLOCK_BYTES = 1 << 30  # of blocks/BLOCK.json


def read_block(folder: Path, block: int) -> BlockInfo | None:
    """The contents of a complete block; None if it is not complete. Raises MegaSoraError if one of its files is missing
    or cut."""
    path = marker_path(folder, block)
    try:
        info = BlockInfo(**parse_json(read_regular_file(path, MAX_BLOCK_BYTES).decode("utf-8")))
        sizes = {name: shard["bytes"] for counts in info.splits.values() for name, shard in counts["shards"].items()}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise MegaSoraError(f"{path} is damaged: {error}; remove it and ingest again") from None
    for name, size in sizes.items():
        tar = folder / name
        check_tar_size(folder, name, tar.stat().st_size if tar.is_file() else None, size)
        if not (folder / index_name(name)).is_file():
            raise MegaSoraError(f"{folder / index_name(name)}: {missing_text(folder, name)}")
    return info


def write_manifest(
    folder: Path,
    codec_fingerprint: str,
    text_fingerprint: str,
    patch: list[int],
    num_blocks: int,
    codec_settings: Mapping[str, Any],
) -> Manifest:
    """Writes dataset.json over all blocks and removes the lock and staging folders. Its bytes depend on the blocks
    alone.

    `codec_settings`: the configuration to build the codec from. Raises MegaSoraError if blocks are missing or do not
    fit together. Several processes may call it at once.
    """
    with locked(folder / LOCK_DIR / "manifest", f"the manifest of {folder}", wait=True):
        blocks = read_all_blocks(folder, num_blocks)
        manifest = merge_blocks(folder, blocks)
        manifest.codec_fingerprint, manifest.text_fingerprint = codec_fingerprint, text_fingerprint
        manifest.patch, manifest.codec_settings = list(patch), dict(codec_settings)
        write_text_atomic(folder / MANIFEST, json_text(asdict(manifest)))
        sync(folder)
        shutil.rmtree(folder / STAGING_DIR, ignore_errors=True)  # of writers killed after they completed their block
        for lock in (folder / LOCK_DIR).glob("[0-9]*"):
            lock.unlink(missing_ok=True)
    return manifest


def read_all_blocks(folder: Path, num_blocks: int) -> list[BlockInfo]:
    """Blocks 0 to num_blocks - 1. Raises MegaSoraError if one is not complete, or there are more."""
    blocks = [read_block(folder, block) for block in range(num_blocks)]
    if missing := [block for block, info in enumerate(blocks) if info is None]:
        shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        raise MegaSoraError(f"{folder}: {len(missing)} of {num_blocks} blocks are missing: {shown}; ingest again")
    names = {marker_path(folder, block).name for block in range(num_blocks)}
    if extra := sorted(path.name for path in (folder / BLOCK_DIR).glob("*.json") if path.name not in names):
        raise MegaSoraError(
            f"{folder / BLOCK_DIR / extra[0]} is beyond the {num_blocks} blocks of this ingest; remove it"
        )
    return blocks


def merge_blocks(folder: Path, blocks: list[BlockInfo]) -> Manifest:
    """A manifest with the counts and shards of all blocks. Raises MegaSoraError if blocks contradict each other."""
    manifest = Manifest("", "", [], 0, {}, {})
    for split in SPLITS:
        manifest.splits[split] = {**count_clips(np.zeros(0, INDEX_DTYPE)), "shards": {}}
    with_clips = [info for info in blocks if not info.is_empty]
    for previous, info in zip([None, *with_clips], with_clips, strict=False):
        if previous is not None:
            check_consecutive(folder, previous, info)
        manifest.dtype, manifest.patch_dim, manifest.text_dim = info.dtype, info.patch_dim, info.text_dim
        for split, counts in info.splits.items():
            add_counts(manifest.splits[split], counts)
    rejected: dict[str, int] = {}
    for info in blocks:
        for reason, count in info.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
    manifest.rejected = dict(sorted(rejected.items()))
    return manifest


def check_consecutive(folder: Path, previous: BlockInfo, info: BlockInfo) -> None:
    """Raises MegaSoraError if two consecutive blocks share sample ids or were made with different settings."""
    if info.first_sample_id <= previous.last_sample_id:
        raise MegaSoraError(
            f"{folder}: blocks {previous.block} and {info.block} both have sample {info.first_sample_id}"
        )
    for key in ("dtype", "patch_dim", "text_dim"):
        if getattr(info, key) != getattr(previous, key):
            raise MegaSoraError(
                f"{folder}: {key} is {getattr(previous, key)} in block {previous.block} and {getattr(info, key)} in "
                f"block {info.block}; remove one of them from {folder / BLOCK_DIR} and ingest again"
            )

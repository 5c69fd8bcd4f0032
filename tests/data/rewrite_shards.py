"""Changes clips of shards so that only their content is wrong: all checksums are right afterwards."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

from megasora.data.shard_format import MANIFEST, MEMBERS, index_bytes, index_name
from megasora.data.shard_reader import ShardSplit


def rewrite_clip(folder: Path, split: str, clip: int, change) -> int:
    """Applies `change(bytes of the tar, row of the index)` to clip `clip` of a split; returns its sample id."""
    opened = ShardSplit.open(folder, split)
    tar, row = folder / opened.shard_name(clip), opened.index.rows[clip].copy()
    data = bytearray(tar.read_bytes())
    change(data, row)
    tar.write_bytes(data)
    for span in (*MEMBERS, "record"):
        start, size, _ = row[span].item()
        row[span]["crc32"] = zlib.crc32(data[start : start + size])
    index = folder / index_name(tar.name)
    table = np.load(index)
    table[table["sample_id"] == row["sample_id"]] = row
    index.write_bytes(index_bytes(table))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["splits"][split]["shards"][tar.name]["index_crc32"] = zlib.crc32(index.read_bytes())
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return int(row["sample_id"])

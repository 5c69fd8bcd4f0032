"""What `megasora shards` prints of a dataset: counts, sizes, and how long its clips are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megasora.data.shards import Shards, read_manifest

BARS = 12


def describe_shards(folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console, manifest = Console(), read_manifest(folder)
    console.print(f"codec {manifest.codec}   text {manifest.text}   patch {manifest.patch}   format {manifest.format}")
    table = Table("split", "clips", "of these images", "frames", "tokens", "longest clip, tokens", "shards", "MiB")
    for split, counts in manifest.splits.items():
        mib = sum((folder / name).stat().st_size for name in counts["shards"] if (folder / name).is_file()) / 2**20
        numbers = [f"{counts[k]:,}" for k in ("clips", "images", "frames", "tokens", "longest")]
        table.add_row(split, *numbers, str(len(counts["shards"])), f"{mib:.1f}")
    console.print(table)
    tokens = Shards.open(folder, "train").tokens()
    if len(tokens):
        console.print("tokens a clip, train split")
        edges = np.unique(np.geomspace(tokens.min(), tokens.max() + 1, BARS + 1).round().astype(int))
        counts, edges = np.histogram(tokens, edges if len(edges) > 1 else 1)
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            console.print(f"{int(low):>9,} ..{int(high) - 1:>9,} {count:>9,} {'█' * round(40 * count / counts.max())}")

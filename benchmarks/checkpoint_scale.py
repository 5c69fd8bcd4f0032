"""What a checkpoint costs each of thousands of ranks, counted: python -m benchmarks.checkpoint_scale [--out FILE]

No rank runs. From the fragments of each rank (checkpoint_fragments.py) the product's own code makes what it saves, its
header, the manifest, what is gathered on rank 0, the index of a resume and the blocks that a rank reads. Nothing of
size is allocated, written or read.

    save        bytes that a rank writes and hashes; bytes and objects that rank 0 gathers; manifest; files
    commit      seconds of rank 0 from the gathered digests to the visible checkpoint, with empty files
    resume      headers that a node reads; bytes that a rank reads and verifies / bytes that it needs, with the same
                layout and with half the tensor ranks

Before: rank 0 hashed all bytes at each save, and every rank verified all bytes at each resume.

With ZeRO 3, where each rank has a part of every parameter, ranks of a few data ranks are counted, and the index of all
is made up to --max-index fragments.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.checkpoint_fragments import (
    KINDS,
    Layout,
    Owned,
    Rank,
    all_ranks,
    counted_ranks,
    fragments,
    load_config,
    owned_fragments,
)
from benchmarks.record import environment, write_record
from megasora.checkpoint.block_file import DIGEST_BYTES, BlockLayout
from megasora.checkpoint.fragment_file import FragmentFile, WrittenFile
from megasora.checkpoint.manifest import manifest_text
from megasora.checkpoint.sharded import (
    CheckpointIndex,
    RankFile,
    ShardedCheckpoint,
    add_file,
    check_complete,
    saved_part,
)
from megasora.checkpoint.store import CheckpointStore
from megasora.fragment import Fragment

DIGEST = "0" * 2 * DIGEST_BYTES


LAYOUTS = [
    *(Layout("dit_7b", world, 4, zero_stage=stage) for stage in (1, 3) for world in (64, 512, 4096)),
    *(Layout("dit_30b", world, 8, zero_stage=stage) for stage in (1, 3) for world in (64, 512, 4096)),
    Layout("dit_30b", 512, 8, 4),
    Layout("dit_30b", 4096, 8, 4),
]


def rank_file(layout: Layout, rank: int, pipeline: int, tensor: int, owned: list[Owned]) -> RankFile:
    parts = [
        saved_part(f, *f.placement.replica(pipeline, layout.pipeline, tensor, layout.tensor))
        for f in fragments(owned, layout, tensor)
    ]
    return RankFile(rank, [part for part in parts if part is not None])


# ---------------------------------------------------------------- saving


def payload(file: RankFile) -> bytes:
    """What a rank sends to rank 0 after it has written, see `CheckpointSaver.commit`."""
    return pickle.dumps((file.name, WrittenFile(file.size, DIGEST)))


def count_save(files: list[RankFile], world: int) -> dict[str, Any]:
    sizes, headers = [file.size for file in files], [len(file.header) for file in files]
    entries = {f"{i:05d}": [max(sizes), DIGEST] for i in range(world - len(files))}  # those that are not counted
    entries |= {file.name: [file.size, DIGEST] for file in files}
    return {
        "bytes_written_min": min(sizes),
        "bytes_written_mean": statistics.mean(sizes),
        "bytes_written_max": max(sizes),
        "bytes_hashed_max": max(sizes),  # each rank hashes what it writes, once
        "header_bytes_mean": statistics.mean(headers),
        "tensors_mean": statistics.mean(len(file.values) for file in files),
        "gathered_objects": world,
        "gathered_bytes_per_object": max(len(payload(file)) for file in files),
        "manifest_bytes": len(manifest_text({"format": 2, "step": 1, "files": entries}).encode()),
        "files": world + 2,  # and state.json, manifest.json
    }


def measure_commit(folder: Path, world: int) -> float:
    """Seconds of rank 0, after the other ranks have sent their digests."""
    store = CheckpointStore(folder / "checkpoints")
    staging, messages = store.begin(1), []
    (staging / "fragments").mkdir()
    for rank in range(world):
        file = RankFile(rank, [])
        (staging / file.name).touch()
        messages.append(payload(file))
    start = time.perf_counter()
    store.commit(1, {}, dict(pickle.loads(message) for message in messages))
    return time.perf_counter() - start


# ---------------------------------------------------------------- loading


class HeaderFile(FragmentFile):
    """A file of which only the header exists."""

    def __init__(self, file: RankFile):
        self.path, self.header = Path(file.name), file.header
        self.reader = SimpleNamespace(content_bytes=layout_of(file).content_bytes)

    def read_bytes(self, start: int, count: int) -> bytes:
        return self.header[start : start + count]


def layout_of(file: RankFile) -> BlockLayout:
    return BlockLayout.of_file(len(file.header), file.size)


class CountedFile:
    """Counts what `FragmentFile.read` would read: whole blocks, the last one that was read in part is kept."""

    def __init__(self, layout: BlockLayout):
        self.layout, self.kept = layout, -1
        self.num_bytes = DIGEST_BYTES * layout.num_blocks  # the table

    def read(self, offset: int, out: torch.Tensor) -> None:
        stop = offset + 4 * len(out)
        for block in range(self.layout.block_at(offset), self.layout.block_at(stop - 1) + 1):
            first, last = self.layout.range_of(block)
            is_whole = offset <= first and stop >= last
            if is_whole or self.kept != block:
                self.num_bytes += last - first
            if not is_whole:
                self.kept = block


class CountedCheckpoint(ShardedCheckpoint):
    def __init__(self, index: CheckpointIndex, layouts: list[BlockLayout]):
        super().__init__(Path(), index)
        self.layouts, self.counted = layouts, dict[int, CountedFile]()

    def file(self, number: int) -> CountedFile:
        return self.counted.setdefault(number, CountedFile(self.layouts[number]))


def build_index(files: list[RankFile]) -> CheckpointIndex:
    """As `read_index` does, from headers in memory."""
    index = CheckpointIndex(Path(), [(file.name, WrittenFile(file.size, DIGEST)) for file in files], [], {})
    for number, file in enumerate(files):
        add_file(index, number, HeaderFile(file))
    for name, parameter in index.parameters.items():
        for rank, rows in parameter.fragments.items():
            parameter.fragments[rank] = np.array(sorted(rows), dtype=np.int64)
        check_complete(index, name, parameter)
    return index


def count_reads(index: CheckpointIndex, layouts: list[BlockLayout], wanted: list[Fragment]) -> dict[str, float]:
    """Of one rank that loads `wanted`, in the order of `ShardedCheckpoint.load_into`."""
    checkpoint = CountedCheckpoint(index, layouts)
    with torch.device("meta"):
        for kind in KINDS:
            for f in wanted:
                checkpoint.read_local(kind, f.name, f.placement, f.tensor_rank, f.tensor_size, f.start, f.count)
    read = sum(file.num_bytes for file in checkpoint.counted.values())
    needed = sum(4 * f.count * len(KINDS) for f in wanted)
    return {"read": read, "needed": needed, "ratio": read / needed, "files": len(checkpoint.counted)}


def count_resume(
    files: list[RankFile], layout: Layout, owned: list[list[list[Owned]]], settings: list[str]
) -> dict[str, Any]:
    """Of a resume of all files: what a node reads first, and what ranks read, with the same and with another layout."""
    start = time.perf_counter()
    index, layouts = build_index(files), [layout_of(file) for file in files]
    seconds, pickled = time.perf_counter() - start, len(pickle.dumps(index))
    data, other = layout.data_context // 2, replace(layout, tensor=layout.tensor // 2)
    same = fragments(owned[0][data], layout, layout.tensor - 1)
    resharded = fragments(owned_fragments(load_config(other, settings), other, 0)[data], other, other.tensor - 1)
    return {
        "index_seconds": seconds,
        "index_bytes": pickled,  # that the first rank of a node sends to the others
        "index_rows": sum(len(rows) for p in index.parameters.values() for rows in p.fragments.values()),
        "header_reads_per_node": len(files),
        "header_bytes_read_per_node": sum(header_reads(file) for file in files),
        "same_layout": count_reads(index, layouts, same),
        "half_the_tensor_ranks": count_reads(index, layouts, resharded),
    }


def header_reads(file: RankFile) -> int:
    """The header and the table of digests."""
    return len(file.header) + DIGEST_BYTES * layout_of(file).num_blocks


# ---------------------------------------------------------------- output


def count(layout: Layout, settings: list[str], max_index: int) -> dict[str, Any]:
    config = load_config(layout, settings)
    owned = [owned_fragments(config, layout, pipeline) for pipeline in range(layout.pipeline)]

    def files_of(ranks: Iterable[Rank]) -> list[RankFile]:
        return [
            rank_file(layout, rank, pipeline, tensor, owned[pipeline][data]) for rank, pipeline, data, tensor in ranks
        ]

    files = files_of(counted_ranks(layout))
    row = {**asdict(layout), **count_save(files, layout.world)}
    row["fragments"] = round(statistics.mean(len(o) for ranks in owned for o in ranks) * layout.world)
    row["state_bytes"] = 4 * len(KINDS) * num_elements(owned, layout)
    if row["fragments"] <= max_index:
        if len(files) < layout.world:
            files = files_of(all_ranks(layout))
        row["resume"] = count_resume(files, layout, owned, settings)
    return row


def num_elements(owned: list[list[list[Owned]]], layout: Layout) -> int:
    """Of the full model: replicas count once."""
    shapes = {o.name: o.shape for ranks in owned for fragments_of_rank in ranks for o in fragments_of_rank}
    return sum(shape.numel() for shape in shapes.values())


def table_of_saves(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="a save: before, rank 0 hashed the whole state", title_justify="left")
    for name in ("layout", "state, GB", "MB a rank: min", "mean", "max", "max / mean", "headers, KB a rank",
                 "to rank 0, B a rank", "manifest, KB", "files"):  # fmt: skip
        table.add_column(name, justify="left" if name == "layout" else "right")
    for r in rows:
        low, mean, high = (r[f"bytes_written_{x}"] for x in ("min", "mean", "max"))
        table.add_row(
            name_of(r), f"{r['state_bytes'] / 1e9:.1f}", *(f"{x / 1e6:.2f}" for x in (low, mean, high)),
            f"{high / mean:.4f}", f"{r['header_bytes_mean'] / 1e3:.1f}", f"{r['gathered_bytes_per_object']}",
            f"{r['manifest_bytes'] / 1e3:.1f}", f"{r['files']:,}",
        )  # fmt: skip
    return table


def table_of_resumes(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="a resume: before, every rank read the whole state", title_justify="left")
    for name in ("layout", "headers a node", "MB of them", "index, s", "MB to the node", "needed, MB a rank",
                 "read, MB", "read / needed", "files", "tensor / 2: read / needed"):  # fmt: skip
        table.add_column(name, justify="left" if name == "layout" else "right")
    for r in (r for r in rows if "resume" in r):
        resume = r["resume"]
        same, other = resume["same_layout"], resume["half_the_tensor_ranks"]
        table.add_row(
            name_of(r), f"{resume['header_reads_per_node']:,}", f"{resume['header_bytes_read_per_node'] / 1e6:,.1f}",
            f"{resume['index_seconds']:.2f}", f"{resume['index_bytes'] / 1e6:.1f}", f"{same['needed'] / 1e6:.1f}",
            f"{same['read'] / 1e6:.1f}", f"{same['ratio']:.2f}", f"{same['files']}", f"{other['ratio']:.2f}",
        )  # fmt: skip
    return table


def name_of(row: dict[str, Any]) -> str:
    pipeline = f", pipeline {row['pipeline']}" if row["pipeline"] > 1 else ""
    return f"{row['preset']}, {row['world']:,} ranks, tensor {row['tensor']}{pipeline}, ZeRO {row['zero_stage']}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    parser.add_argument("--max-index", type=int, default=200_000, help="fragments of an index that is made")
    parser.add_argument("--quick", action="store_true", help="a small model on 16 ranks")
    options = parser.parse_args(arguments)
    layouts, settings = LAYOUTS, ["text.name=bytes", "text.path="]
    if options.quick:
        layouts = [Layout("small", 16, 4, zero_stage=stage) for stage in (1, 3)]
        settings = ["model.width=64", "model.depth=2", "model.heads=4", "codec.channels=4"]

    head, console, rows = environment(), Console(width=200), []
    for layout in layouts:
        rows.append(count(layout, settings, options.max_index))
    with tempfile.TemporaryDirectory(prefix=".checkpoint-benchmark-", dir=".") as folder:
        worlds = sorted({layout.world for layout in layouts})
        commits = {world: measure_commit(Path(folder) / str(world), world) for world in worlds}
    console.print(table_of_saves(rows))
    console.print(table_of_resumes(rows))
    for world, seconds in commits.items():
        console.print(f"commit of {world:,} files on rank 0: {seconds:.3f} s")
    if options.out:
        write_record(options.out, head, {"layouts": rows, "commit_seconds": commits})
        console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

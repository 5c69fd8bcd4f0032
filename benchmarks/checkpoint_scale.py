"""What a checkpoint of thousands of ranks costs each of them, counted: python -m benchmarks.checkpoint_scale [--out FILE]

No rank runs. The local model of each pipeline stage is built on the meta device with the product's code, its parameters
are partitioned over data x context as DeepSpeed does (megasora/formats/deepspeed_layout.py), and the product's own code
makes of these fragments what each rank saves, its header, the manifest, what is gathered on rank 0, the index of a
resume and the blocks that a rank reads. Nothing of size is allocated, written or read.

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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import environment, write_record
from megasora.checkpoint.block_file import BLOCK_BYTES, DIGEST_BYTES, num_blocks
from megasora.checkpoint.fragment_file import FragmentFile, WrittenFile
from megasora.checkpoint.manifest import manifest_text
from megasora.checkpoint.sharded import CheckpointIndex, RankFile, ShardedCheckpoint, add_file, check_complete, saved_part
from megasora.checkpoint.store import CheckpointStore
from megasora.config import Config, load
from megasora.formats.deepspeed_layout import SUB_GROUP_SIZE, partition_groups, partition_parameters, split_sub_groups
from megasora.fragment import Fragment
from megasora.parallel.mesh import Axis, Mesh
from megasora.parallel.zero import parameter_groups
from megasora.parallelize import build_local_model, uses_weight_decay
from megasora.placement import Placement

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")
DIGEST = "0" * 2 * DIGEST_BYTES
RANKS_PER_NODE = 8
SAMPLED_DATA_RANKS = 3  # with ZeRO 3: the first, one in the middle, the last


@dataclass(frozen=True)
class Layout:
    preset: str  # name of a file of configs/, or of settings
    world: int
    tensor: int
    pipeline: int = 1
    zero_stage: int = 1

    @property
    def data_context(self) -> int:
        return self.world // (self.tensor * self.pipeline)


LAYOUTS = [
    *(Layout("dit_7b", world, 4, zero_stage=stage) for stage in (1, 3) for world in (64, 512, 4096)),
    *(Layout("dit_30b", world, 8, zero_stage=stage) for stage in (1, 3) for world in (64, 512, 4096)),
    Layout("dit_30b", 512, 8, 4),
    Layout("dit_30b", 4096, 8, 4),
]


def load_config(layout: Layout, settings: list[str]) -> Config:
    """Context counts as data, which is the same for checkpoints. The encoder of captions is none of the model's, but
    its width is: that of T5-XXL."""
    axes = [f"parallel.tensor={layout.tensor}", f"parallel.pipeline={layout.pipeline}", "parallel.context=1"]
    path = CONFIGS / f"{layout.preset}.yaml"
    return load(path if path.exists() else None, [*axes, f"parallel.zero_stage={layout.zero_stage}", *settings])


def mesh_of(layout: Layout, pipeline_rank: int, tensor_rank: int = 0) -> Mesh:
    """Without process groups."""
    axes = {name: Axis(name, 1, 0, group=None) for name in Mesh.__dataclass_fields__}
    axes["tensor"] = Axis("tensor", layout.tensor, tensor_rank, group=None)
    axes["pipeline"] = Axis("pipeline", layout.pipeline, pipeline_rank, group=None)
    axes["data_context"] = Axis("data_context", layout.data_context, 0, group=None)
    return Mesh(**axes)


@dataclass(frozen=True)
class Owned:
    """A fragment without values; those of all tensor ranks are alike."""

    name: str
    shape: torch.Size  # full
    placement: Placement
    start: int
    count: int


@torch.no_grad()
def owned_fragments(config: Config, layout: Layout, pipeline_rank: int) -> list[list[Owned]]:
    """What each rank of data x context owns of the stages of a pipeline rank."""
    local = build_local_model(config, torch.device("meta"), mesh_of(layout, pipeline_rank), Undrawn())
    parameters = {name: p for stage in local.stages.values() for name, p in stage.named_parameters()}
    names = {p: name for name, p in parameters.items()}
    groups = parameter_groups(parameters, local.placements, uses_weight_decay, dict.fromkeys(parameters, 0))
    shapes = [{names[p]: p.shape for p in group} for group in groups.values()]
    if layout.zero_stage == 3:
        sub_groups = [part for parts in split_sub_groups(shapes, layout.data_context, SUB_GROUP_SIZE) for part in parts]
        zero = partition_parameters(sub_groups, layout.data_context)
    else:
        zero = partition_groups(shapes, layout.data_context)
    ranks: list[list[Owned]] = [[] for _ in range(layout.data_context)]
    for name, parameter in parameters.items():
        placement = local.placements[name]
        shape = placement.full_shape(parameter.shape, layout.tensor)
        for piece in zero.pieces[name]:
            ranks[piece.rank].append(Owned(name, shape, placement, piece.start, piece.count))
    return ranks


class Undrawn:
    """A WeightSource that leaves the weights as they are."""

    def fill(self, *arguments: Any) -> None:
        pass


def fragments(owned: list[Owned], layout: Layout, tensor_rank: int) -> list[Fragment]:
    result = []
    for o in owned:
        values = torch.empty(o.count, device="meta")
        is_split = o.placement.shard_dim is not None
        place = (tensor_rank, layout.tensor) if is_split else (0, 1)
        result.append(Fragment(o.name, o.shape, o.placement, *place, o.start, dict.fromkeys(KINDS, values)))
    return result


def ranks_of(layout: Layout) -> Iterator[tuple[int, int, int, int]]:
    """(rank, pipeline rank, data rank, tensor rank) of those that are counted, in the order of the mesh."""
    dp, rank = layout.data_context, 0
    sampled = {0, dp // 2, dp - 1} if layout.zero_stage == 3 else range(dp)
    for pipeline in range(layout.pipeline):
        for data in range(dp):
            for tensor in range(layout.tensor):
                if data in sampled:
                    yield rank, pipeline, data, tensor
                rank += 1


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
        blocks = -(-file.size // (BLOCK_BYTES + DIGEST_BYTES))
        self.reader = SimpleNamespace(content_bytes=file.size - DIGEST_BYTES * blocks)

    def read_bytes(self, start: int, count: int) -> bytes:
        return self.header[start : start + count]


class CountedFile:
    """Counts what `FragmentFile.read` would read: whole blocks, the last one that was read in part is kept."""

    def __init__(self, content_bytes: int):
        self.content_bytes, self.kept = content_bytes, -1
        self.num_bytes = DIGEST_BYTES * num_blocks(content_bytes)  # the table

    def read(self, offset: int, out: torch.Tensor) -> None:
        stop = offset + 4 * len(out)
        for block in range(offset // BLOCK_BYTES, num_blocks(stop)):
            first, last = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.content_bytes)
            is_whole = offset <= first and stop >= last
            if is_whole or self.kept != block:
                self.num_bytes += last - first
            if not is_whole:
                self.kept = block


class CountedCheckpoint(ShardedCheckpoint):
    def __init__(self, index: CheckpointIndex, contents: list[int]):
        super().__init__(Path(), index)
        self.contents, self.counted = contents, dict[int, CountedFile]()

    def file(self, number: int) -> CountedFile:
        return self.counted.setdefault(number, CountedFile(self.contents[number]))


def build_index(files: list[RankFile]) -> tuple[CheckpointIndex, list[int]]:
    """As `read_index` does, from headers in memory."""
    import numpy as np

    index = CheckpointIndex(Path(), [(file.name, WrittenFile(file.size, DIGEST)) for file in files], [], {})
    contents = []
    for number, file in enumerate(files):
        header = HeaderFile(file)
        contents.append(header.reader.content_bytes)
        add_file(index, number, header)
    for name, parameter in index.parameters.items():
        for rank, rows in parameter.fragments.items():
            parameter.fragments[rank] = np.array(sorted(rows), dtype=np.int64)
        check_complete(index, name, parameter)
    return index, contents


def count_reads(index: CheckpointIndex, contents: list[int], wanted: list[Fragment]) -> dict[str, float]:
    """Of one rank that loads `wanted`, in the order of `ShardedCheckpoint.load_into`."""
    checkpoint = CountedCheckpoint(index, contents)
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
    index, contents = build_index(files)
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
        "same_layout": count_reads(index, contents, same),
        "half_the_tensor_ranks": count_reads(index, contents, resharded),
    }


def header_reads(file: RankFile) -> int:
    """The table of digests and the blocks that have the header."""
    content = HeaderFile(file).reader.content_bytes
    return DIGEST_BYTES * num_blocks(content) + min(content, BLOCK_BYTES * num_blocks(len(file.header)))


# ---------------------------------------------------------------- output


def count(layout: Layout, settings: list[str], max_index: int) -> dict[str, Any]:
    config = load_config(layout, settings)
    owned = [owned_fragments(config, layout, pipeline) for pipeline in range(layout.pipeline)]
    files = [
        rank_file(layout, rank, pipeline, tensor, owned[pipeline][data])
        for rank, pipeline, data, tensor in ranks_of(layout)
    ]
    row = {**asdict(layout), **count_save(files, layout.world)}
    row["state_bytes"] = row["bytes_written_mean"] * layout.world
    num_fragments = statistics.mean(len(o) for ranks in owned for o in ranks) * layout.world
    row["fragments"] = num_fragments
    row["header_bytes_of_all"] = row["header_bytes_mean"] * layout.world
    if num_fragments <= max_index:
        if len(files) < layout.world:
            everything = replace_sampling(layout)
            files = [
                rank_file(layout, rank, pipeline, tensor, owned[pipeline][data])
                for rank, pipeline, data, tensor in everything
            ]
        row["resume"] = count_resume(files, layout, owned, settings)
    return row


def replace_sampling(layout: Layout) -> Iterator[tuple[int, int, int, int]]:
    return ranks_of(replace(layout, zero_stage=1))

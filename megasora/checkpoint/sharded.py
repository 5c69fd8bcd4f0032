"""Sharded checkpoints: one safetensors file per rank, saved with one layout and loaded with any other.

    fragments of a rank --RankFile.write--> fragments/rank-00000.safetensors, see fragment_file.py
    a checkpoint --read_index--> CheckpointIndex: which file has which elements of each parameter
                 --ShardedCheckpoint--> load_into(fragment): the saved values of a fragment of this rank
                                        full_tensor(kind, name): a full parameter

Kinds are the fp32 weights, the EMA weights and Adam's moments. Every element of the model is in exactly one file, and
nothing is gathered. A rank reads the rows that it needs, and every block that it reads is verified. If the tensor axis
has another size than when it was saved, the rows are taken from the local tensors that have them.
"""

from __future__ import annotations

import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.fragment_file import (
    FragmentFile,
    WrittenFile,
    file_bytes,
    file_header,
    fragment_metadata,
    write_fragment_file,
)
from megasora.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megasora.checkpoint.resharding import Layout, local_pieces
from megasora.checkpoint.safetensors_file import write_tensors
from megasora.errors import MegaSoraError
from megasora.fragment import Fragment
from megasora.placement import Placement

FOLDER = "fragments"
FILE_NAME = re.compile(FOLDER + r"/rank-\d{5,}\.safetensors", re.ASCII)
MAX_OPEN_FILES = 32
MIN_SPREAD_ELEMENTS = 1 << 16  # of a fragment that several replicas save in parts


def rank_file_name(rank: int) -> str:
    return f"{FOLDER}/rank-{rank:05d}.safetensors"


def saved_part(f: Fragment, replica: int, replicas: int) -> Fragment | None:
    """What one of several ranks that hold the same fragment saves of it; together they save it once, and of many
    fragments about equally much. Small ones are saved whole, by a rank that follows from the name."""
    if replicas == 1:
        return f
    if f.count < MIN_SPREAD_ELEMENTS:
        return f if zlib.crc32(f.name.encode()) % replicas == replica else None
    first, stop = (f.count * i // replicas for i in (replica, replica + 1))
    values = {kind: x[first:stop] for kind, x in f.values.items()}
    return Fragment(f.name, f.shape, f.placement, f.tensor_rank, f.tensor_size, f.start + first, values)


class RankFile:
    """What one rank writes into a checkpoint: its header is made once, its values are live.

    One kind follows the other, so that all weights of a file are in one range of it.
    """

    def __init__(self, rank: int, fragments: Iterable[Fragment]):
        fragments = list(fragments)
        kinds = dict.fromkeys(kind for f in fragments for kind in f.values)
        tensors = {f"{kind}/{f.name}": f.values[kind] for kind in kinds for f in fragments}
        counts = {key: values.numel() for key, values in tensors.items()}
        self.name, self.values = rank_file_name(rank), list(tensors.values())
        self.header = file_header(counts, {f.name: fragment_metadata(f) for f in fragments})
        self.size = file_bytes(self.header, counts)

    def write(
        self, folder: Path, values: Iterable[Tensor], on_written: Callable[[int], None] = lambda size: None
    ) -> WrittenFile:
        """Writes the file into `folder`, that of a checkpoint, which exists. `values`: `self.values` or a copy."""
        path = folder / self.name
        path.parent.mkdir(exist_ok=True)
        return write_fragment_file(path, self.header, values, on_written)


@dataclass
class SavedParameter:
    """A full parameter and the fragments that store it."""

    shape: torch.Size  # of the full parameter
    placement: Placement
    tensor_size: int  # number of local tensors; 1 if replicated over the tensor axis
    # by tensor rank, int64 [fragments, 3 + kinds]: first element in the flattened local tensor, elements, number of
    # the file, and for each kind the byte in the file
    fragments: dict[int, Any] = field(default_factory=dict)

    @property
    def layout_key(self) -> tuple[torch.Size, Placement, int]:
        """What all files must agree on."""
        return self.shape, self.placement, self.tensor_size


@dataclass
class CheckpointIndex:
    """Which file has which elements of each parameter. Read once and passed on: it can be pickled."""

    folder: Path  # of the checkpoint
    files: list[tuple[str, WrittenFile]]
    kinds: list[str]
    parameters: dict[str, SavedParameter]


def read_index(checkpoint: Path, manifest: Manifest | None = None) -> CheckpointIndex:
    """Reads the headers of all files that the manifest names. Raises DamagedCheckpoint with the file and the parameter
    if an element is missing or saved twice."""
    entries = (manifest or read_manifest(checkpoint)).files
    files = [(name, WrittenFile(*entries[name])) for name in sorted(entries) if FILE_NAME.fullmatch(name)]
    if not files:
        raise DamagedCheckpoint(checkpoint / MANIFEST, f"names no {FOLDER}/rank-XXXXX.safetensors")
    index = CheckpointIndex(checkpoint, files, [], {})
    for number, (name, written) in enumerate(files):
        add_file(index, number, FragmentFile(checkpoint / name, written))
    for name, parameter in index.parameters.items():
        for rank, rows in parameter.fragments.items():
            parameter.fragments[rank] = np.array(sorted(rows), dtype=np.int64)
        check_complete(index, name, parameter)
    return index


def add_file(index: CheckpointIndex, number: int, file: FragmentFile) -> None:
    fragments, entries = file.read_header()
    try:
        kinds = list(dict.fromkeys(key.partition("/")[0] for key in entries))
        if not fragments and not entries:
            return  # other replicas have saved all that this rank holds
        index.kinds = index.kinds or kinds
        if len(entries) != len(kinds) * len(fragments):
            raise ValueError(f"it has {len(entries)} tensors, {', '.join(kinds)} of {len(fragments)} fragments")
        for name, entry in fragments.items():
            if set(kinds) != set(index.kinds):
                raise ValueError(f"of {name} it has {', '.join(kinds)}, an earlier file {', '.join(index.kinds)}")
            tensors = [entries[f"{kind}/{name}"] for kind in index.kinds]
            if len({count for _, count in tensors}) != 1:
                raise ValueError(f"the kinds of {name} have {sorted({count for _, count in tensors})} elements")
            add_fragment(index, name, entry, tensors[0][1], [number, *(offset for offset, _ in tensors)])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(file.path, f"does not belong to this checkpoint: {error}") from None


def add_fragment(index: CheckpointIndex, name: str, entry: dict[str, Any], count: int, place: list[int]) -> None:
    """`entry`: its metadata. Raises ValueError if it contradicts the fragments added before."""
    placement, tensor_rank, tensor_size = Placement(), 0, 1
    if entry["shard_dim"] is not None:
        placement = Placement(entry["shard_dim"], entry["num_chunks"])
        tensor_rank, tensor_size = entry["tensor_rank"], entry["tensor_size"]
    key = torch.Size(entry["shape"]), placement, tensor_size
    parameter = index.parameters.setdefault(name, SavedParameter(*key))
    if parameter.layout_key != key:
        raise ValueError(f"{name} has another layout in another file")
    parameter.fragments.setdefault(tensor_rank, []).append((entry["start"], count, *place))


def check_complete(index: CheckpointIndex, name: str, parameter: SavedParameter) -> None:
    """Raises DamagedCheckpoint unless the fragments cover each local tensor exactly once."""
    total = parameter.placement.local_shape(parameter.shape, parameter.tensor_size).numel()
    for rank in range(parameter.tensor_size):
        rows = parameter.fragments.get(rank, np.empty((0, 3), np.int64))
        ends = np.concatenate([[0], rows[:, 0] + rows[:, 1]])
        expected = np.concatenate([rows[:, 0], [total]])
        wrong = np.flatnonzero(ends != expected)
        if len(wrong):
            at = min(int(wrong[0]), len(rows) - 1)
            file = index.folder / (index.files[rows[at, 2]][0] if len(rows) else FOLDER)
            raise DamagedCheckpoint(
                file,
                f"does not belong to this checkpoint: the fragments of all files must cover the {total} elements of "
                f"{name} on tensor rank {rank} exactly once, but not from element {int(ends[wrong[0]])} on",
            )


class ShardedCheckpoint:
    """Reads what `RankFile.write` wrote on all ranks, verified. Only files of the manifest count.

    `kinds`: what is saved of each parameter, e.g. weights, ema, exp_avg. `index`: read by another process.
    """

    def __init__(self, checkpoint: Path, index: CheckpointIndex | None = None):
        self.index = index or read_index(checkpoint)
        self.checkpoint, self.folder = checkpoint, checkpoint / FOLDER
        self.parameters, self.kinds = self.index.parameters, set(self.index.kinds)
        self.open_files: OrderedDict[int, FragmentFile] = OrderedDict()

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the full parameters by name, sorted."""
        return {name: self.parameters[name].shape for name in sorted(self.parameters)}

    def stored_kind(self, kind: str) -> str:
        """`kind`, or weights if only these are saved: a checkpoint of imported weights has no average of them."""
        return "weights" if self.kinds == {"weights"} else kind

    def full_tensor(self, kind: str, name: str) -> Tensor:
        """The full values of `kind` of one parameter; fp32, on the CPU."""
        parameter = self.parameters[name]
        return self.read_local(kind, name, Placement(), 0, 1, 0, parameter.shape.numel()).view(parameter.shape)

    def read_fragment(self, kind: str, f: Fragment, out: Tensor | None = None) -> Tensor:
        """The saved values of `kind` at the position of fragment `f`; fp32 [n], on the CPU, in `out` if it is given.

        Raises MegaSoraError if the checkpoint lacks the parameter or `kind`, or has another shape.
        """
        self.check_has(kind, f)
        return self.read_local(kind, f.name, f.placement, f.tensor_rank, f.tensor_size, f.start, f.count, out)

    def check_has(self, kind: str, f: Fragment) -> None:
        parameter = self.parameters.get(f.name)
        if parameter is None or parameter.shape != f.shape or kind not in self.kinds:
            content = f"{list(parameter.shape)} with {', '.join(sorted(self.kinds))}" if parameter else "none"
            raise MegaSoraError(
                f"{self.folder}: {kind} of {f.name} {list(f.shape)} cannot be loaded, the checkpoint has {content}; "
                "use the model.* and text.* settings that it was saved with"
            )

    @torch.no_grad()
    def load_into(self, fragments: Sequence[Fragment], on_read: Callable[[int], None] = lambda size: None) -> None:
        """Overwrites the values of fragments, of all their kinds, in place."""
        fragments = sorted(fragments, key=lambda f: f.placement.shard_dim is not None)  # about as in the files
        for kind in dict.fromkeys(kind for f in fragments for kind in f.values):
            for f in fragments:
                values = f.values[kind].detach()
                if values.device.type == "cpu" and values.is_contiguous():
                    self.read_fragment(kind, f, values)
                else:
                    values.copy_(self.read_fragment(kind, f))
                on_read(4 * f.count)

    def read_local(
        self,
        kind: str,
        name: str,
        placement: Placement,
        tensor_rank: int,
        tensor_size: int,
        start: int,
        count: int,
        out: Tensor | None = None,
    ) -> Tensor:
        """Elements `start .. start + count - 1` of the flattened local tensor of this placement; fp32 [count], in
        `out` if it is given."""
        parameter, number = self.parameters[name], self.index.kinds.index(kind)
        out = torch.empty(count) if out is None else out
        saved = Layout(parameter.shape, parameter.placement, parameter.tensor_size)
        wanted = Layout(parameter.shape, placement, tensor_size)
        for piece in local_pieces(saved, wanted, tensor_rank, start, count):
            part = torch.empty(piece.count) if piece.take else out[piece.out : piece.out + piece.count]
            self.read_range(parameter, number, piece.tensor_rank, piece.start, part)
            if piece.take:
                piece.take(part, out)
        return out

    def read_range(self, parameter: SavedParameter, kind: int, tensor_rank: int, start: int, out: Tensor) -> None:
        """Fills `out` with elements of a tensor rank's flattened saved local tensor, from `start` on."""
        rows, stop = parameter.fragments[tensor_rank], start + len(out)
        first = int(np.searchsorted(rows[:, 0], start, "right")) - 1
        for fragment_start, count, number, *offsets in rows[max(first, 0) :].tolist():
            if fragment_start >= stop:
                break
            begin, end = max(start, fragment_start), min(stop, fragment_start + count)
            if begin < end:
                offset = offsets[kind] + 4 * (begin - fragment_start)
                self.file(number).read(offset, out[begin - start : end - start])

    def file(self, number: int) -> FragmentFile:
        """File `number` of the index, opened; the MAX_OPEN_FILES that were used last stay open."""
        if number not in self.open_files:
            name, written = self.index.files[number]
            self.open_files[number] = FragmentFile(self.checkpoint / name, written)
            if len(self.open_files) > MAX_OPEN_FILES:
                self.open_files.popitem(last=False)
        self.open_files.move_to_end(number)
        return self.open_files[number]


def export(
    checkpoint: ShardedCheckpoint, kind: str, out: Path, on_written: Callable[[int], None] = lambda size: None
) -> None:
    """Writes the full tensors of one kind to one file, for other programs and `run.start=init:`; see write_tensors."""
    write_tensors(out, checkpoint.shapes, partial(checkpoint.full_tensor, kind), {}, on_written)

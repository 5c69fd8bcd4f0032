"""Sharded checkpoints: one safetensors file per rank, saved with one layout and loaded with any other.

    fragments of a rank --write_fragments--> fragments/rank-00000.safetensors: tensors `kind/name`, fp32 [n]; metadata:
                                             where each fragment is in its full parameter
    a checkpoint --ShardedCheckpoint--> read_fragment(kind, fragment): the saved values of a fragment of this rank
                                        full_tensor(kind, name): a full parameter

Kinds are the fp32 weights, the EMA weights and Adam's moments. Each rank writes the fragments it owns: every element of
the model is in exactly one file, and nothing is gathered. Loading first reads the headers of all files. If the size of
the tensor axis and the sharding of a parameter are unchanged, only the needed byte ranges are read; otherwise the full
tensor is assembled, one parameter at a time, and sharded again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.manifest import MANIFEST, read_manifest
from megasora.checkpoint.safetensors_file import TensorFile, write_tensors
from megasora.errors import MegaSoraError
from megasora.fragment import Fragment
from megasora.placement import Placement

FOLDER, METADATA = "fragments", "fragments"
FILE_NAME = re.compile(FOLDER + r"/rank-\d{5,}\.safetensors", re.ASCII)


def write_fragments(checkpoint: Path, rank: int, fragments: Iterable[Fragment]) -> None:
    """Writes this rank's file into the existing folder `checkpoint`. Of replicated fragments, one rank passes each."""
    folder = checkpoint / FOLDER
    folder.mkdir(exist_ok=True)
    metadata, tensors = {}, {}
    for f in fragments:
        metadata[f.name] = {
            "shape": list(f.shape), "shard_dim": f.placement.shard_dim, "num_chunks": f.placement.num_chunks,
            "tensor_rank": f.tensor_rank, "tensor_size": f.tensor_size, "start": f.start,
        }  # fmt: skip
        tensors |= {f"{kind}/{f.name}": values for kind, values in f.values.items()}
    shapes = {name: values.shape for name, values in tensors.items()}
    path = folder / f"rank-{rank:05d}.safetensors"
    write_tensors(path, shapes, tensors.__getitem__, {METADATA: json.dumps(metadata)})


@dataclass(frozen=True)
class SavedFragment:
    """Elements `start .. start + count - 1` of a flattened local tensor, stored in `file`."""

    start: int
    count: int
    file: TensorFile


@dataclass
class SavedParameter:
    """A full parameter and the fragments that store it."""

    shape: torch.Size  # of the full parameter
    placement: Placement
    tensor_size: int  # number of local tensors; 1 if replicated over the tensor axis
    fragments: dict[int, list[SavedFragment]] = field(default_factory=dict)  # by tensor rank

    @property
    def layout_key(self) -> tuple[torch.Size, Placement, int]:
        """What all files must agree on."""
        return self.shape, self.placement, self.tensor_size


class ShardedCheckpoint:
    """Reads what `write_fragments` wrote on all ranks; call `verify_checksums` first. Only files of the manifest count.

    `kinds`: what is saved of each parameter, e.g. weights, ema, exp_avg. Raises DamagedCheckpoint with the file and the
    parameter if an element is missing or saved twice.
    """

    def __init__(self, checkpoint: Path):
        self.folder = checkpoint / FOLDER
        self.parameters: dict[str, SavedParameter] = {}
        self.kinds: set[str] = set()
        files = [name for name in sorted(read_manifest(checkpoint).files) if FILE_NAME.fullmatch(name)]
        if not files:
            raise DamagedCheckpoint(checkpoint / MANIFEST, f"names no {FOLDER}/rank-XXXXX.safetensors")
        for name in files:
            self.add_file(TensorFile.open(checkpoint / name))
        for name, parameter in self.parameters.items():
            self.check_complete(name, parameter)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the full parameters by name, sorted."""
        return {name: self.parameters[name].shape for name in sorted(self.parameters)}

    def stored_kind(self, kind: str) -> str:
        """`kind`, or weights if only these are saved: a checkpoint of imported weights has no average of them."""
        return "weights" if self.kinds == {"weights"} else kind

    def add_file(self, file: TensorFile) -> None:
        try:
            metadata = json.loads(file.metadata[METADATA])
            kinds: dict[str, set[str]] = {name: set() for name in metadata}
            for key in file.entries:
                kind, _, name = key.partition("/")
                kinds[name].add(kind)
            for name, entry in metadata.items():
                self.add_fragment(name, entry, kinds[name], file)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(file.path, f"does not belong to this checkpoint: {error}") from None

    def add_fragment(self, name: str, entry: dict[str, Any], kinds: set[str], file: TensorFile) -> None:
        """`entry`: its metadata. Raises ValueError if it contradicts the fragments added before."""
        placement, tensor_rank, tensor_size = Placement(), 0, 1
        if entry["shard_dim"] is not None:
            placement = Placement(entry["shard_dim"], entry["num_chunks"])
            tensor_rank, tensor_size = entry["tensor_rank"], entry["tensor_size"]
        key = torch.Size(entry["shape"]), placement, tensor_size
        parameter = self.parameters.setdefault(name, SavedParameter(*key))
        if parameter.layout_key != key:
            raise ValueError(f"{name} is {key}, {parameter.layout_key} in another file")
        self.kinds = self.kinds or kinds
        counts = {file.entries[f"{kind}/{name}"].count for kind in kinds}
        if kinds != self.kinds or len(counts) != 1:
            raise ValueError(f"{name} has {sorted(kinds)} of {counts} elements, not {sorted(self.kinds)}")
        fragment = SavedFragment(entry["start"], counts.pop(), file)
        parameter.fragments.setdefault(tensor_rank, []).append(fragment)

    def check_complete(self, name: str, parameter: SavedParameter) -> None:
        """Raises DamagedCheckpoint unless the fragments cover each tensor rank's local tensor exactly once."""
        count = parameter.placement.local_shape(parameter.shape, parameter.tensor_size).numel()
        for rank in sorted({*range(parameter.tensor_size), *parameter.fragments}):
            covered, path = 0, self.folder
            for fragment in sorted(parameter.fragments.get(rank, []), key=lambda fragment: fragment.start):
                if fragment.start != covered:
                    break
                covered, path = covered + fragment.count, fragment.file.path
            else:
                if covered == count and rank < parameter.tensor_size:
                    continue
            raise DamagedCheckpoint(
                path,
                f"is wrong: the fragments of {name} (tensor rank {rank} of {parameter.tensor_size}) do not cover its "
                f"{count} elements exactly once, from element {covered} on",
            )

    def full_tensor(self, kind: str, name: str) -> Tensor:
        """The full values of `kind` of one parameter; fp32, on the CPU."""
        parameter = self.parameters[name]
        shape = parameter.placement.local_shape(parameter.shape, parameter.tensor_size)
        ranks = range(parameter.tensor_size)
        return parameter.placement.full([self.read_range(kind, name, r, 0, shape.numel()).view(shape) for r in ranks])

    def read_fragment(self, kind: str, f: Fragment) -> Tensor:
        """The saved values of `kind` at the position of fragment `f`; fp32 [n], on the CPU.

        Raises MegaSoraError if the checkpoint lacks the parameter or `kind`, or has another shape.
        """
        parameter = self.parameters.get(f.name)
        if parameter is None or parameter.shape != f.shape or kind not in self.kinds:
            content = f"{list(parameter.shape)} with {', '.join(sorted(self.kinds))}" if parameter else "none"
            raise MegaSoraError(
                f"{self.folder}: {kind} of {f.name} {list(f.shape)} cannot be loaded, the checkpoint has {content}; "
                "use the model.* and text.* settings that it was saved with"
            )
        size = f.tensor_size if f.placement.shard_dim is not None else 1
        saved = parameter.placement
        same_sharding = (f.placement.shard_dim, f.placement.num_chunks) == (saved.shard_dim, saved.num_chunks)
        if size == parameter.tensor_size and (size == 1 or same_sharding):
            return self.read_range(kind, f.name, f.tensor_rank if size > 1 else 0, f.start, f.count)
        full = self.full_tensor(kind, f.name)
        return f.placement.local(full, f.tensor_rank, f.tensor_size).reshape(-1)[f.start : f.start + f.count]

    @torch.no_grad()
    def load_into(self, f: Fragment) -> None:
        """Overwrites the values of a fragment, of all its kinds, in place."""
        for kind, values in f.values.items():
            values.copy_(self.read_fragment(kind, f))

    def read_range(self, kind: str, name: str, tensor_rank: int, start: int, count: int) -> Tensor:
        """Elements `start .. start + count - 1` of a tensor rank's flattened local tensor; fp32 [count]."""
        values = torch.empty(count)
        for fragment in self.parameters[name].fragments[tensor_rank]:
            first, stop = max(start, fragment.start), min(start + count, fragment.start + fragment.count)
            if first < stop:
                values[first - start : stop - start] = fragment.file.read(
                    f"{kind}/{name}", first - fragment.start, stop - first
                )
        return values


def export(
    checkpoint: ShardedCheckpoint, kind: str, out: Path, on_written: Callable[[int], None] = lambda size: None
) -> None:
    """Writes the full tensors of one kind to one file, for other programs and `run.start=init:`; see write_tensors."""
    write_tensors(out, checkpoint.shapes, partial(checkpoint.full_tensor, kind), {}, on_written)

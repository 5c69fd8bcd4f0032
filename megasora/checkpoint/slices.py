"""Weights, averages and Adam's means in a checkpoint: a file a rank, saved by one layout and read by any other.

    fragments of a rank --write_slices--> slices/rank-00000.safetensors: `kind/name`, fp32 [n], and where each lies
    a checkpoint --Slices--> part(kind, fragment): what lies where a fragment of this rank does; whole(kind, name)

A rank writes what it owns, each number of the model is in one file, and nothing is gathered. Who reads looks at the
headers of all files first. A fragment of another layout lies across the slices of several ranks; where the parameter is
cut over the tensor axis as it was, only its own bytes are read, else the whole tensor, one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megasora.checkpoint.tensors import TensorFile, write_tensors
from megasora.errors import MegaSoraError
from megasora.placement import Fragment, Placement

FOLDER, METADATA = "slices", "slices"


def write_slices(checkpoint: Path, rank: int, fragments: Iterable[Fragment]) -> None:
    """This rank's file below `checkpoint`, which is there. `fragments`: those that count here, all of their kinds."""
    folder = checkpoint / FOLDER
    folder.mkdir(exist_ok=True)
    places, tensors = {}, {}
    for f in fragments:
        places[f.name] = {
            "shape": list(f.shape), "cut": f.placement.cut, "runs": f.placement.runs,
            "tensor": [f.tensor_rank, f.tensor_size], "start": f.start,
        }  # fmt: skip
        tensors |= {f"{kind}/{f.name}": values for kind, values in f.values.items()}
    shapes = {name: values.shape for name, values in tensors.items()}
    write_tensors(folder / f"rank-{rank:05d}.safetensors", shapes, tensors.__getitem__, {METADATA: json.dumps(places)})


@dataclass(frozen=True)
class Piece:
    """One rank's slice of a tensor rank's flattened part."""

    start: int
    count: int
    file: TensorFile


@dataclass
class SavedParameter:
    shape: torch.Size  # full
    placement: Placement
    tensor_size: int  # parts: 1 where it is whole on all tensor ranks
    pieces: dict[int, list[Piece]] = field(default_factory=dict)  # tensor rank: its slices

    @property
    def how(self) -> tuple:
        return self.shape, self.placement, self.tensor_size


class Slices:
    """What `write_slices` wrote on all ranks. The files are to be held against the manifest before.

    Raises MegaSoraError that names the file and the parameter where a number is missing, or there twice.
    """

    def __init__(self, checkpoint: Path):
        self.folder = checkpoint / FOLDER
        self.saved: dict[str, SavedParameter] = {}
        files = sorted(self.folder.glob("rank-*.safetensors"))
        if not files:
            raise MegaSoraError(f"{self.folder} holds no rank-*.safetensors; use an earlier checkpoint")
        self.kinds: set[str] = set()
        for path in files:
            self.add(TensorFile.open(path))
        for name, saved in self.saved.items():
            self.check_whole(name, saved)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the full parameters."""
        return {name: self.saved[name].shape for name in sorted(self.saved)}

    def add(self, file: TensorFile) -> None:
        try:
            places = json.loads(file.metadata[METADATA])
            found: dict[str, set[str]] = {name: set() for name in places}
            for key in file.places:
                kind, _, name = key.partition("/")
                found[name].add(kind)
            for name, place in places.items():
                cut, (rank, size) = place["cut"], place["tensor"]
                placement = Placement(cut, place["runs"] if cut is not None else 1)
                rank, size = (rank, size) if cut is not None else (0, 1)
                saved = SavedParameter(torch.Size(place["shape"]), placement, size)
                first = self.saved.setdefault(name, saved)
                if first.how != saved.how:
                    raise ValueError(f"{name} is {saved.how}, {first.how} in another file")
                self.kinds = self.kinds or found[name]
                counts = {file.places[f"{kind}/{name}"][1] for kind in found[name]}
                if found[name] != self.kinds or len(counts) != 1:
                    raise ValueError(f"{name} has {sorted(found[name])} of {counts} numbers, not {sorted(self.kinds)}")
                first.pieces.setdefault(rank, []).append(Piece(place["start"], counts.pop(), file))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MegaSoraError(f"{file.path} is not of this checkpoint: {error}; use an earlier one") from None

    def check_whole(self, name: str, saved: SavedParameter) -> None:
        """Every tensor rank's part is covered by its slices, each number once."""
        count = saved.placement.local_shape(saved.shape, saved.tensor_size).numel()
        for rank in sorted({*range(saved.tensor_size), *saved.pieces}):
            here, last = 0, self.folder
            for piece in sorted(saved.pieces.get(rank, []), key=lambda piece: piece.start):
                if piece.start != here:
                    break
                here, last = here + piece.count, piece.file.path
            else:
                if here == count and rank < saved.tensor_size:
                    continue
            raise MegaSoraError(
                f"{last}: the slices of {name} (part {rank} of {saved.tensor_size}) do not make its {count} numbers, "
                f"each once: wrong from number {here} on; use an earlier checkpoint"
            )

    def whole(self, kind: str, name: str) -> Tensor:
        """A full parameter, or what of `kind` belongs to it; fp32, on the CPU."""
        saved = self.saved[name]
        shape = saved.placement.local_shape(saved.shape, saved.tensor_size)
        parts = [self.run(kind, name, rank, 0, shape.numel()).view(shape) for rank in range(saved.tensor_size)]
        return saved.placement.full(parts)

    def part(self, kind: str, f: Fragment) -> Tensor:
        """What of `kind` lies where a fragment does; fp32 [n], on the CPU.

        Raises MegaSoraError where the parameter is not there, or has another shape.
        """
        saved = self.saved.get(f.name)
        if saved is None or saved.shape != f.shape or kind not in self.kinds:
            has = f"has it {list(saved.shape)} with {', '.join(sorted(self.kinds))}" if saved else "has none"
            raise MegaSoraError(f"{self.folder}: {kind} of {f.name} {list(f.shape)} is wanted, the checkpoint {has}")
        how, size = saved.placement, f.tensor_size if f.placement.cut is not None else 1
        if size == saved.tensor_size and (size == 1 or (f.placement.cut, f.placement.runs) == (how.cut, how.runs)):
            return self.run(kind, f.name, f.tensor_rank if size > 1 else 0, f.start, f.count)
        full = self.whole(kind, f.name)
        return f.placement.local(full, f.tensor_rank, f.tensor_size).reshape(-1)[f.start : f.start + f.count]

    @torch.no_grad()
    def fill(self, f: Fragment) -> None:
        """Writes into a fragment, in place, what was saved of each of its kinds."""
        for kind, values in f.values.items():
            values.copy_(self.part(kind, f))

    def run(self, kind: str, name: str, rank: int, start: int, count: int) -> Tensor:
        """Numbers `start` to `start + count` of tensor rank `rank`'s flattened part."""
        found = torch.empty(count)
        for piece in self.saved[name].pieces[rank]:
            first, last = max(start, piece.start), min(start + count, piece.start + piece.count)
            if first < last:
                values = piece.file.read(f"{kind}/{name}", first - piece.start, last - first)
                found[first - start : last - start] = values
        return found


def export(slices: Slices, kind: str, out: Path, wrote: Callable[[int], None] = lambda size: None) -> None:
    """Whole tensors of one kind into one file, for other programs and for `model.weights`; see write_tensors."""
    write_tensors(out, slices.shapes, partial(slices.whole, kind), {}, wrote)

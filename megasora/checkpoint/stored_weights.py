"""Weights to start from or to sample with: of a safetensors file, a folder of them, or a checkpoint of a run.

A rank reads the elements of its local tensors and no others, converts them to fp32 and checks that they are finite.
Both classes are a `megasora.placement.WeightSource`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from megasora.checkpoint.foreign_file import DTYPES, ForeignTensor, open_foreign, weights_of_folder
from megasora.checkpoint.manifest import MANIFEST
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.errors import MegaSoraError, printable
from megasora.placement import WHOLE, Placement

READ_ELEMENTS = 1 << 22  # at once, of a checkpoint


class StoredWeights(ABC):
    """`shapes`: of the full weights, by name. `origin`: the setting or the place, for messages."""

    def __init__(self, shapes: Mapping[str, torch.Size], origin: str):
        self.shapes, self.origin = shapes, origin

    @torch.no_grad()
    def fill(self, out: Tensor, name: str, placement: Placement = WHOLE, rank: int = 0, size: int = 1) -> None:
        """Raises MegaSoraError if the weight is missing, of another shape, not of floating-point numbers, not finite or
        cannot be read."""
        shape, saved = placement.full_shape(out.shape, size), self.shapes.get(name)
        if saved != shape:
            has = f"has {list(saved)}" if saved is not None else "has none"
            raise MegaSoraError(
                f"{self.origin}: this model's {name} is {list(shape)}, the file {has}; give the "
                "model.*, text.* and codec.* settings that the weights were made with"
            )
        for part, values in self.read(out, name, placement, rank, size):
            if not values.isfinite().all():
                raise self.no_numbers(name, "float32")
            part.copy_(values)

    @abstractmethod
    def read(
        self, out: Tensor, name: str, placement: Placement, rank: int, size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of a part of `out` and the fp32 values that belong there."""

    def no_numbers(self, name: str, dtype: str) -> MegaSoraError:
        return MegaSoraError(
            f"{self.origin}: {name} is {dtype}, or some of its weights are NaN or infinite; give "
            "finite float32, float64, bfloat16 or float16 weights"
        )


class FileWeights(StoredWeights):
    """Those of a safetensors file, or of a folder of them."""

    def __init__(self, tensors: Mapping[str, ForeignTensor], origin: str):
        super().__init__({name: tensor.shape for name, tensor in tensors.items()}, origin)
        self.tensors = tensors

    def read(
        self, out: Tensor, name: str, placement: Placement, rank: int, size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise self.no_numbers(name, tensor.dtype)
        runs = placement.runs(tensor.shape, rank, size)
        out_RN = out.view(runs.count, runs.length)
        try:
            for rows, columns, values in tensor.read(runs):
                yield out_RN[rows, columns], values
        except OSError as error:
            raise MegaSoraError(f"{self.origin} cannot be read: {error}") from None


class CheckpointWeights(StoredWeights):
    """Those of one kind of a checkpoint, verified: "weights" or of an EMA."""

    def __init__(self, checkpoint: ShardedCheckpoint, kind: str, origin: str):
        super().__init__(checkpoint.shapes, origin)
        self.checkpoint, self.kind = checkpoint, kind

    def read(
        self, out: Tensor, name: str, placement: Placement, rank: int, size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        flat = out.view(-1)
        for start in range(0, len(flat), READ_ELEMENTS):
            part = flat[start : start + READ_ELEMENTS]
            yield part, self.checkpoint.read_local(self.kind, name, placement, rank, size, start, len(part))


def has_weights(path: Path) -> bool:
    """Whether `open_weights` finds something to read."""
    if path.is_file() or os.path.lexists(path / MANIFEST):
        return True
    with suppress(ValueError):
        return path.is_dir() and bool(weights_of_folder(path))
    return False


def open_weights(path: Path, origin: str) -> StoredWeights:
    """The weights of a safetensors file or a folder of them, or the raw ones of a checkpoint. `origin`: for messages.

    Raises MegaSoraError if it is none of these, or its header or manifest is damaged.
    """
    if os.path.lexists(path / MANIFEST):
        return CheckpointWeights(ShardedCheckpoint(path), "weights", origin)
    try:
        return FileWeights(open_foreign(path), origin)
    except Exception as error:  # safetensors raises its own kinds, and a hostile header others
        raise MegaSoraError(f"{origin} cannot be read: {printable(str(error), 200)}") from None

"""A checkpoint written by one process from full tensors: of weights from elsewhere, or of another checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.checkpoint.fragment_file import (
    file_bytes,
    file_header,
    unsharded_metadata,
    write_fragment_file,
)
from megasora.checkpoint.sharded import FOLDER, rank_file_name
from megasora.checkpoint.store import CheckpointStore


def save_full_tensors(
    store: CheckpointStore,
    step: int,
    shapes: Mapping[str, torch.Size],
    kinds: Sequence[str],
    value_of: Callable[[str, str], Tensor],
    state: dict[str, Any],
    on_written: Callable[[int], None] = lambda size: None,
    files: int = 1,
) -> Path:
    """Writes checkpoint `step` of `store` atomically, one tensor at a time, and returns its folder.

    shapes      of all parameters, full
    kinds       what is saved of each: "weights", and of a training "exp_avg", "exp_avg_sq", "ema"
    value_of    (kind, name) -> the full tensor
    state       of state.json: JSON values
    on_written  called with the bytes of each write
    files       over which the parameters are divided, each whole in one, about equally much in each

    Raises OSError if the disk has no room. Nothing is left after an error.
    """
    groups = divide(shapes, files)
    headers = [header_of(group, kinds) for group in groups]
    staging, written = store.begin(step, sum(size for _, size in headers)), {}
    try:
        (staging / FOLDER).mkdir()
        for rank, (group, (header, _)) in enumerate(zip(groups, headers, strict=True)):
            name = rank_file_name(rank)
            written[name] = write_fragment_file(staging / name, header, values(group, kinds, value_of), on_written)
        return store.commit(step, state, written)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # after a commit it has another name


def divide(shapes: Mapping[str, torch.Size], files: int) -> list[dict[str, torch.Size]]:
    """The parameters of each file: the largest first, each to the file that has least."""
    groups: list[dict[str, torch.Size]] = [{} for _ in range(files)]
    sizes = [0] * files
    for name in sorted(shapes, key=lambda name: -shapes[name].numel()):
        least = sizes.index(min(sizes))
        groups[least][name] = shapes[name]
        sizes[least] += shapes[name].numel()
    return groups


def header_of(shapes: Mapping[str, torch.Size], kinds: Sequence[str]) -> tuple[bytes, int]:
    """(header, bytes of the file)."""
    counts = {f"{kind}/{name}": shape.numel() for kind in kinds for name, shape in shapes.items()}
    header = file_header(counts, {name: unsharded_metadata(shape) for name, shape in shapes.items()})
    return header, file_bytes(header, counts)


def values(
    shapes: Mapping[str, torch.Size], kinds: Sequence[str], value_of: Callable[[str, str], Tensor]
) -> Iterator[Tensor]:
    for kind in kinds:
        for name, shape in shapes.items():
            value = value_of(kind, name)
            assert value.shape == shape, f"{name} is {list(value.shape)}, not {list(shape)}"
            yield value.detach().float().reshape(-1)

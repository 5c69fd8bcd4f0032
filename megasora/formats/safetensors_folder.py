"""A folder of safetensors files, as diffusers and transformers read it: weights in parts of bounded size, and an index.

    FOLDER/STEM.safetensors                    all tensors, if they are not larger than a part
    FOLDER/STEM-00001-of-00003.safetensors     else, in the order of their names
    FOLDER/STEM.safetensors.index.json         the file of each tensor

Memory holds one tensor. `new_folder` makes a folder appear whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megasora.checkpoint.safetensors_file import DTYPE_NAMES, write_tensors
from megasora.checkpoint.store import check_room
from megasora.errors import MegaSoraError
from megasora.files import check_folder, sync, write_text_atomic

SHARD_BYTES = 5_000_000_000  # of a part, by default
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --dtype


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` to write into; it becomes `out` on exit, and is removed after an exception.

    Raises MegaSoraError unless `out` is new, or an empty folder, in a folder that exists and can be written.
    """
    out = Path(os.path.abspath(out))
    check_new_folder(out)
    staging = out.with_name(f".{out.name}.part")
    try:
        with errors_below(staging, out):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            yield staging
            sync(staging)
            os.replace(staging, out)
            sync(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_new_folder(out: Path) -> None:
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise MegaSoraError(f"{out} exists; remove it or choose another name")
    if not out.parent.is_dir():
        raise MegaSoraError(f"there is no folder {out.parent}; make it first")
    check_folder(out, str(out))


@contextmanager
def errors_below(staging: Path, out: Path) -> Iterator[None]:
    """An OSError raised within that names a file of `staging` names the one of `out`."""
    try:
        yield
    except OSError as error:
        name = str(error.filename or staging)
        if Path(name).is_relative_to(staging):
            error.filename = str(out / Path(name).relative_to(staging))
        raise


def write_parts(
    folder: Path,
    stem: str,
    shapes: Mapping[str, torch.Size],
    value_of: Callable[[str], Tensor],
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    on_written: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes the tensors `shapes` into files of at most `shard_bytes`, or of one tensor, in the existing `folder`.

    Calls `value_of(name)` once per tensor, in the order of `shapes`, and `on_written(bytes)` after each is written.
    Values are rounded to `dtype`, one of DTYPES. Raises MegaSoraError with the name of a tensor that is not finite, and
    OSError, before anything is written, if the disk has no room.
    """
    total = dtype.itemsize * sum(shape.numel() for shape in shapes.values())
    check_room(folder, total, f"a folder of {len(shapes)} tensors")
    parts = split_parts(shapes, dtype.itemsize, shard_bytes)
    files = [part_name(stem, number, len(parts)) for number in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        write_tensors(
            folder / file, part, lambda name: rounded(name, value_of(name), dtype), metadata or {}, on_written, dtype
        )
    if len(parts) > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text_atomic(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def part_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"


def split_parts(shapes: Mapping[str, torch.Size], itemsize: int, shard_bytes: int) -> list[dict[str, torch.Size]]:
    """Consecutive tensors of at most `shard_bytes` together; a larger one is a part of its own."""
    parts: list[dict[str, torch.Size]] = [{}]
    free = shard_bytes
    for name, shape in shapes.items():
        size = itemsize * shape.numel()
        if parts[-1] and size > free:
            parts.append({})
            free = shard_bytes
        parts[-1][name] = shape
        free -= size
    return parts


def rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`. Raises MegaSoraError if an element is not finite, or too large for it."""
    result = value.detach().to(dtype)
    if not result.isfinite().all():
        if not value.isfinite().all():
            raise MegaSoraError(f"{name} has weights that are NaN or infinite; export an earlier checkpoint")
        raise MegaSoraError(
            f"{name} has weights up to {float(value.abs().max()):.3g}, too large for {DTYPE_NAMES[dtype]}, which ends "
            f"at {torch.finfo(dtype).max:.5g}; use --dtype bf16 or fp32"
        )
    return result

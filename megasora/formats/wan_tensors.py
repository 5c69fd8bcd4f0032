"""The tensors of Wan's weight files, by their names in diffusers; each is read only when it is needed.

Files are safetensors, or archives of torch.save (.pth, .pt, .bin) that hold the tensors of a model by name. Nothing
that is in an archive is run: it may hold tensors only, see allowed_pickle.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megasora.checkpoint.safetensors_file import DTYPE_NAMES
from megasora.errors import MegaSoraError, first_of, printable
from megasora.files import open_regular
from megasora.formats.allowed_pickle import StoredTensor, load_torch
from megasora.formats.wan_names import diffusers_names

DTYPES = tuple(DTYPE_NAMES.values())
ARCHIVES = (".pth", ".pt", ".bin")  # suffixes of what torch.save writes
MAX_LISTED_NAMES = 6


@dataclass(frozen=True)
class WanTensor:
    path: Path
    name: str  # in the file
    dtype: str  # as in safetensors
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    def read(self) -> Tensor:
        """fp32. Raises MegaSoraError if a weight is NaN or infinite."""
        value = self.load().float()
        if not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise MegaSoraError(
                f"{self.path}: {count} of {value.numel()} weights of {self.name} are NaN or infinite; download it again"
            )
        return value


def open_files(files: tuple[Path, ...]) -> dict[str, WanTensor]:
    """The tensors of all files, by their names in diffusers."""
    tensors: dict[str, WanTensor] = {}
    for path in files:
        if not path.is_file():
            raise MegaSoraError(f"{path} is no regular file; download it again")
        found = open_archive(path) if path.suffix in ARCHIVES else open_safetensors(path)
        if duplicates := sorted(tensors.keys() & found.keys()):
            raise MegaSoraError(
                f"{path} repeats {list_names(duplicates)} of another file; download the whole folder again"
            )
        tensors |= found
    return {name: tensors[stored] for name, stored in diffusers_names(tensors).items()}


def open_safetensors(path: Path) -> dict[str, WanTensor]:
    tensors = {}
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            load = partial(read_tensor, path, name)
            tensors[name] = WanTensor(path, name, part.get_dtype(), tuple(part.get_shape()), load)
    return tensors


def read_tensor(path: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, opened for it alone: as long as it is open, all that was read stays mapped."""
    with opened(path) as file:
        return file.get_tensor(name)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise MegaSoraError(f"{path} cannot be read: {error}; download it again") from None


def open_archive(path: Path) -> dict[str, WanTensor]:
    with open_regular(path) as file:
        weights = load_torch(file, path)
    if not isinstance(weights, dict) or not weights:
        raise MegaSoraError(f"{path} holds a {type(weights).__name__}, no weights by name; save the model's state_dict")
    others = [
        name for name, value in weights.items() if not isinstance(name, str) or not isinstance(value, StoredTensor)
    ]
    if others:
        names = printable(first_of([str(name) for name in others], MAX_LISTED_NAMES), 200)
        raise MegaSoraError(f"{path} holds {names}, no tensors; save the model's state_dict alone")
    return {
        name: WanTensor(path, name, DTYPE_NAMES.get(value.dtype, str(value.dtype)), tuple(value.shape), value.read)
        for name, value in weights.items()
    }


def list_names(names: list[str]) -> str:
    return first_of(names, MAX_LISTED_NAMES)

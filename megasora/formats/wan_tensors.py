"""The tensors of Wan's weight files, by their names in diffusers; each is read only when it is needed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megasora.formats.wan_names import diffusers_names
from megasora.errors import MegaSoraError, first_of

DTYPES = ("F32", "BF16", "F16")
MAX_LISTED_NAMES = 6


@dataclass(frozen=True)
class WanTensor:
    path: Path
    name: str  # in the file
    file: Any  # opened by safetensors

    @property
    def dtype(self) -> str:
        return self.file.get_slice(self.name).get_dtype()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def read(self) -> Tensor:
        """fp32. Raises MegaSoraError if a weight is NaN or infinite."""
        value = self.file.get_tensor(self.name).float()
        if not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise MegaSoraError(
                f"{self.path}: {count} of {value.numel()} weights of {self.name} are NaN or infinite; download it again"
            )
        return value


def open_files(files: tuple[Path, ...], stack: ExitStack) -> dict[str, WanTensor]:
    """The tensors of all files, by their names in diffusers; the files are closed with `stack`."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, WanTensor] = {}
    for path in files:
        if not path.is_file():
            raise MegaSoraError(f"{path} is no regular file; download it again")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise MegaSoraError(f"{path} cannot be read: {error}; download it again") from None
        names = list(file.keys())
        if duplicates := sorted(tensors.keys() & set(names)):
            raise MegaSoraError(
                f"{path} repeats {list_names(duplicates)} of another file; download the whole folder again"
            )
        tensors |= {name: WanTensor(path, name, file) for name in names}
    return {name: tensors[stored] for name, stored in diffusers_names(tensors).items()}


def list_names(names: list[str]) -> str:
    return first_of(names, MAX_LISTED_NAMES)

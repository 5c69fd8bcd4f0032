"""The folder of a ZeRO checkpoint of DeepSpeed: which tag is read, and whether all files of it are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megasora.errors import MegaSoraError, first_of, printable
from megasora.files import read_regular_file
from megasora.formats.deepspeed_files import LATEST, model_file, read_torch_file

MAX_LATEST_BYTES = 4096
SHOWN = 3  # names in a message
OTHER_FILES = {  # what files say of checkpoints that are not read
    re.compile(r".*mp_rank_(?!00_)\d+_.*"): "several tensor parallel ranks (mp_rank_01)",
    re.compile(r".*expp?_rank_.*|.*expert_.*"): "experts",
    re.compile(r"layer_\d+-model.*"): "pipeline stages of DeepSpeed (layer_XX-model)",
    re.compile(r"zero"): "a universal checkpoint",
    re.compile(r"offloaded_tensors"): "states that were offloaded to NVMe",
}


def tag_folder(place: Path, tag: str | None) -> Path:
    latest, is_latest = place / LATEST, tag is None
    if tag is None:
        try:
            tag = read_regular_file(latest, MAX_LATEST_BYTES).decode("utf-8", errors="replace").strip()
        except FileNotFoundError:
            folders = sorted(path.name for path in place.iterdir() if path.is_dir())
            found = f"; it has {printable(first_of(folders, SHOWN))}" if folders else ""
            raise MegaSoraError(
                f"{place} has no file {LATEST}; give the folder that load_checkpoint of DeepSpeed takes, and --tag "
                f"NAME{found}"
            ) from None
        except OSError as error:
            raise MegaSoraError(f"{latest} cannot be read: {error.strerror}; give --tag NAME") from None
    if tag in ("", ".", "..") or "/" in tag or "\0" in tag:
        source = latest if is_latest else "--tag"
        raise MegaSoraError(f"{source}: {printable(tag, 60)!r} is no name of a folder; give --tag NAME")
    folder = place / tag
    if folder.is_symlink() or not folder.is_dir():
        problem = (
            "is a link; give the folder itself" if folder.is_symlink() else "is not there; give another --tag NAME"
        )
        raise MegaSoraError(f"{folder} {problem}")
    return folder


def check_names(folder: Path) -> set[str]:
    """The names in the folder of a tag. Raises MegaSoraError for a checkpoint of another kind."""
    names = {path.name for path in folder.iterdir()}
    for pattern, what in OTHER_FILES.items():
        if any(pattern.fullmatch(name) for name in names):
            raise MegaSoraError(
                f"{folder} has {what}, which is not read; give a ZeRO checkpoint of stage 1, 2 or 3 of data parallel "
                "ranks, as save_checkpoint of DeepSpeed writes it"
            )
    if not names & {model_file(1, 0), model_file(3, 0)}:
        raise MegaSoraError(
            f"{folder} has no {model_file(1, 0)} and no {model_file(3, 0)}: it is no whole checkpoint of DeepSpeed; "
            "copy it again, or give another --tag NAME"
        )
    return names


def file_of(folder: Path, name: str) -> Path:
    """Raises MegaSoraError if it is a link."""
    path = folder / name
    if path.is_symlink():
        raise MegaSoraError(f"{path} is a link; the files of a checkpoint are in its folder")
    return path


def read_ranks(folder: Path, wanted: list[str], names: set[str]) -> Iterator[dict[str, Any]]:
    """The objects of the files of all ranks, one at a time. Raises MegaSoraError if there are fewer or more."""
    missing = [name for name in wanted if name not in names]
    kind = re.compile(r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_" + re.escape(wanted[0].split("_mp_rank_00_")[-1]))
    others = sorted(name for name in names.difference(wanted) if kind.fullmatch(name))
    if missing or others:
        problem = f"lacks {first_of(missing, SHOWN)}" if missing else f"has {first_of(others, SHOWN)} too"
        raise MegaSoraError(
            f"{folder} was saved by {len(wanted)} processes and {problem}: files are missing, or of two saves; copy "
            "it again"
        )
    for name in wanted:
        values = read_torch_file(file_of(folder, name))
        if not isinstance(values, dict):
            raise MegaSoraError(f"{folder / name} holds no states of DeepSpeed; copy it again")
        yield values

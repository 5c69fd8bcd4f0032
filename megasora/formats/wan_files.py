"""Finds the weight files of a Wan model in a folder, and reads its JSON files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megasora.errors import MegaSoraError, printable
from megasora.files import read_regular_file
from megasora.formats.wan_tensors import ARCHIVES, list_names
from megasora.jsonl import parse_json

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SAFETENSORS = ".safetensors"
SUFFIX = r"(\.safetensors|\.pth|\.pt|\.bin)"
INDEX = re.compile(rf".+{SUFFIX}(\.index(\.\w+)?|\.\w+\.index)\.json|.+\.\w+{SUFFIX}\.index\.json")
PART = re.compile(rf"(?P<stem>.+)-(?P<number>\d{{5}})-of-(?P<count>\d{{5}})(?P<end>(\.\w+)?{SUFFIX})", re.ASCII)
MAX_JSON_BYTES = 64 << 20


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """The files of the index, the parts or the single file; .safetensors first, and those without a variant first.
    Raises MegaSoraError if there is not one choice, or a file is missing."""
    by_suffix: dict[str, list[str]] = {}
    for name in sorted(path.name for path in folder.iterdir()):
        by_suffix.setdefault(weights_suffix(name), []).append(name)
    names = by_suffix.get(SAFETENSORS) or [name for suffix in ARCHIVES for name in by_suffix.get(suffix, [])]
    indices = [name for name in names if INDEX.fullmatch(name)]
    single = [name for name in names if name not in indices and not PART.fullmatch(name)]
    for name in (f"{WEIGHTS_FILE}.index.json", WEIGHTS_FILE):
        if name in (*indices, *single):
            return weight_files(folder / name)
    parts = [] if indices + single else complete_parts(names)
    if len(indices + single) > 1 or len(parts) > 1:
        choices = indices + single or [part[0] for part in parts]
        raise MegaSoraError(
            f"{folder} holds several weights, {list_names(choices)}; give one of them, e.g. {folder / choices[0]}"
        )
    if parts:
        return tuple(folder / name for name in parts[0])
    if not indices + single:
        raise MegaSoraError(f"{folder} lacks {WEIGHTS_FILE} or its index; download the whole folder")
    return weight_files(folder / (indices + single)[0])


def weights_suffix(name: str) -> str:
    """The suffix of a file of weights, or of those that an index names."""
    match = INDEX.fullmatch(name)
    return (match[1] or match[4]) if match else Path(name).suffix


def complete_parts(names: list[str]) -> list[list[str]]:
    """The names of each set of files NAME-00001-of-00002.safetensors of which none is missing."""
    sets: dict[tuple[str, ...], dict[int, str]] = {}
    for name in names:
        if match := PART.fullmatch(name):
            sets.setdefault(match.group("stem", "count", "end"), {})[int(match["number"])] = name
    return [
        list(parts.values()) for (_, count, _), parts in sets.items() if sorted(parts) == list(range(1, int(count) + 1))
    ]


def weight_files(path: Path) -> tuple[Path, ...]:
    """The file itself, or those that it names if it is an index."""
    if not INDEX.fullmatch(path.name):
        return (path,)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MegaSoraError(f"{path} has no weight_map; download it again")
    for name in weight_map.values():
        known = isinstance(name, str) and Path(name).suffix in (SAFETENSORS, *ARCHIVES)
        if not known or Path(name).name != name:
            raise MegaSoraError(f"{path} names {printable(str(name), 80)}, no weight file of its own folder")
    files = tuple(path.parent / name for name in sorted(set(weight_map.values())))
    if missing := [file.name for file in files if not file.is_file()]:
        raise MegaSoraError(f"{path.parent} lacks {list_names(missing)}; download the whole folder")
    return files


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = parse_json(read_regular_file(file, MAX_JSON_BYTES))
    except (OSError, ValueError) as error:
        raise MegaSoraError(
            f"{file} cannot be read ({error}); use a folder that diffusers saved, or one of the release of Wan"
        ) from None
    if not isinstance(values, dict):
        raise MegaSoraError(f"{file} holds a {type(values).__name__}, not an object; download it again")
    return values

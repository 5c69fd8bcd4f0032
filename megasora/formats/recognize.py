"""What a file or folder of weights is, by its names and small JSON files, and which command reads it.

Nothing of size is read, and nothing is unpickled: a name of a folder, the first bytes of a file, and JSON up to 1 MiB.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megasora.checkpoint.manifest import FOLDER_NAME, MANIFEST
from megasora.errors import MegaSoraError, first_of, printable
from megasora.files import open_regular, read_regular_file
from megasora.jsonl import parse_json

MAX_NAMES = 20_000  # of a folder that are looked at
MAX_JSON_BYTES = 1 << 20
ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of files of torch.save, new and old
STAGING = re.compile(r"\..*\.part")
DEEPSPEED_FILE = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt|.*_optim_states\.pt")


@dataclass(frozen=True)
class Place:
    """`format`: run, checkpoint, megasora, safetensors, deepspeed, dcp, diffusers, transformers, pickle, or other.
    `description`: "a DeepSpeed checkpoint". `remedy`: how it is read, or empty."""

    format: str
    description: str
    remedy: str = ""


def check_format(place: Path, *formats: str) -> Place:
    """What `place` is. Raises MegaSoraError, with the command that reads it, if it is none of `formats`."""
    found = what_is(place)
    if found.format in formats:
        return found
    expected = " or ".join(EXPECTED[f] for f in formats)
    remedy = f"; {found.remedy}" if found.remedy else ""
    raise MegaSoraError(f"{place} is {found.description}, and no {expected}{remedy}")


EXPECTED = {
    "run": "run folder of megasora train",
    "checkpoint": "checkpoint of one (a folder step-XXXXXXXX)",
    "safetensors": ".safetensors file",
    "deepspeed": "DeepSpeed checkpoint",
    "dcp": "checkpoint of torch.distributed.checkpoint",
    "diffusers": "folder of diffusers",
    "transformers": "folder of transformers",
    "pickle": "file of torch.save",
}


def what_is(place: Path) -> Place:
    """Never raises for what `place` holds; a place that cannot be read is of format "other"."""
    try:
        if not os.path.lexists(place):
            return Place("other", "not there")
        if place.is_dir():
            return of_folder(place)
        return of_file(place)
    except OSError as error:
        return Place("other", f"not readable ({error.strerror or error})")


def of_file(file: Path) -> Place:
    with open_regular(file) as stream:
        head = stream.read(16)
    if file.suffix == ".safetensors" and head[8:9] == b"{":
        return Place("safetensors", "a .safetensors file", import_wan(file))
    if head.startswith(ZIP) or head.startswith(PICKLE):
        return Place("pickle", "a file of torch.save", import_wan(file))
    return Place("other", f"a file of {file.stat().st_size:,} bytes that is no safetensors")


def of_folder(folder: Path) -> Place:
    with os.scandir(folder) as entries:
        names = {entry.name for entry in islice(entries, MAX_NAMES)}
    for recognize in (native, deepspeed, dcp, hugging_face, single_weights):
        found = recognize(folder, names)
        if found is not None:
            return found
    if not names:
        return Place("other", "an empty folder")
    return Place("other", f"a folder of something else ({printable(first_of(sorted(names), 3), 200)})")


def native(folder: Path, names: set[str]) -> Place | None:
    if STAGING.fullmatch(folder.name):
        return Place("other", "what an interrupted save or export has left", "remove it")
    if MANIFEST in names:
        return Place("checkpoint", "a checkpoint of MegaSora", inspect(folder))
    if "checkpoints" in names and (folder / "checkpoints").is_dir():
        return Place("run", "a run folder of MegaSora", inspect(folder))
    if "config.yaml" in names:
        return Place("other", "a run folder without a checkpoint", "train it until its first checkpoint")
    if "fragments" in names and FOLDER_NAME.fullmatch(folder.name):
        return Place("other", f"half a checkpoint: it has no {MANIFEST}", "use an earlier checkpoint")
    if any(FOLDER_NAME.fullmatch(name) for name in names):
        return Place("other", "the folder of a run's checkpoints", f"give the run, {folder.parent}, or one of them")
    return None


def deepspeed(folder: Path, names: set[str]) -> Place | None:
    remedy = f"read it with: megasora checkpoint import-deepspeed {folder} --run RUN"
    if {"zero", "mp_rank_00_model_states.pt"} <= names:
        return Place("deepspeed", "a universal checkpoint of DeepSpeed", remedy)
    if any(DEEPSPEED_FILE.fullmatch(name) for name in names):
        return Place("deepspeed", "a DeepSpeed checkpoint", remedy)
    steps = sorted(name for name in names if name.startswith("global_step"))
    if steps:
        return Place("deepspeed", f"a folder of DeepSpeed checkpoints ({printable(first_of(steps, 2), 100)})", remedy)
    if "latest_universal" in names:
        return Place("deepspeed", "a universal checkpoint of DeepSpeed", remedy)
    tag = small_text(folder / "latest") if "latest" in names else ""
    if tag and tag in names and (folder / tag).is_dir():
        return Place("deepspeed", f"a folder of DeepSpeed checkpoints ({printable(tag, 60)})", remedy)
    return None


def dcp(folder: Path, names: set[str]) -> Place | None:
    if ".metadata" in names:
        remedy = f"read it with: megasora checkpoint import-dcp {folder} --run RUN"
        return Place("dcp", "a checkpoint of torch.distributed.checkpoint", remedy)
    if any(name.endswith(".distcp") for name in names):
        return Place("other", "half a checkpoint of torch.distributed.checkpoint: it has no .metadata", "copy it again")
    return None


def hugging_face(folder: Path, names: set[str]) -> Place | None:
    if "model_index.json" in names:
        name = class_name(small_json(folder / "model_index.json"))
        return Place("diffusers", f"a pipeline of diffusers{name}", import_wan(folder))
    if "config.json" not in names:
        return None
    config = small_json(folder / "config.json")
    if "_class_name" in config:
        return Place("diffusers", f"a model of diffusers{class_name(config)}", import_wan(folder))
    if config.get("model_type") == "megasora":
        return Place("megasora", "a model exported from MegaSora", f"train it further with: run.start=init:{folder}")
    if "architectures" in config or "model_type" in config:
        return Place("transformers", "a model of transformers", "it may be text.path or sample.expand of a run")
    return None


def single_weights(folder: Path, names: set[str]) -> Place | None:
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return Place("diffusers", "a folder of .safetensors files", import_wan(folder))
    if any(name.endswith((".pth", ".pt", ".bin", ".ckpt")) for name in names):
        return Place("pickle", "a folder of files of torch.save", import_wan(folder))
    return None


def import_wan(place: Path) -> str:
    return f"weights of MegaSora are read by run.start=init:{place}, of Wan by megasora checkpoint import-wan {place}"


def inspect(place: Path) -> str:
    return f"it is read with: megasora checkpoint inspect {place}"


def class_name(values: dict[str, Any]) -> str:
    name = values.get("_class_name")
    return f", {printable(name, 60)}" if isinstance(name, str) else ""


def small_json(file: Path) -> dict[str, Any]:
    """Empty if it is no JSON object of at most MAX_JSON_BYTES."""
    try:
        values = parse_json(read_regular_file(file, MAX_JSON_BYTES))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def small_text(file: Path) -> str:
    try:
        return read_regular_file(file, 4096).decode("utf-8", errors="replace").strip()
    except OSError:
        return ""

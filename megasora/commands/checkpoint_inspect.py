"""`megasora checkpoint inspect`: what is in a checkpoint, and the statistics of its weights."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megasora.checkpoint.manifest import read_manifest
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import read_state
from megasora.checkpoint.weight_kinds import kind_of
from megasora.commands.checkpoint_source import BYTES_PER_VALUE, num_bytes, with_newest
from megasora.commands.tables import print_table
from megasora.commands.tensor_statistics import Statistics, statistics_of
from megasora.errors import MegaSoraError, printable
from megasora.jsonl import finite_or_none
from megasora.observe.byte_progress import byte_progress

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
COLUMNS = ("norm", "mean", "std", "max")


def inspect_checkpoint(place: Path, weights: str, pattern: str | None, as_json: bool) -> None:
    """Prints a table per module, or of each tensor whose name fits `pattern`, e.g. blocks.0.*; or all of it as JSON."""
    facts, shapes, tensors = with_newest(place, lambda folder: read(folder, weights, pattern))
    if as_json:
        values = {"tensors": {name: as_dict(shapes[name], s) for name, s in tensors.items()}}
        print(json.dumps(finite_or_none(facts | values), indent=1))
        return
    print_facts(facts)
    if pattern is None:
        print_modules(tensors)
    else:
        print_rows(("tensor", "shape"), {name: (str(list(shapes[name])), s) for name, s in tensors.items()})


def read(
    folder: Path, weights: str, pattern: str | None
) -> tuple[dict[str, Any], dict[str, torch.Size], dict[str, Statistics]]:
    """(what is known of a checkpoint, shapes and statistics of the parameters whose names fit `pattern`)."""
    sharded = ShardedCheckpoint(folder)
    kind, shapes = kind_of(sharded, weights), dict(sharded.shapes)
    if pattern is not None:
        shapes = {name: shape for name, shape in shapes.items() if fnmatch.fnmatchcase(name, pattern)}
        if not shapes:
            raise MegaSoraError(f"--tensors {printable(pattern, 100)} fits none of {len(sharded.shapes):,} parameters")
    with byte_progress("inspect", num_bytes(shapes)) as advance:
        tensors = read_statistics(sharded, kind, list(shapes), advance)
    return describe(folder, sharded, kind), shapes, tensors


def read_statistics(
    sharded: ShardedCheckpoint, kind: str, names: list[str], advance: Callable[[int], None]
) -> dict[str, Statistics]:
    """Of each parameter, one tensor in memory at a time."""
    found = {}
    for name in names:
        found[name] = statistics_of(sharded.full_tensor(kind, name))
        advance(BYTES_PER_VALUE * found[name].count)
    return found


def describe(folder: Path, sharded: ShardedCheckpoint, kind: str) -> dict[str, Any]:
    """What is known of a checkpoint without its tensors; JSON values."""
    state, manifest = read_state(folder), read_manifest(folder)
    parameters = sum(shape.numel() for shape in sharded.shapes.values())
    task = state.get("task") if isinstance(state.get("task"), dict) else {}
    return {
        "checkpoint": str(folder),
        "step": manifest.step,
        "bytes": sum(size for size, _ in manifest.files.values()),
        "files": {name: size for name, (size, _) in manifest.files.items()},
        "parameters": parameters,
        "kinds": sorted(sharded.kinds),
        "statistics_of": kind,
        "layout": state.get("parallel"),
        "imported": state.get("imported"),
        "ema_updates": state.get("ema_updates"),
        "validation_loss": state.get("validation_loss"),
        "code": state.get("code"),
        "cursor": task.get("cursor"),
        "data": task.get("data"),
    }


def print_facts(facts: dict[str, Any]) -> None:
    lines = {
        "step": f"{facts['step']:,}",
        "size": f"{facts['bytes']:,} bytes in {len(facts['files']):,} files",
        "parameters": f"{facts['parameters']:,}, as {', '.join(facts['kinds'])}",
        "layout": layout_text(facts["layout"]),
        "imported": facts["imported"],
        "updates": facts["ema_updates"],
        "validation loss": facts["validation_loss"],
        "cursor": plain(facts["cursor"]),
        "data": data_text(facts["data"]),
        "code": facts["code"],
    }
    print(printable(facts["checkpoint"]))
    for name, text in lines.items():
        if text is not None:
            print(f"{name:<16}{printable(str(text), 400)}")


def layout_text(layout: Any) -> str | None:
    """The processes, and the axes that are divided."""
    if not isinstance(layout, dict):
        return None
    sizes = {key: value for key, value in layout.items() if key not in ("processes", "schedule") and value != 1}
    processes = layout.get("processes")
    text = "1 process" if processes == 1 else f"{processes} processes"
    return ", ".join([text, *(f"{key} {value}" for key, value in sizes.items())])


def data_text(data: Any) -> str | None:
    """Clips and tokens of the training data, and the first digits of the hash of their ids."""
    if not isinstance(data, dict):
        return None
    return ", ".join(
        f"{key} {value[:12] if isinstance(value, str) else value}"
        for key, value in data.items()
        if key in ("clips", "tokens", "sha256")
    )


def plain(values: Any) -> str | None:
    return ", ".join(f"{key} {value}" for key, value in values.items()) if isinstance(values, dict) else None


def print_modules(tensors: dict[str, Statistics]) -> None:
    """A row per module, those of all blocks together."""
    modules: dict[str, list[Statistics]] = {}
    for name, statistics in tensors.items():
        modules.setdefault(module_of(name), []).append(statistics)
    modules["all"] = list(tensors.values())
    print_rows(("module", "tensors"), {name: (f"{len(m):,}", sum(m, Statistics())) for name, m in modules.items()})


def module_of(name: str) -> str:
    """`blocks.3.mlp.up.weight` -> `blocks.*.mlp.up`."""
    return NUMBER.sub("*", name).rpartition(".")[0] or name


def print_rows(first: tuple[str, str], rows: dict[str, tuple[str, Statistics]]) -> None:
    """`first`: names of the first two columns; `rows`: by name, the second column and the statistics."""
    any_non_finite = any(s.non_finite for _, s in rows.values())
    columns = [*first, "parameters", *COLUMNS, *(["NaN or infinite"] if any_non_finite else [])]
    cells = []
    for name, (second, s) in rows.items():
        numbers = [f"{getattr(s, column):.4g}" for column in COLUMNS]
        cells.append([name, second, f"{s.count:,}", *numbers, *([f"{s.non_finite:,}"] if any_non_finite else [])])
    print_table(columns, cells, texts=2)


def as_dict(shape: torch.Size, s: Statistics) -> dict[str, Any]:
    numbers = {column: getattr(s, column) for column in COLUMNS}
    return {"shape": list(shape), **numbers, "non_finite": s.non_finite}

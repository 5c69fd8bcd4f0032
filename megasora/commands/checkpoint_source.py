"""The checkpoint that a command reads, and the settings of the run that saved it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import find_checkpoint, read_state
from megasora.checkpoint.weight_kinds import kind_of
from megasora.config import Config, load, load_run_config
from megasora.errors import MegaSoraError, first_of, printable
from megasora.formats.recognize import check_format
from megasora.formats.source import ExportSource

BYTES_PER_VALUE = 4  # fp32
SHOWN = 2  # names in a message


def find(place: Path) -> Path:
    """The checkpoint at `place`, or the newest whole one of the run folder; a line on standard error for each that is
    damaged. Raises MegaSoraError if `place` is something else, with the command that reads it."""
    check_format(place, "run", "checkpoint")
    return find_checkpoint(place, report=lambda text: print(printable(text), file=sys.stderr))


def open_source(place: Path, weights: str) -> ExportSource:
    """`weights`: of --weights."""
    folder = find(place)
    sharded, state = ShardedCheckpoint(folder), read_state(folder)
    return ExportSource(folder, config_of(folder, state), state, sharded, kind_of(sharded, weights))


def config_of(folder: Path, state: dict[str, Any]) -> Config:
    """The settings of the run that saved a checkpoint: from its state, or else from config.yaml of the run folder."""
    if isinstance(state.get("config"), dict):
        return load(None, [f"{key}={json.dumps(value)}" for key, value in leaves(state["config"])])
    run = folder.absolute().parent.parent
    if not (run / "config.yaml").is_file():
        raise MegaSoraError(f"{folder} has no settings of its run, and {run} no config.yaml; put it back into its run")
    return load_run_config(run)


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted keys and values of nested dicts; lists are values."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def num_bytes(shapes: dict[str, torch.Size], kinds: int = 1) -> int:
    return BYTES_PER_VALUE * kinds * sum(shape.numel() for shape in shapes.values())


def check_same_model(a: tuple[Path, dict[str, torch.Size]], b: tuple[Path, dict[str, torch.Size]]) -> None:
    """Raises MegaSoraError unless both (place, shapes of its parameters) are of one model."""
    (place_a, shapes_a), (place_b, shapes_b) = a, b
    only_a, only_b = sorted(shapes_a.keys() - shapes_b.keys()), sorted(shapes_b.keys() - shapes_a.keys())
    other = sorted(name for name in shapes_a.keys() & shapes_b.keys() if shapes_a[name] != shapes_b[name])
    problems = [
        f"{len(names):,} parameters are only in {place} ({first_of([printable(n, 100) for n in names], SHOWN)})"
        for names, place in ((only_a, place_a), (only_b, place_b))
        if names
    ]
    if other:
        name = other[0]
        problems.append(
            f"{len(other):,} have other shapes (e.g. {printable(name, 100)} {list(shapes_a[name])} and "
            f"{list(shapes_b[name])})"
        )
    if problems:
        raise MegaSoraError(
            f"{place_a} and {place_b} are of different models: {'; '.join(problems)}; give two of one model"
        )

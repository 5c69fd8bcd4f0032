"""The checkpoint that a command reads, and the settings of the run that saved it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.manifest import check_kind_and_size, read_manifest
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import CheckpointStore, read_state
from megasora.checkpoint.weight_kinds import kind_of
from megasora.config import Config, load, load_run_config
from megasora.errors import MegaSoraError, first_of, printable
from megasora.formats.recognize import check_format
from megasora.formats.source import ExportSource

BYTES_PER_VALUE = 4  # fp32
SHOWN = 2  # names in a message
Result = TypeVar("Result")


def with_newest(place: Path, action: Callable[[Path], Result]) -> Result:
    """What `action(checkpoint)` returns for the checkpoint at `place`, or for the newest of the run folder `place` that
    does not raise DamagedCheckpoint: all that is read is verified, so nothing is read twice.

    Prints a line on standard error for each checkpoint that is damaged. Raises MegaSoraError if `place` is something
    else, with the command that reads it, or if no checkpoint is whole.
    """
    if check_format(place, "run", "checkpoint").format == "checkpoint":
        return action(place)
    problems: list[str] = []
    for checkpoint in reversed(complete(place)):
        if problems:
            print(printable(f"{problems[-1]}; reading {checkpoint.name} instead"), file=sys.stderr)
        try:
            return action(checkpoint)
        except DamagedCheckpoint as error:
            if not checkpoint.exists():  # the run has saved a newer one and deleted this one
                return with_newest(place, action)
            problems.append(error.problem)
    raise MegaSoraError(f"no checkpoint of {place} is whole: {'; '.join(problems)}; restore one from a copy")


def complete(run: Path) -> list[Path]:
    """Its checkpoints, oldest first. Raises MegaSoraError if it has none."""
    found = CheckpointStore(run / "checkpoints").complete()
    if not found:
        raise MegaSoraError(f"{run} is a run folder that has no checkpoint yet")
    return found


def find(place: Path) -> Path:
    """The checkpoint at `place`, or the newest of a run folder whose manifest, state and sizes of files are intact; the
    rest is verified when it is read. Raises MegaSoraError as with_newest."""

    def check(checkpoint: Path) -> Path:
        read_state(checkpoint)
        manifest = read_manifest(checkpoint)
        for name in manifest.files:
            check_kind_and_size(checkpoint, manifest, name)
        return checkpoint

    return with_newest(place, check)


def open_source(folder: Path, weights: str) -> ExportSource:
    """`folder`: of a checkpoint. `weights`: of --weights."""
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

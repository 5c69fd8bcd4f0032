"""`megasora checkpoint diff A B`: which tensors of two checkpoints differ, and by how much; one of each at a time.

A and B may be saved by different layouts: full tensors are compared. An exported .safetensors file is compared with the
weights of the other one that `--weights` names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import read_state
from megasora.checkpoint.weight_kinds import kind_of
from megasora.commands.checkpoint_source import BYTES_PER_VALUE, check_same_model, find, leaves, num_bytes
from megasora.commands.tables import print_table
from megasora.errors import MegaSoraError, printable
from megasora.formats.recognize import check_format
from megasora.jsonl import finite_or_none
from megasora.observe.byte_progress import byte_progress

MAX_ROWS = 20  # tensors that are printed
MAX_STATE_ROWS, MAX_VALUE = 20, 60
HOW_IT_WAS_SAVED = {
    "parallel",
    "code",
    "config",
    "imported",
}  # parts of state.json that do not change what a run trains


@dataclass(frozen=True)
class Side:
    """One of two things to compare. `sharded` and `state`: None for a file of weights."""

    place: Path
    shapes: dict[str, torch.Size]
    kinds: set[str]
    read: Callable[[str, str], Tensor]  # (kind, name) -> the full tensor
    sharded: ShardedCheckpoint | None = None
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class TensorDifference:
    kind: str
    name: str
    elements: int  # that differ
    count: int
    largest: float  # absolute difference; infinite if one of two values is NaN or infinite
    relative: float  # norm of the difference / norm of the tensor of A


def diff_checkpoints(place_a: Path, place_b: Path, weights: str, as_json: bool) -> bool:
    """Prints the differences; returns whether there are any. Raises MegaSoraError for two different models."""
    with ExitStack() as files:
        a, b = (files.enter_context(open_side(place)) for place in (place_a, place_b))
        check_same_model((a.place, a.shapes), (b.place, b.shapes))
        pairs = paired_kinds(a, b, weights)
        with byte_progress("diff", 2 * num_bytes(a.shapes, len(pairs))) as advance:
            found = list(differing_tensors(a, b, pairs, advance))
    both = a.sharded is not None and b.sharded is not None
    only = {str(side.place): sorted(side.kinds - other.kinds) for side, other in ((a, b), (b, a)) if both}
    states = state_differences(a.state, b.state)
    if as_json:
        print(json.dumps(as_dict(a, b, pairs, found, only, states), indent=1))
    else:
        print_differences(a, pairs, found, only, states)
    return bool(found or any(only.values()) or any(key.partition(".")[0] not in HOW_IT_WAS_SAVED for key in states))


@contextmanager
def open_side(place: Path) -> Iterator[Side]:
    if check_format(place, "run", "checkpoint", "safetensors").format == "safetensors":
        with open_safetensors(place) as (shapes, read):
            yield Side(place, shapes, {"weights"}, lambda kind, name: read(name))
        return
    folder = find(place)
    sharded = ShardedCheckpoint(folder)
    yield Side(folder, dict(sharded.shapes), set(sharded.kinds), sharded.full_tensor, sharded, read_state(folder))


@contextmanager
def open_safetensors(file: Path) -> Iterator[tuple[dict[str, torch.Size], Callable[[str], Tensor]]]:
    """(shapes, a function that reads one tensor as fp32) of a file. Raises MegaSoraError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            yield shapes, lambda name: opened.get_tensor(name).float()
    except SafetensorError as error:
        raise MegaSoraError(f"{file} cannot be read: {error}; copy or export it again") from None


def paired_kinds(a: Side, b: Side, weights: str) -> list[tuple[str, str]]:
    """The kinds of A and B that are compared with each other; of a file, with the one that `weights` names."""
    if a.sharded is not None and b.sharded is not None:
        return [(kind, kind) for kind in sorted(a.kinds & b.kinds)]
    kind_a, kind_b = ("weights" if side.sharded is None else kind_of(side.sharded, weights) for side in (a, b))
    return [(kind_a, kind_b)]


def differing_tensors(
    a: Side, b: Side, pairs: list[tuple[str, str]], advance: Callable[[int], None]
) -> Iterator[TensorDifference]:
    for kind_a, kind_b in pairs:
        for name in sorted(a.shapes):
            values, others = a.read(kind_a, name), b.read(kind_b, name)
            difference = compare(kind_a, name, values, others)
            advance(2 * BYTES_PER_VALUE * values.numel())
            if difference is not None:
                yield difference


@torch.no_grad()
def compare(kind: str, name: str, a: Tensor, b: Tensor) -> TensorDifference | None:
    """None if they are equal, where NaN equals NaN."""
    if torch.equal(a, b):
        return None
    differs = (a != b) & ~(a.isnan() & b.isnan())
    elements = int(differs.sum())
    if not elements:
        return None
    delta = (a - b)[differs]
    if not bool(delta.isfinite().all()):
        return TensorDifference(kind, name, elements, a.numel(), math.inf, math.inf)
    norm, distance = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (a[a.isfinite()], delta))
    relative = distance / norm if norm else math.inf
    return TensorDifference(kind, name, elements, a.numel(), float(delta.abs().max()), relative)


def state_differences(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, tuple[Any, Any]]:
    """Dotted keys of state.json in which they differ, and both values, None if there is none; a part that only one has
    is one entry. Empty if one has no state."""
    if a is None or b is None:
        return {}
    common = a.keys() & b.keys()
    flat_a, flat_b = ({key: side[key] for key in side if key not in common} for side in (a, b))
    for side, flat in ((a, flat_a), (b, flat_b)):
        flat.update(leaves({key: side[key] for key in common}))
    keys = [*flat_a, *(key for key in flat_b if key not in flat_a)]
    return {key: (flat_a.get(key), flat_b.get(key)) for key in keys if flat_a.get(key) != flat_b.get(key)}


def print_differences(
    a: Side,
    pairs: list[tuple[str, str]],
    found: list[TensorDifference],
    only: dict[str, list[str]],
    states: dict[str, tuple[Any, Any]],
) -> None:
    for kind_a, kind_b in pairs:
        differing = [d for d in found if d.kind == kind_a]
        label = kind_a if kind_a == kind_b else f"{kind_a} and {kind_b}"
        verdict = f"{len(differing):,} of {len(a.shapes):,} tensors differ" if differing else "equal"
        print(f"{label:<16}{verdict}")
    for place, kinds in only.items():
        if kinds:
            print(f"{', '.join(kinds):<15} only in {printable(place)}")
    if found:
        rows = [
            (d.kind, d.name, f"{d.count:,}", f"{d.elements:,}", f"{d.largest:.3g}", f"{d.relative:.3g}")
            for d in sorted(found, key=lambda d: -d.relative)[:MAX_ROWS]
        ]
        print_table(("kind", "tensor", "elements", "differ", "largest", "relative"), rows, texts=2)
        if len(found) > MAX_ROWS:
            print(f"and {len(found) - MAX_ROWS:,} more; --json prints all")
    for key, values in list(states.items())[:MAX_STATE_ROWS]:
        old, new = (printable(json.dumps(value), MAX_VALUE) for value in values)
        print(f"state {printable(key, MAX_VALUE)}: {old} -> {new}")
    if len(states) > MAX_STATE_ROWS:
        print(f"and {len(states) - MAX_STATE_ROWS:,} more of the state; --json prints all")


def as_dict(
    a: Side,
    b: Side,
    pairs: list[tuple[str, str]],
    found: list[TensorDifference],
    only: dict[str, list[str]],
    states: dict[str, tuple[Any, Any]],
) -> dict[str, Any]:
    tensors = [vars(d) for d in found]
    values = {"a": str(a.place), "b": str(b.place), "compared": pairs, "only_in": only}
    return finite_or_none({**values, "tensors": tensors, "state": {key: list(pair) for key, pair in states.items()}})

"""Imports a folder of torch.distributed.checkpoint (DCP) into a new run folder.

    weights alone             -> RUN/checkpoints/step-00000000 and RUN/config.yaml: to sample from, or run.start=init:
    a whole training state    -> RUN/checkpoints/step-XXXXXXXX and RUN/config.yaml: a run to resume

The second is what `export_dcp` writes with `everything`, also after plain PyTorch has read it and saved it again. Other
folders have weights of this model under its names, with a prefix, in any floating dtype, saved by any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.checkpoint.full_tensors import save_full_tensors
from megasora.checkpoint.imported import save_imported
from megasora.checkpoint.store import CheckpointStore
from megasora.config import Config, load, to_yaml
from megasora.errors import MegaSoraError, first_of, printable
from megasora.files import write_text_atomic
from megasora.formats.dcp_export import CONFIG, KINDS, MODEL, STATE, STATE_FORMAT, dotted, place_of
from megasora.formats.dcp_folder import DCPFolder, open_dcp
from megasora.formats.safetensors_folder import new_folder
from megasora.jsonl import parse_json

PREFIXES = (f"{MODEL}.", "")  # that are tried if none is given
MAX_LISTED = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class TrainingState:
    """`kinds`: of the values of each parameter. `state`: of state.json. `config`: of the run, as YAML."""

    kinds: list[str]
    state: dict[str, Any]
    config: str


def import_dcp(
    place: Path,
    run: Path,
    config_file: Path | None,
    overrides: list[str],
    shapes_of: Callable[[Config], Shapes],
    prefix: str | None = None,
    on_written: Callable[[int], None] = lambda size: None,
) -> Path:
    """Writes the run folder `run`, whole or not at all, one tensor at a time; returns the folder of its checkpoint.

    config_file, overrides   settings of the run; with a training state changes of its own settings
    shapes_of                shapes of all parameters of the model of a configuration
    prefix                   of the names of the weights, e.g. "model." or "ema."; None: the training state if there is
                             one, else weights with one of PREFIXES
    on_written               called with the bytes of each tensor

    Raises MegaSoraError for a folder of another format, half a folder, another model, or weights that are not finite.
    """
    folder = open_dcp(place)
    saved = read_state(folder) if prefix is None else None
    with new_folder(run) as staging:
        store = CheckpointStore(staging / "checkpoints")
        if saved is None:
            config = load(config_file, overrides)
            shapes = shapes_of(config)
            names = find_weights(folder, shapes, prefix)
            checkpoint = save_imported(
                store, shapes, lambda name: read(folder, names[name]), f"DCP, {place}", on_written
            )
        else:
            if config_file is None:
                config_file = staging / "config.yaml"
                write_text_atomic(config_file, saved.config)
            config = load(config_file, overrides)
            shapes = shapes_of(config)
            checkpoint = save_training(folder, saved, shapes, store, on_written)
        config.run.dir = str(run)
        write_text_atomic(staging / "config.yaml", to_yaml(config))
    return run / checkpoint.relative_to(staging)


def save_training(
    folder: DCPFolder, saved: TrainingState, shapes: Shapes, store: CheckpointStore, on_written: Callable[[int], None]
) -> Path:
    for kind in saved.kinds:
        names = {name: dotted(place_of(kind, name)) for name in shapes}
        check_weights(folder, shapes, names, f"its training state has no {kind} of")
    known = {dotted(place_of("weights", name)) for name in shapes}
    check_unused(folder, {name for name in folder.tensors if name.startswith(f"{MODEL}.")} - known)

    def value_of(kind: str, name: str) -> Tensor:
        return read(folder, dotted(place_of(kind, name)))

    state = {key: value for key, value in saved.state.items() if key != "step"}
    return save_full_tensors(store, saved.state["step"], shapes, saved.kinds, value_of, state, on_written)


def read_state(folder: DCPFolder) -> TrainingState | None:
    """The training state of which `folder` has the tensors; None if it has none. Raises MegaSoraError for another
    version."""
    if STATE not in folder.objects:
        return None
    text = folder.read_object(STATE)
    try:
        values = parse_json(text)
        if values["format"] != STATE_FORMAT:
            raise ValueError(f"format {values['format']}, {STATE_FORMAT} expected")
        saved = TrainingState(values[KINDS], values["state"], values[CONFIG])
        if not (isinstance(saved.config, str) and all(isinstance(kind, str) for kind in saved.kinds)):
            raise ValueError("kinds and settings are texts")
        if type(saved.state["step"]) is not int or not 0 <= saved.state["step"] < 10**12:
            raise ValueError(f"step {saved.state['step']}")
    except (ValueError, KeyError, TypeError) as error:
        raise MegaSoraError(
            f"{folder.path}: {STATE} is not the state of a run: {printable(str(error), 200)}; import its weights alone "
            f"with the prefix {MODEL}."
        ) from None
    return saved


def find_weights(folder: DCPFolder, shapes: Shapes, prefix: str | None) -> dict[str, str]:
    """The name in the folder of each parameter. Raises MegaSoraError with names and shapes that do not fit."""
    prefixes = PREFIXES if prefix is None else (prefix,)
    found = {p: sum(f"{p}{name}" in folder.tensors for name in shapes) for p in prefixes}
    prefix = max(found, key=lambda p: found[p])
    if not found[prefix]:
        words = " or ".join(f"'{p}'" for p in prefixes)
        raise MegaSoraError(
            f"{folder.path} has no weights of this model with the prefix {words}; it has {listed(folder.tensors)}; "
            "give the prefix before patch_in.weight with --prefix"
        )
    names = {name: f"{prefix}{name}" for name in shapes}
    check_weights(folder, shapes, names, "it lacks")
    sections = {name.partition(".")[0] for name in shapes}
    unused = {name for name in folder.tensors if name.startswith(prefix)} - set(names.values())
    check_unused(folder, {name for name in unused if prefix or name.partition(".")[0] in sections})
    return names


def check_weights(folder: DCPFolder, shapes: Shapes, names: Mapping[str, str], lacks: str) -> None:
    """Raises MegaSoraError unless the folder has all tensors, of these shapes and a floating dtype."""
    if missing := [name for name in shapes if names[name] not in folder.tensors]:
        raise MegaSoraError(
            f"{folder.path}: {lacks} {listed(missing)}; give the settings of the model that it has, with --config YAML "
            "or key=value"
        )
    for name, shape in shapes.items():
        tensor = folder.tensors[names[name]]
        if tensor.shape != shape:
            raise MegaSoraError(
                f"{folder.path}: {printable(names[name], 200)} is {list(tensor.shape)}, this model's {list(shape)}; "
                "use the model.*, text.* and data.patch settings of the model that it has"
            )
        if tensor.dtype not in DTYPES:
            raise MegaSoraError(
                f"{folder.path}: {names[name]} is {tensor.dtype}; weights are float32, bfloat16 or float16"
            )


def check_unused(folder: DCPFolder, unused: set[str]) -> None:
    if unused:
        raise MegaSoraError(
            f"{folder.path}: this model has no parameter for {listed(unused)}; use the settings of the model that "
            "it has"
        )


def read(folder: DCPFolder, name: str) -> Tensor:
    """A full tensor, fp32. Raises MegaSoraError if an element is NaN or infinite."""
    value = folder.read(name).float()
    if not value.isfinite().all():
        count = int((~value.isfinite()).sum())
        raise MegaSoraError(
            f"{folder.path}: {count} of {value.numel()} elements of {printable(name, 200)} are NaN or infinite; use an "
            "earlier checkpoint"
        )
    return value


def listed(names: Any) -> str:
    return first_of([printable(name, 100) for name in sorted(names)], MAX_LISTED) or "no tensors"

"""A checkpoint of a run from a ZeRO checkpoint of DeepSpeed: one of `export_deepspeed`, trained further by a script.

    FOLDER/TAG  --fp32 weights, moments, one tensor at a time-->  RUN/checkpoints/step-XXXXXXXX, to resume from

The state of the run is client_state["megasora"] of save_checkpoint: what load_checkpoint has returned under this name,
with "step" and task["cursor"] of the script's last step. Without it the weights alone are saved, at step 0, to start a
run from (checkpoint/imported.py). DeepSpeed has no averages of weights: those of the run start again from the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megasora.checkpoint.full_tensors import save_full_tensors
from megasora.checkpoint.imported import save_imported
from megasora.checkpoint.manifest import step_of
from megasora.checkpoint.store import CheckpointStore
from megasora.data.packing_plan import Cursor
from megasora.errors import MegaSoraError, printable
from megasora.formats.deepspeed_files import CLIENT_KEY
from megasora.formats.deepspeed_reader import KINDS, ZeroFiles, open_zero
from megasora.jsonl import parse_json

STATE_KEYS = ("step", "parallel", "ema_updates", "task", "guard", "code")  # of state.json that a training resumes from


def import_deepspeed(
    place: Path,
    store: CheckpointStore,
    shapes: Mapping[str, torch.Size],
    tag: str | None = None,
    on_written: Callable[[int], None] = lambda size: None,
) -> Path:
    """Writes a checkpoint into `store`, whole or not at all, reading one tensor at a time; returns its folder.

    `place`: the folder that load_checkpoint of DeepSpeed takes; `tag`: None for the one that `place`/latest names.
    `shapes`: of the parameters of the run's model. `on_written`: called with the bytes of each write. Raises
    MegaSoraError if the checkpoint does not fit, is not whole, or holds anything but tensors and plain values.
    """
    saved = open_zero(place, tag, shapes)
    state = read_state(saved)
    step = state["step"] if state is not None else 0
    check_newest(store, step)
    ordered = {name: shapes[name] for name in sorted(shapes)}
    if state is None:
        weight_of = partial(saved.full_tensor, KINDS[0])
        return save_imported(store, ordered, weight_of, f"DeepSpeed, {saved.folder}", on_written)
    return save_full_tensors(store, step, ordered, KINDS, saved.full_tensor, state, on_written)


def check_newest(store: CheckpointStore, step: int) -> None:
    """Raises MegaSoraError unless the checkpoint of `step` will be the newest of the run."""
    later = [path for path in store.complete() if step_of(path.name) >= step]
    if later:
        raise MegaSoraError(
            f"{store.run_dir} has {later[0].name} already, and the imported checkpoint is of step {step}; give another "
            "--run"
        )


def check_updates(saved: ZeroFiles) -> None:
    """Raises MegaSoraError unless the optimizer has had all steps of the model."""
    steps = saved.model["global_steps"] - saved.model["skipped_steps"]
    if saved.updates != steps:
        raise MegaSoraError(
            f"{saved.folder}: the optimizer has had {saved.updates} steps, the model {steps}; its files belong to "
            "different saves, or the script has not loaded the optimizer's states: save its weights alone, without "
            f"client_state[{CLIENT_KEY!r}], and start a run from them"
        )


def read_state(saved: ZeroFiles) -> dict[str, Any] | None:
    """What state.json of the checkpoint holds; None if the script has passed none. Raises MegaSoraError."""
    if CLIENT_KEY not in saved.model:
        return None
    where = f"{saved.folder}: client_state[{CLIENT_KEY!r}]"
    remedy = f"pass what load_checkpoint returned as client_state[{CLIENT_KEY!r}] to save_checkpoint"
    try:
        state = parse_json(json.dumps(saved.model[CLIENT_KEY], allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise MegaSoraError(f"{where} holds other than JSON values ({error}); {remedy}") from None
    missing = [key for key in STATE_KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise MegaSoraError(f"{where} has no {', '.join(missing)}; {remedy}")
    if type(state["step"]) is not int or state["step"] != saved.model["global_steps"]:
        raise MegaSoraError(
            f"{where} is the state of step {printable(str(state['step']), 40)}, the checkpoint is of step "
            f"{saved.model['global_steps']}; "
            'set its "step", and its "task"["cursor"] to the next pack, before save_checkpoint'
        )
    check_updates(saved)
    try:
        cursor = Cursor(**state["task"]["cursor"])
        if not all(type(value) is int and value >= 0 for value in vars(cursor).values()):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise MegaSoraError(
            f'{where}["task"]["cursor"] is not {{"epoch": 0, "window": 0, "pack": 0}}; give the next pack, '
            "dataclasses.asdict(batch.next_cursor)"
        ) from None
    return {**state, "ema_updates": saved.updates}  # every step of the optimizer is followed by one of the average

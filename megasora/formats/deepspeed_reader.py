"""Reads a ZeRO checkpoint that DeepSpeed saved: stages 1, 2 and 3, any number of ranks, fp32, bf16 or fp16 models.

`open_zero` reads what the files say of themselves, runs nothing that they hold, and compares it. `full_tensor` then
reads a parameter, whole, by the byte ranges of the ranks' flat tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.errors import MegaSoraError, first_of, printable
from megasora.formats.allowed_pickle import PARSE_ERRORS, StoredTensor, unreadable
from megasora.formats.deepspeed_files import CLIENT_KEY, model_file, optimizer_file, read_torch_file
from megasora.formats.deepspeed_folder import SHOWN, check_names, file_of, read_ranks, tag_folder
from megasora.formats.deepspeed_layout import ZeroLayout, partition_groups, partition_parameters
from megasora.formats.recognize import check_format

MAX_RANKS, MAX_STEPS = 1 << 20, 10**12
KINDS = ("weights", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ZeroFiles:
    """A checkpoint of one tag. `flat[kind][rank][group]`: the flat tensors of a rank; of the moments, only
    where there is a state of a run to go with them."""

    folder: Path
    model: dict[str, Any]  # the model states of rank 0: counts, client_state
    layout: ZeroLayout
    flat: dict[str, list[list[StoredTensor]]]
    updates: int  # steps of the optimizer; 0 without a state of a run

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: shape for group in self.layout.groups for name, shape in group.items()}

    def full_tensor(self, kind: str, name: str) -> Tensor:
        """A full parameter, or a moment of it, in fp32. `kind`: one of KINDS. Raises MegaSoraError, also where a value
        is not finite, or where weights are not those of the model's file, which then belongs to another save."""
        pieces = self.layout.pieces[name]
        try:
            values = torch.cat([self.read(kind, piece) for piece in pieces]) if pieces else torch.empty(0)
            if kind == "weights":
                self.check_model_weight(name, values)
        except PARSE_ERRORS as error:
            raise unreadable(self.folder, error) from None
        if not values.isfinite().all():
            raise MegaSoraError(f"{self.folder}: {kind} of {name} are NaN or infinite; use an earlier checkpoint")
        return values.view(self.shapes[name])

    def read(self, kind: str, piece: Any) -> Tensor:
        tensor = self.flat[kind][piece.rank][piece.group]
        return tensor.read_elements(tensor.start + piece.offset, piece.count).float()

    def check_model_weight(self, name: str, weights: Tensor) -> None:
        """Stages 1 and 2 save the weights that the model computes with, too: the fp32 ones in its dtype."""
        computed = self.model["module"].get(name)
        if isinstance(computed, StoredTensor) and computed.shape.numel() == weights.numel() != 0:
            if not torch.equal(computed.read().view(-1), weights.to(computed.dtype)):
                raise MegaSoraError(
                    f"{self.folder}: {name} differs between {model_file(1, 0)} and the optimizer's files; they belong "
                    "to different saves, or are damaged: copy the folder again"
                )


def open_zero(place: Path, tag: str | None, shapes: Mapping[str, torch.Size]) -> ZeroFiles:
    """The checkpoint `tag` of the folder `place`, or the one that `place`/latest names.

    `shapes`: of the parameters that it must have. Raises MegaSoraError if it has others, if files are missing, belong
    to different saves, hold anything but tensors and plain values, or are of a kind of checkpoint that is not read.
    """
    check_format(place, "deepspeed")
    folder = tag_folder(place, tag)
    names = check_names(folder)
    stage_3 = model_file(3, 0) in names
    model_path = file_of(folder, model_file(3 if stage_3 else 1, 0))
    model = read_model(model_path)
    processes = model["dp_world_size"]
    check_shapes(model_path, model, shapes)
    is_bf16 = optimizer_file(True, 0) in names
    optimizers = list(read_ranks(folder, [optimizer_file(is_bf16, rank) for rank in range(processes)], names))
    if stage_3:
        check_same_save(folder, model, read_ranks(folder, [model_file(3, rank) for rank in range(processes)], names))
    try:
        states = [values["optimizer_state_dict"] for values in optimizers]
        layout = layout_of(model, states[0], processes, stage_3)
        has_state = CLIENT_KEY in model
        flat = flat_tensors(states, layout, stage_3, has_state)
        return ZeroFiles(folder, model, layout, flat, updates_of(folder, states, stage_3) if has_state else 0)
    except PARSE_ERRORS as error:
        raise unreadable(folder, error) from None


# ---------------------------------------------------------------- agreement of the files


def read_model(path: Path) -> dict[str, Any]:
    """The model states of a file. Raises MegaSoraError unless it has those that are needed."""
    values = read_torch_file(path)
    found = values if isinstance(values, dict) else {}
    wrong = [name for name, is_right in MODEL_FIELDS.items() if not is_right(found.get(name))]
    if wrong:
        raise MegaSoraError(
            f"{path} has no {first_of(wrong, SHOWN)} of a ZeRO checkpoint of stage 1, 2 or 3; give one, as "
            "save_checkpoint of DeepSpeed writes it"
        )
    return found


def is_group(group: Any) -> bool:
    return isinstance(group, dict) and all(
        isinstance(name, str) and isinstance(shape, torch.Size) for name, shape in group.items()
    )


MODEL_FIELDS = {
    "dp_world_size": lambda value: type(value) is int and 1 <= value <= MAX_RANKS,
    "param_shapes": lambda value: isinstance(value, list) and all(is_group(group) for group in value),
    "module": lambda value: isinstance(value, dict),
    "global_steps": lambda value: type(value) is int and 0 <= value < MAX_STEPS,
    "skipped_steps": lambda value: type(value) is int and value >= 0,
}


def check_shapes(path: Path, model: dict[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    """Raises MegaSoraError unless the checkpoint has exactly these parameters."""
    saved: dict[str, torch.Size] = {}
    for group in model["param_shapes"]:
        saved |= group
    for name, shape in shapes.items():
        if saved.get(name) != shape:
            has = f"has {list(saved[name])}" if name in saved else "has none"
            raise MegaSoraError(
                f"{path}: {name} is {list(shape)} in the model of the run, the checkpoint {has}; give the model.*, "
                "text.* and codec.* settings that it was trained with"
            )
    extra = [printable(name, 60) for name in saved if name not in shapes]
    if extra or sum(map(len, model["param_shapes"])) != len(saved):
        raise MegaSoraError(
            f"{path} has parameters that the model of the run has not ({first_of(extra, SHOWN) or 'some twice'}); give "
            "the model.*, text.* and codec.* settings that it was trained with"
        )


def check_same_save(folder: Path, first: dict[str, Any], models: Iterable[dict[str, Any]]) -> None:
    """Of stage 3. Raises MegaSoraError unless all ranks have saved after the same step, and the same parameters."""
    for rank, model in enumerate(models):
        for key in ("global_steps", "dp_world_size", "param_shapes"):
            if model.get(key) != first[key]:
                raise different_saves(folder, f"{key} of rank {rank}")


def different_saves(folder: Path, what: str) -> MegaSoraError:
    return MegaSoraError(
        f"{folder}: {printable(what, 100)} differs between its files; they belong to different saves: copy the folder "
        "again, or give another --tag NAME"
    )


def layout_of(model: dict[str, Any], states: dict[str, Any], processes: int, stage_3: bool) -> ZeroLayout:
    if stage_3:
        return partition_parameters(model["param_shapes"], processes)
    return partition_groups(model["param_shapes"], processes, states.get("param_alignment_paddings"))


def flat_tensors(
    states: list[dict[str, Any]], layout: ZeroLayout, stage_3: bool, has_state: bool
) -> dict[str, list[list[StoredTensor]]]:
    """Of each kind, by rank and group. Raises ValueError if one has another size than the layout asks for."""
    key = "fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"
    flat = {"weights": [list(values[key]) for values in states]}
    for kind in KINDS[1:] if has_state else ():
        flat[kind] = [[state[kind] for state in adam_states(values, stage_3)] for values in states]
    for kind, by_rank in flat.items():
        for rank, tensors in enumerate(by_rank):
            for tensor, used, size in zip(tensors, layout.used[rank], layout.partition_sizes, strict=True):
                if not (isinstance(tensor, StoredTensor) and tensor.stride == (1,)):
                    raise ValueError(f"{kind} of rank {rank} are no flat tensors")
                if not used <= tensor.shape.numel() <= size or not tensor.dtype.is_floating_point:
                    raise ValueError(
                        f"{kind} of rank {rank} are {tensor.shape.numel()} elements, {used} to {size} expected"
                    )
    return flat


def adam_states(states: dict[str, Any], stage_3: bool) -> list[dict[str, Any]]:
    """The states of the wrapped optimizer, by flat tensor; a list with zero_optimization.elastic_checkpoint."""
    if stage_3:
        return list(states["optimizer_state_dict"]["state"].values())
    base = states["base_optimizer_state"]
    return base if isinstance(base, list) else list(base["state"].values())


def updates_of(folder: Path, states: list[dict[str, Any]], stage_3: bool) -> int:
    """Steps of the optimizer. Raises MegaSoraError unless all ranks and groups have had the same number."""
    counts = set()
    for values in states:
        for state in adam_states(values, stage_3):
            step = state["step"] if "step" in state else group_step(values, stage_3)
            counts.add(int(step.read() if isinstance(step, StoredTensor) else step))
    if len(counts) != 1:
        raise different_saves(folder, f"the step of the optimizer ({first_of(sorted(counts), SHOWN)})")
    return counts.pop()


def group_step(states: dict[str, Any], stage_3: bool) -> Any:
    """The step where the optimizer keeps it in its groups."""
    if "base_optimizer_state_step" in states:
        return states["base_optimizer_state_step"]
    return states["optimizer_state_dict" if stage_3 else "base_optimizer_state"]["param_groups"][0]["step"]

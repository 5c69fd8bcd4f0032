"""A checkpoint as DeepSpeed (0.19) loads it: fp32 weights, Adam's moments and the state of the run, for ZeRO 1, 2, 3.

    checkpoint of any layout --full tensors, one at a time--> the ranks' files of OUT/global_stepN (deepspeed_files.py)

A script without MegaSora's engine then continues the training:

    decayed = [p for name, p in model.named_parameters() if uses_weight_decay(name, p)]
    others = [p for name, p in model.named_parameters() if not uses_weight_decay(name, p)]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], ...)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=...)
    _, client_state = engine.load_checkpoint(OUT)        # client_state["megasora"]: state.json of the checkpoint

Its stage, dtype and number of processes must be those of the export; `ds_to_universal` of DeepSpeed makes a checkpoint
for any number of them. The two groups and the order of the parameters are part of the format. Averages of the weights
are left out: DeepSpeed has no place for them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megasora.checkpoint.store import check_room
from megasora.errors import MegaSoraError
from megasora.files import write_text_atomic
from megasora.formats.allowed_pickle import StoredTensor
from megasora.formats.deepspeed_files import LATEST, fill, model_file, optimizer_file, sync_files, write_skeleton
from megasora.formats.deepspeed_layout import partition_groups, partition_parameters, split_sub_groups
from megasora.formats.deepspeed_states import (
    MOMENTS,
    VERSION,
    ZeroExport,
    base_state,
    ds_config,
    flat_tensors,
    model_states,
    stage_1_2_states,
    stage_3_states,
)
from megasora.formats.safetensors_folder import new_folder
from megasora.formats.source import ExportSource

UsesWeightDecay = Callable[[str, Tensor], bool]


def export_deepspeed(
    source: ExportSource,
    out: Path,
    shapes: Mapping[str, torch.Size],
    uses_weight_decay: UsesWeightDecay,
    zero_stage: int = 2,
    processes: int = 1,
    dtype: torch.dtype = torch.float32,
    on_written: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes the folder `out`, whole or not at all, reading one tensor at a time.

    shapes             of the parameters in the order of model.named_parameters()
    uses_weight_decay  (name, parameter) -> whether its group is the one with weight decay
    zero_stage         1, 2 or 3
    processes          ranks over which ZeRO partitions the states
    dtype              of the model: float32 or bfloat16; the optimizer's states are fp32
    on_written         called with the bytes of each tensor that was read

    Raises MegaSoraError for a run of another model or optimizer, and for values that are NaN or infinite.
    """
    check_source(source, shapes)
    export = plan(source, shapes, uses_weight_decay, zero_stage, processes, dtype)
    tag = f"global_step{source.state['step']}"
    with new_folder(out) as staging:
        folder = staging / tag
        folder.mkdir()
        model, optimizers = write_skeletons(export, folder)
        check_room(folder, sum(path.stat().st_size for path in folder.iterdir()), "the checkpoint for DeepSpeed")
        for name in shapes:
            write_parameter(export, name, model["module"][name], optimizers, on_written)
        sync_files(folder)
        write_text_atomic(staging / LATEST, tag)


def check_source(source: ExportSource, shapes: Mapping[str, torch.Size]) -> None:
    """Raises MegaSoraError unless plain AdamW continues a model with these parameters from the checkpoint."""
    if source.kind not in (None, "weights"):
        raise MegaSoraError(
            f"--weights {source.kind}: DeepSpeed continues a training, from its raw weights; use --weights raw, or for "
            "the average --format safetensors"
        )
    if source.config.optim.name != "adamw" and MOMENTS[0] in source.sharded.kinds:
        raise MegaSoraError(
            f"{source.folder} was trained with optim.name={source.config.optim.name}, whose states DeepSpeed's AdamW "
            "cannot continue; use --format safetensors for its weights, or --format dcp for everything"
        )
    if dict(source.sharded.shapes) != dict(shapes):
        different = sorted(set(source.sharded.shapes.items()) ^ set(shapes.items()))
        raise MegaSoraError(
            f"{source.folder}: {different[0][0]} is not as in the model of the run's config.yaml; give the checkpoint "
            "of a run of megasora.train"
        )


def plan(
    source: ExportSource,
    shapes: Mapping[str, torch.Size],
    uses_weight_decay: UsesWeightDecay,
    stage: int,
    processes: int,
    dtype: torch.dtype,
) -> ZeroExport:
    groups: dict[bool, dict[str, torch.Size]] = {True: {}, False: {}}
    for name, shape in shapes.items():
        groups[uses_weight_decay(name, torch.empty(shape, device="meta"))][name] = shape
    used = {decay: group for decay, group in groups.items() if group}  # as DeepSpeed: none is empty
    decays = [source.config.optim.weight_decay if decay else 0.0 for decay in used]
    if stage == 3:
        divided = split_sub_groups(list(used.values()), processes)
        layout = partition_parameters([part for parts in divided for part in parts], processes)
    else:
        divided = [[group] for group in used.values()]
        layout = partition_groups(list(used.values()), processes)
    return ZeroExport(stage, dtype, divided, decays, layout, source)


# ---------------------------------------------------------------- files


def write_skeletons(export: ZeroExport, folder: Path) -> tuple[dict, list[dict]]:
    """All files without their values; the objects of the model's file and of the ranks' optimizer files."""
    first = folder / model_file(export.stage, 0)
    model = write_skeleton(first, model_states(export))
    for rank in range(1, export.layout.processes if export.stage == 3 else 1):
        shutil.copyfile(first, folder / model_file(export.stage, rank))
    is_bf16, states = export.dtype == torch.bfloat16, stage_3_states if export.stage == 3 else stage_1_2_states
    optimizers = []
    for rank in range(export.layout.processes):
        values = {"optimizer_state_dict": states(export, rank), "ds_config": ds_config(export), "ds_version": VERSION}
        optimizers.append(write_skeleton(folder / optimizer_file(is_bf16, rank), values)["optimizer_state_dict"])
        for state in base_state(export, optimizers[-1])["state"].values():
            fill(state["step"], torch.tensor(float(export.updates)))
    return model, optimizers


def write_parameter(
    export: ZeroExport,
    name: str,
    weight: StoredTensor,
    optimizers: list[dict],
    on_written: Callable[[int], None],
) -> None:
    """Fills in all values of a parameter. `weight`: that of the model's file, in stage 3 without elements."""
    saved = export.source.sharded
    for kind in ("weights", *MOMENTS):
        if kind not in saved.kinds:
            continue  # zeros
        values = saved.full_tensor(kind, name)
        if not values.isfinite().all():
            raise MegaSoraError(
                f"{export.source.folder}: {kind} of {name} are NaN or infinite; export an earlier checkpoint"
            )
        flat = values.reshape(-1)
        if kind == "weights" and export.stage != 3:
            fill(weight, flat)
        for piece in export.layout.pieces[name]:
            target = flat_tensors(export, optimizers[piece.rank], kind)[piece.group]
            fill(target, flat[piece.start : piece.start + piece.count], piece.offset)
        on_written(flat.nbytes)

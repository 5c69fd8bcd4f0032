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

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.errors import MegaSoraError
from megasora.files import write_text_atomic
from megasora.formats.allowed_pickle import StoredTensor
from megasora.formats.deepspeed_files import (
    CLIENT_KEY,
    LATEST,
    fill,
    hole,
    model_file,
    optimizer_file,
    sync_files,
    write_skeleton,
)  # fmt: skip
from megasora.formats.deepspeed_layout import (
    Group,
    ZeroLayout,
    partition_groups,
    partition_parameters,
    split_sub_groups,
)
from megasora.formats.deepspeed_pickle import FragmentAddress, LossScaler
from megasora.formats.safetensors_folder import new_folder
from megasora.formats.source import ExportSource
from megasora.optim.schedule import lr_at

VERSION = "0.19.0"  # of DeepSpeed, whose format this is
UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}  # that ds_to_universal asks for
MOMENTS = ("exp_avg", "exp_avg_sq")
UsesWeightDecay = Callable[[str, Tensor], bool]


@dataclass(frozen=True)
class ZeroExport:
    """What to write: `groups` of the optimizer and their weight decay, the layout, and the state of the run."""

    stage: int
    dtype: torch.dtype  # of the model
    groups: list[list[Group]]  # of each group of the optimizer, its sub-groups
    decays: list[float]
    layout: ZeroLayout
    source: ExportSource

    @property
    def updates(self) -> int:
        """Steps of Adam; 0 for imported weights, whose moments are zeros."""
        return self.source.state.get("ema_updates", 0)


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
        models, optimizers = write_skeletons(export, folder)
        for name in shapes:
            write_parameter(export, name, models[0]["module"].get(name), optimizers, on_written)
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


def write_skeletons(export: ZeroExport, folder: Path) -> tuple[list[dict], list[dict]]:
    """All files without their values; returns the objects of the model files and of the optimizer files, by rank."""
    ranks = range(export.layout.processes)
    models = [
        write_skeleton(folder / model_file(export.stage, rank), model_states(export))
        for rank in (ranks if export.stage == 3 else [0])
    ]
    is_bf16, states = export.dtype == torch.bfloat16, stage_3_states if export.stage == 3 else stage_1_2_states
    optimizers = []
    for rank in ranks:
        values = {"optimizer_state_dict": states(export, rank), "ds_config": ds_config(export), "ds_version": VERSION}
        optimizers.append(write_skeleton(folder / optimizer_file(is_bf16, rank), values)["optimizer_state_dict"])
        for state in base_state(export, optimizers[-1])["state"].values():
            fill(state["step"], torch.tensor(float(export.updates)))
    return models, optimizers


def write_parameter(
    export: ZeroExport,
    name: str,
    weight: StoredTensor | None,
    optimizers: list[dict],
    on_written: Callable[[int], None],
) -> None:
    """Fills in all values of a parameter. `weight`: that of the model, None in stage 3, where ranks have parts only."""
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


def flat_tensors(export: ZeroExport, states: dict[str, Any], kind: str) -> list[StoredTensor]:
    """A rank's flat tensors of one kind, by group."""
    if kind == "weights":
        return states["fp32_flat_groups" if export.stage == 3 else "single_partition_of_fp32_groups"]
    return [state[kind] for state in base_state(export, states)["state"].values()]


def base_state(export: ZeroExport, states: dict[str, Any]) -> dict[str, Any]:
    """The state_dict of the AdamW that a ZeRO optimizer wraps."""
    return states["optimizer_state_dict" if export.stage == 3 else "base_optimizer_state"]


# ---------------------------------------------------------------- content of the files


def model_states(export: ZeroExport) -> dict[str, Any]:
    """What DeepSpeed calls the model states, the same on all ranks."""
    step, is_stage_3 = export.source.state["step"], export.stage == 3
    weight = (lambda shape: hole(0, export.dtype)) if is_stage_3 else (lambda shape: hole(0, export.dtype, shape))
    order = OrderedDict((name, weight(shape)) for group in export.layout.groups for name, shape in group.items())
    return {
        "module": order,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict(group) for group in export.layout.groups],
        "frozen_param_shapes": None if export.stage == 1 else OrderedDict(),
        "shared_params": {},
        "frozen_param_fragments": None if export.stage == 1 else OrderedDict(),
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": step - export.updates,
        "global_steps": step,
        "dp_world_size": export.layout.processes,
        "mp_world_size": 1,
        "ds_config": ds_config(export),
        "ds_version": VERSION,
        CLIENT_KEY: export.source.state,
        **UNIVERSAL,
    }


def ds_config(export: ZeroExport) -> dict[str, Any]:
    is_bf16 = export.dtype == torch.bfloat16
    return {"zero_optimization": {"stage": export.stage}, "bf16": {"enabled": is_bf16}}


def stage_1_2_states(export: ZeroExport, rank: int) -> dict[str, Any]:
    """For DeepSpeedZeroOptimizer and, in bf16, BF16_Optimizer."""
    layout = export.layout
    used = layout.used[rank]
    return {
        "zero_stage": export.stage,
        "loss_scaler": LossScaler(),
        "dynamic_loss_scale": False,
        "overflow": False,
        "base_optimizer_state": adamw_states(export, layout.partition_sizes),
        "single_partition_of_fp32_groups": [hole(count) for count in used],
        "group_paddings": [size - count for size, count in zip(layout.partition_sizes, used, strict=True)],
        "partition_count": [layout.processes for _ in layout.groups],
        "ds_version": VERSION,
        "param_slice_mappings": [
            OrderedDict((name, FragmentAddress(piece.count, piece.offset)) for name, piece in pieces.items())
            for pieces in layout.pieces_of_rank(rank)
        ],
    }


def stage_3_states(export: ZeroExport, rank: int) -> dict[str, Any]:
    """For DeepSpeedZeroOptimizer_Stage3."""
    return {
        "zero_stage": 3,
        "loss_scaler": LossScaler(),
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": export.layout.processes,
        "optimizer_state_dict": adamw_states(export, export.layout.partition_sizes),
        "fp32_flat_groups": [hole(size) for size in export.layout.partition_sizes],
    }


def adamw_states(export: ZeroExport, sizes: list[int]) -> dict[str, Any]:
    """The state_dict of an AdamW whose parameters are flat tensors of these sizes, at the next step's learning rate."""
    optim = export.source.config.optim
    flat = iter([torch.nn.Parameter(torch.empty(0)) for _ in sizes])
    groups = [
        {"params": [next(flat) for _ in parts], "weight_decay": decay}
        for parts, decay in zip(export.groups, export.decays, strict=True)
    ]
    lr = lr_at(export.source.state["step"], export.source.config.run.steps, optim)
    adamw = torch.optim.AdamW(groups, lr=lr, betas=tuple(optim.betas), eps=optim.eps)
    scalar = partial(hole, 0, torch.float32, torch.Size(()))
    return {
        "state": {
            index: {"step": scalar(), **{kind: hole(size) for kind in MOMENTS}} for index, size in enumerate(sizes)
        },
        "param_groups": adamw.state_dict()["param_groups"],
    }

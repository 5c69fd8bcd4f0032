"""What DeepSpeed (0.19) saves in the files of a ZeRO checkpoint, with holes for the values of tensors."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megasora.formats.allowed_pickle import StoredTensor
from megasora.formats.deepspeed_files import CLIENT_KEY, hole
from megasora.formats.deepspeed_layout import Group, ZeroLayout
from megasora.formats.deepspeed_pickle import FragmentAddress, LossScaler
from megasora.formats.source import ExportSource
from megasora.optim.schedule import lr_at

VERSION = "0.19.0"  # of DeepSpeed, whose format this is
UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}  # that ds_to_universal asks for
MOMENTS = ("exp_avg", "exp_avg_sq")


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


def model_states(export: ZeroExport) -> dict[str, Any]:
    """What DeepSpeed calls the model states, the same on all ranks."""
    step, is_stage_3 = export.source.state["step"], export.stage == 3
    weight = (
        (lambda shape: torch.empty(0, dtype=export.dtype)) if is_stage_3 else (lambda shape: hole(shape, export.dtype))
    )
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
        "single_partition_of_fp32_groups": [hole(torch.Size((count,))) for count in used],
        "group_paddings": [size - count for size, count in zip(layout.partition_sizes, used, strict=True)],
        "partition_count": [layout.processes for _ in layout.groups],
        "ds_version": VERSION,
        "param_slice_mappings": [
            OrderedDict((name, FragmentAddress(piece.count, piece.offset)) for name, piece in pieces.items())
            for pieces in layout.by_rank[rank]
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
        "fp32_flat_groups": [hole(torch.Size((size,))) for size in export.layout.partition_sizes],
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
    scalar = partial(hole, torch.Size(()))
    return {
        "state": {
            index: {"step": scalar(), **{kind: hole(torch.Size((size,))) for kind in MOMENTS}}
            for index, size in enumerate(sizes)
        },
        "param_groups": adamw.state_dict()["param_groups"],
    }


def flat_tensors(export: ZeroExport, states: dict[str, Any], kind: str) -> list[StoredTensor]:
    """A rank's flat tensors of one kind, by group."""
    if kind == "weights":
        return states["fp32_flat_groups" if export.stage == 3 else "single_partition_of_fp32_groups"]
    return [state[kind] for state in base_state(export, states)["state"].values()]


def base_state(export: ZeroExport, states: dict[str, Any]) -> dict[str, Any]:
    """The state_dict of the AdamW that a ZeRO optimizer wraps."""
    return states["optimizer_state_dict" if export.stage == 3 else "base_optimizer_state"]

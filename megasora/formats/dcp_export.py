"""A checkpoint as a folder of torch.distributed.checkpoint (DCP), for programs in plain PyTorch and torchtitan.

    model.<name>                          weights, full, fp32 or bf16
    ema.<name>, ema_0.999.<name>, ...     averages of the weights, fp32                   } of a whole training state,
    optimizer.state.<name>.exp_avg        AdamW's moments, fp32; exp_avg_sq too           } with `everything`
    optimizer.state.<name>.step           number of AdamW's steps, fp32, a scalar         }
    megasora                              text: JSON of step, settings and state          }

Optimizer states have the names of `get_optimizer_state_dict(..., flatten_optimizer_state_dict=True)` of torch, below
`optimizer.`, as torchtitan saves them. Three lines load the weights into `model`:

    state = {"model": model.state_dict()}
    torch.distributed.checkpoint.load(state, checkpoint_id=FOLDER)
    model.load_state_dict(state["model"])

The folder is written by DCP's own planner and writer. The planner gets tensors without values, and `Planner` makes each
value when it is written: the writer keeps the tensors of a file until the file is complete, so files are made of
groups of at most GROUP_BYTES, as if each group came from a rank of its own.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megasora.checkpoint.store import check_room
from megasora.config import to_yaml
from megasora.errors import MegaSoraError, printable
from megasora.formats.safetensors_folder import new_folder, rounded
from megasora.formats.source import ExportSource

GROUP_BYTES = 256 << 20
MODEL, OPTIMIZER, STATE = "model", "optimizer", "megasora"  # sections of a state dict
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_FORMAT, KINDS, CONFIG = 1, "kinds", "config.yaml"  # keys of the JSON text


def export_dcp(
    source: ExportSource,
    out: Path,
    dtype: torch.dtype = torch.float32,
    everything: bool = False,
    prefix: str = f"{MODEL}.",
    on_written: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes the folder `out`, whole or not at all, one tensor at a time.

    Weights of `source.kind` in `dtype`, named `prefix` + name; `everything`: the whole training state, fp32, with the
    names above. Raises MegaSoraError for `everything` in another dtype or prefix, or of a checkpoint without a training
    state, and for weights that are not finite.
    """
    sharded, shapes = source.sharded, source.sharded.shapes
    if everything:
        check_everything(source, dtype, prefix)
        places = {place_of(kind, name): (kind, name) for kind in sorted(sharded.kinds) for name in shapes}
    else:
        kind = sharded.stored_kind(source.kind)
        places = {(prefix.rstrip("."), name): (kind, name) for name in shapes}
    kinds = {dotted(place): value for place, value in places.items()}
    state: dict[str, Any] = {}
    for (section, name), (_, parameter) in places.items():
        place = state.setdefault(section, {}) if section else state
        place[name] = torch.empty(shapes[parameter], dtype=dtype, device="meta")
    if everything:
        state["optimizer"] |= {step_name(name): torch.empty((), device="meta") for name in shapes}
        state[STATE] = state_text(source)

    def value_of(key: str) -> Tensor:
        if key not in kinds:
            return torch.tensor(float(source.state["ema_updates"]))
        kind, name = kinds[key]
        value = rounded(name, sharded.full_tensor(kind, name), dtype)
        on_written(value.nbytes)
        return value

    with new_folder(out) as staging:
        check_room(staging, num_bytes(source, dtype, everything), "the checkpoint for torch.distributed.checkpoint")
        try:
            write_dcp(staging, state, value_of)
        except RuntimeError as error:  # torch.save says so of a full disk
            raise OSError(errno.EIO, f"cannot be written: {printable(str(error), 120)}", str(out)) from None


def place_of(kind: str, name: str) -> tuple[str, str]:
    """Section, and name in it, of a kind of value of a parameter; joined by a dot they are its name in the folder."""
    if kind in MOMENTS:
        return OPTIMIZER, f"state.{name}.{kind}"
    return MODEL if kind == "weights" else kind, name


def step_name(name: str) -> str:
    return f"state.{name}.step"


def dotted(place: tuple[str, str]) -> str:
    return ".".join(filter(None, place))


def state_text(source: ExportSource) -> str:
    kinds, config = sorted(source.sharded.kinds), to_yaml(source.config)
    return json.dumps({"format": STATE_FORMAT, KINDS: kinds, "state": source.state, CONFIG: config})


def check_everything(source: ExportSource, dtype: torch.dtype, prefix: str) -> None:
    if not set(MOMENTS) <= source.sharded.kinds or "ema_updates" not in source.state:
        raise MegaSoraError(
            f"{source.folder} has weights only, no training state; export its weights, or a checkpoint of a training"
        )
    if dtype != torch.float32 or prefix != f"{MODEL}.":
        raise MegaSoraError("--everything exports a training state, always fp32 and named model.NAME; leave that out")


def num_bytes(source: ExportSource, dtype: torch.dtype = torch.float32, everything: bool = False) -> int:
    """What `on_written` adds up to."""
    elements = sum(shape.numel() for shape in source.sharded.shapes.values())
    return elements * dtype.itemsize * (len(source.sharded.kinds) if everything else 1)


class Planner(DefaultSavePlanner):
    """A planner of tensors without values; `value_of(name)` makes them."""

    def __init__(self, value_of: Callable[[str], Tensor]):
        super().__init__()
        self.value_of = value_of

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type is WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self.value_of(write_item.index.fqn)


class Writer(FileSystemWriter):
    """A writer whose folder does not say where, and in which process, it was written."""

    def storage_meta(self) -> None:
        return None


def write_dcp(folder: Path, state: dict[str, Any], value_of: Callable[[str], Tensor]) -> None:
    """Writes a state dict into the existing `folder`. `value_of`: the values of its tensors, by dotted names."""
    planner, writer = Planner(value_of), Writer(folder, overwrite=False)
    planner.set_up_planner(state, is_coordinator=True)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans = [dataclasses.replace(plan, items=items) for items in split_items(plan.items)]
    plans, metadata = planner.create_global_plan(plans)
    plans = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(plan, planner).wait() for plan in plans])


def split_items(items: Iterable[WriteItem]) -> Iterator[list[WriteItem]]:
    """Consecutive items of at most GROUP_BYTES; a larger one is a group of its own."""
    group: list[WriteItem] = []
    size = 0
    for item in items:
        added = item_bytes(item)
        if group and size + added > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += added
    yield group


def item_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else math.prod(data.size) * data.properties.dtype.itemsize

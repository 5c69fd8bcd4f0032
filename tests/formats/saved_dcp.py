"""A small checkpoint with every kind of value, and folders that plain PyTorch saves, for the tests of DCP."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from megasora.checkpoint.full_tensors import save_full_tensors
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import CheckpointStore, read_state
from megasora.config import Config, load
from megasora.formats.source import ExportSource

KINDS = ("weights", "ema", "ema_0.999", "exp_avg", "exp_avg_sq")
SHAPES = {
    "patch_in.weight": torch.Size([6, 4]), "blocks.0.attention.qkv.weight": torch.Size([9, 5]),
    "blocks.0.attention.qkv.bias": torch.Size([9]), "null_text": torch.Size([5]),
}  # fmt: skip
STATE = {"ema_updates": 7, "task": {"cursor": {"epoch": 1}}, "parallel": {}, "guard": {"losses": [0.5]}, "code": "x"}


def value(kind: str, name: str) -> torch.Tensor:
    """Different for each kind and name, and no multiple of a power of two."""
    generator = torch.Generator().manual_seed(KINDS.index(kind) * 100 + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def source_of(folder: Path, kind: str = "weights", kinds: tuple[str, ...] = KINDS, step: int = 8) -> ExportSource:
    """A new checkpoint in `folder`, as an export reads it."""
    state = STATE if "exp_avg" in kinds else {"imported": "x"}
    config = load(None, ["model.width=48", "run.seed=5", f"run.dir={folder}"])
    checkpoint = save_full_tensors(CheckpointStore(folder / "checkpoints"), step, SHAPES, kinds, value, state)
    return ExportSource(checkpoint, config, read_state(checkpoint), ShardedCheckpoint(checkpoint), kind)


def shapes_of(config: Config) -> dict[str, torch.Size]:
    return dict(SHAPES)


class Module(nn.Module):
    """Has the parameters of SHAPES."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        for name in SHAPES:
            module, (*path, last) = self, name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(value("weights", name).to(dtype)))


def save_fsdp(folder: str, dtype: torch.dtype) -> None:
    """On each of 2 ranks: FSDP2 with optimizer states, as torchtitan saves it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = Module(dtype)
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    state = {
        "model": module.state_dict(), "optimizer": get_optimizer_state_dict(module, optimizer, options=flat), "step": 3,
    }  # fmt: skip
    dcp.save(state, checkpoint_id=folder)


def save_tensor_parallel(folder: str, dtype: torch.dtype) -> None:
    """On each of 2 ranks: DTensors sharded along each dim in turn, without a prefix."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    placements = [Shard(0), Shard(1), Replicate(), Shard(0)]
    state = {
        name: distribute_tensor(value("weights", name).to(dtype), mesh, [placement])
        for name, placement in zip(SHAPES, placements, strict=True)
    }
    dcp.save(state, checkpoint_id=folder)
    dist.barrier()

"""Run folders of a few parameters, made by one process, for the tests of `megasora checkpoint VERB`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.checkpoint.full_tensors import save_full_tensors
from megasora.checkpoint.store import CheckpointStore, Retention
from megasora.cli import main
from megasora.config import load, to_yaml

SHAPES = {
    "blocks.0.mlp.up.weight": torch.Size((8, 4)),
    "blocks.1.mlp.up.weight": torch.Size((8, 4)),
    "blocks.1.mlp.up.bias": torch.Size((8,)),
    "null_text": torch.Size((7,)),
    "scale": torch.Size(()),
}
TRAINING = ("weights", "ema", "exp_avg", "exp_avg_sq")


def random_value(kind: str, name: str, step: int) -> Tensor:
    """The values of a kind of a parameter after a step; of its own for each."""
    g = torch.Generator().manual_seed(zlib.crc32(f"{kind}/{name}/{step}".encode()))
    return torch.randn(SHAPES[name], generator=g)


def make_run(
    run: Path,
    steps: Sequence[int] = (10, 20),
    kinds: Sequence[str] = TRAINING,
    value_of: Callable[[str, str, int], Tensor] = random_value,
    state: Callable[[int], dict[str, Any]] = lambda step: {},
) -> Path:
    """A run folder with checkpoints at `steps`."""
    run.mkdir()
    store = CheckpointStore(run / "checkpoints", Retention(keep=1000))
    for step in steps:
        values = {"ema_updates": step, "parallel": {"processes": 4, "tensor": 2}, "code": "0123", **state(step)}
        save_full_tensors(store, step, SHAPES, kinds, lambda kind, name, s=step: value_of(kind, name, s), values)
    (run / "config.yaml").write_text(to_yaml(load(None, [f"run.dir={run}"])))
    return run


def checkpoint(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"

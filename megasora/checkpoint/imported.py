"""A checkpoint at step 0 of weights that no run of MegaSora has trained, to sample from or to start a run from.

It has the fp32 weights only, once: no moments, no average, and state.json has no state of a training, but says where
the weights come from. `run.start=init:` reads it; a training cannot resume it (start.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megasora.checkpoint.safetensors_file import write_tensors
from megasora.checkpoint.store import CheckpointStore

IMPORTED = "imported"  # key of state.json
KIND, FOLDER, METADATA = "weights", "fragments", "fragments"  # as in sharded.py
UNSHARDED = {"shard_dim": None, "num_chunks": 1, "tensor_rank": 0, "tensor_size": 1, "start": 0}


def save_imported(
    store: CheckpointStore,
    shapes: Mapping[str, torch.Size],
    value_of: Callable[[str], Tensor],
    source: str,
    on_written: Callable[[int], None] = lambda size: None,
) -> Path:
    """Writes the checkpoint atomically, one tensor at a time, and returns its folder. `shapes`: of all parameters.

    `value_of(name)`: the full parameter, fp32. `source`: what the weights are, for state.json. `on_written(bytes)` is
    called after each tensor.
    """
    folder = store.begin(0) / FOLDER
    folder.mkdir()
    metadata = {name: {"shape": list(shape), **UNSHARDED} for name, shape in shapes.items()}
    flat = {f"{KIND}/{name}": torch.Size((shape.numel(),)) for name, shape in shapes.items()}
    write_tensors(
        folder / "rank-00000.safetensors",
        flat,
        lambda key: value_of(key.removeprefix(f"{KIND}/")).reshape(-1),
        {METADATA: json.dumps(metadata)},
        on_written,
    )
    store.write_state(0, {IMPORTED: source})
    return store.commit(0)

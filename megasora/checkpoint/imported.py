"""A checkpoint at step 0 of weights that no run of MegaSora has trained, to sample from or to start a run from.

It has the fp32 weights only, once: no moments, no average, and state.json has no state of a training, but says where
the weights come from. `run.start=init:` reads it; a training cannot resume it (start.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megasora.checkpoint.full_tensors import save_full_tensors
from megasora.checkpoint.store import CheckpointStore

IMPORTED, KIND = "imported", "weights"  # key of state.json; what is saved


def save_imported(
    store: CheckpointStore,
    shapes: Mapping[str, torch.Size],
    value_of: Callable[[str], Tensor],
    source: str,
    on_written: Callable[[int], None] = lambda size: None,
) -> Path:
    """Writes the checkpoint atomically, one tensor at a time, and returns its folder. `shapes`: of all parameters.

    `value_of(name)`: the full parameter, fp32. `source`: what the weights are, for state.json. `on_written(bytes)` is
    called after each write.
    """
    return save_full_tensors(store, 0, shapes, (KIND,), lambda _, name: value_of(name), {IMPORTED: source}, on_written)

"""Stands for the module `pickle` in torch.save: writes objects of DeepSpeed's classes where DeepSpeed is not imported.

`torch.save(values, path, pickle_module=deepspeed_pickle)` writes an object of a class below under the name of the
class of DeepSpeed (0.19) that it stands for.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

CLASSES: dict[type, tuple[str, str]] = {}  # class -> module and name in DeepSpeed


@dataclass
class LossScaler:
    """Multiplies the loss by `cur_scale`; needed in stage 3, though only fp16 has another scale than 1."""

    cur_scale: float = 1.0
    dynamic: bool = False


@dataclass
class FragmentAddress:
    """Where the elements of a parameter are in a rank's flat tensor."""

    numel: int
    start: int


CLASSES[LossScaler] = ("deepspeed.runtime.fp16.loss_scaler", "LossScaler")
CLASSES[FragmentAddress] = ("deepspeed.utils.tensor_fragment", "fragment_address")


class Pickler(pickle._Pickler):
    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj not in CLASSES:
            super().save_global(obj, name)
            return
        module, own_name = CLASSES[obj]
        self.write(pickle.GLOBAL + f"{module}\n{own_name}\n".encode())
        self.memoize(obj)

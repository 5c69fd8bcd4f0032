"""Names of the files of a ZeRO checkpoint of DeepSpeed, and files of torch.save that are written in any order.

    FOLDER/latest                                                     the tag of the newest checkpoint
    FOLDER/TAG/mp_rank_00_model_states.pt                             stages 1, 2: weights, counts, client_state
    FOLDER/TAG/zero_pp_rank_R_mp_rank_00_model_states.pt              stage 3: the same for rank R, without the weights
    FOLDER/TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt       rank R: fp32 weights and moments, flat

`write_skeleton` writes a file with holes where `hole` tensors are, `fill` their elements: memory holds what is filled.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megasora.files import open_regular
from megasora.formats import deepspeed_pickle
from megasora.formats.allowed_pickle import TENSORS, StoredTensor, load_torch, record

LATEST = "latest"
CLIENT_KEY = "megasora"  # of client_state: state.json of a checkpoint of MegaSora


def tensor_with_attributes(rebuild: Any, kind: Any, arguments: Any, attributes: Any) -> Any:
    """As torch._tensor._rebuild_from_type_v2: stage 3 has set attributes of its flat tensors; they are not needed."""
    if rebuild is not TENSORS["torch._utils._rebuild_tensor_v2"]:
        raise ValueError(f"a tensor made by {rebuild}")
    return rebuild(*arguments)


ALLOWED = {  # what the files may hold
    **TENSORS,
    "torch._tensor._rebuild_from_type_v2": tensor_with_attributes,
    "torch.Tensor": "torch.Tensor",
    "builtins.set": set,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    **{
        name: record(name)
        for name in (
            "deepspeed.runtime.fp16.loss_scaler.LossScaler",
            "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
            "deepspeed.utils.tensor_fragment.fragment_address",
            "argparse.Namespace",
        )
    },
}


def model_file(stage: int, rank: int) -> str:
    return f"{f'zero_pp_rank_{rank}_' if stage == 3 else ''}mp_rank_00_model_states.pt"


def optimizer_file(is_bf16: bool, rank: int) -> str:
    return f"{'bf16_' if is_bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def read_torch_file(path: Path) -> Any:
    """The object in a file of torch.save, with StoredTensors; runs nothing that it holds. Raises MegaSoraError."""
    with open_regular(path) as file:
        return load_torch(file, path, ALLOWED)


def write_skeleton(path: Path, values: Any) -> Any:
    """Writes the file, and returns its object with a StoredTensor for each tensor, to `fill`. The tensors of `values`
    are made by `hole`; their elements are 0 until they are filled."""
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(values, path, pickle_module=deepspeed_pickle)
    return read_torch_file(path)


def hole(shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory for `write_skeleton`."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype)


def fill(tensor: StoredTensor, values: Tensor, start: int = 0) -> None:
    """Writes `values` to the elements of the flattened tensor from `start` on. Raises OSError with the file."""
    data = memoryview(values.detach().to(tensor.dtype).contiguous().view(-1).view(torch.uint8).numpy())
    first = (tensor.start + start) * tensor.dtype.itemsize
    assert first + len(data) <= tensor.length, f"{first} to {first + len(data)} of {tensor.length} bytes"
    with open(tensor.path, "r+b", buffering=0) as file:
        file.seek(tensor.offset + first)
        while data:
            data = data[file.write(data) :]


def sync_files(folder: Path) -> None:
    """Flushes the files of a folder, and the folder itself, to the disk."""
    for path in [*sorted(folder.iterdir()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""Counts where the host would wait for a GPU, without a GPU: tensors on the device `meta` stand for those on one.

    with HostWaits() as found:
        model(batch).sum().backward()  # all on meta
    assert not found.waits and not found.copies

A tensor on `meta` has a shape and no values, so whatever needs a value on the host is an operation of its own in
PyTorch's dispatcher: a number (`item`, `int`, `bool`), a copy to the CPU, the indices of a mask. There is a stand-in
for the result, where one is needed to go on. Copies from the host are counted, too: of pageable memory, they wait.
What the CUDA implementation of an operation waits for inside is not seen: that needs a GPU and
`torch.cuda.set_sync_debug_mode`.
"""

from __future__ import annotations

import traceback
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
NEED_VALUES = (aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount)
INDEXING = (aten.index, aten.index_put, aten.index_put_)
FROM_NUMBERS = (torch.tensor, torch.as_tensor)  # copy numbers of Python to a device


class Found(NamedTuple):
    operation: str
    line: str  # file:line of the caller, outside of PyTorch


class HostWaits(TorchDispatchMode):
    """`waits`: operations that need values of the device on the host. `copies`: those that read memory of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Found] = []
        self.copies: list[Found] = []
        self.operations = 0  # on tensors of the device
        self.numbers = NumbersToDevice(self)

    def __enter__(self) -> HostWaits:
        self.numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.numbers.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_on_device = [x.is_meta for x in tensors]
        self.operations += any(is_on_device)
        packet = func.overloadpacket
        if packet in (aten._to_copy, aten.copy_):
            source = tensors[-1]
            target = tensors[0].device if packet is aten.copy_ else torch.device(kwargs.get("device") or source.device)
            if source.is_meta and target.type == "cpu":
                self.waits.append(self.found(func))
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            if target.type == "meta" and not source.is_meta:
                self.copies.append(self.found(func))
        elif any(is_on_device):
            if packet is aten._local_scalar_dense:
                self.waits.append(self.found(func))
                return torch.ones((), dtype=tensors[0].dtype).item()
            if packet in NEED_VALUES or func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
                self.waits.append(self.found(func))
            if packet in INDEXING and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1]):
                self.waits.append(self.found(func))
            if any(x.ndim > 0 and not x.is_meta for x in tensors):  # scalars are passed as numbers
                self.copies.append(self.found(func))
        return func(*args, **kwargs)

    def found(self, operation: Any) -> Found:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        return Found(str(operation), f"{frames[-1].filename}:{frames[-1].lineno}")


class NumbersToDevice(TorchFunctionMode):
    """Finds tensors that are made of numbers on the device: a copy that the dispatcher does not see on `meta`."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in FROM_NUMBERS and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            self.waits.copies.append(self.waits.found(func.__name__))
        return func(*args, **kwargs)

"""Counts the bytes that operations of kernels/ load and store, without a GPU.

    with MemoryTraffic() as traffic:
        y = adaln_modulate(x, shift, scale, rows, 1e-6, backend="triton")
    traffic.bytes                                  total
    traffic.by_argument["forward_kernel.x_LD"]     of one argument of one kernel

Triton's interpreter runs a kernel program by program, and all loads and stores pass through a few of its functions.
Masked lanes do not count; an address that several lanes access at once counts once. PyTorch operators around the
kernels count with the bytes of their inputs and outputs; views and empty tensors are free. Bytes depend on the dtype:
use bf16 tensors, on which the interpreter is inaccurate but accesses the same elements.

No cache is modelled: a GPU may read again from its cache, so these bytes are an upper bound.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

NAMESPACE = "megasora"  # of the operators that launch kernels
ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
OVERWRITE = ("copy_", "fill_", "zero_")  # do not read the tensor that they write


class MemoryTraffic:
    """Context manager that counts. Kernels must be interpreted: TRITON_INTERPRET=1, see kernels/launch.py."""

    def __init__(self) -> None:
        self.by_argument: Counter[str] = Counter()  # bytes, by kernel and argument, or by PyTorch operator
        self.kernel: str | None = None  # that is running
        self.spans: dict[str, tuple[int, int]] = {}  # first and last address of its arguments
        self.stack = ExitStack()

    @property
    def bytes(self) -> int:
        return self.by_argument.total()

    def __enter__(self) -> MemoryTraffic:
        for owner, name, replacement in (
            (GridExecutor, "__call__", self.launch),
            (InterpreterBuilder, "create_masked_load", self.load),
            (InterpreterBuilder, "create_masked_store", self.store),
            (InterpreterBuilder, "create_atomic_rmw", self.atomic),
        ):
            method = wrap(getattr(owner, name), replacement)
            self.stack.enter_context(mock.patch.object(owner, name, method))
        self.stack.enter_context(Operators(self))
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def launch(self, original: Callable, executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        arguments = [*zip(executor.arg_names, args, strict=False), *kwargs.items()]
        self.spans = {name: span(x) for name, x in arguments if isinstance(x, Tensor)}
        self.kernel = inspect.unwrap(executor.fn).__name__
        try:
            original(executor, *args, **kwargs)
        finally:
            self.kernel = None

    def load(self, original: Callable, builder: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        self.count(ptrs, mask)
        return original(builder, ptrs, mask, *rest, **named)

    def store(self, original: Callable, builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        self.count(ptrs, mask)
        return original(builder, ptrs, value, mask, *rest)

    def atomic(self, original: Callable, builder: Any, op: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        self.count(ptrs, mask, times=2)  # read and written
        return original(builder, op, ptrs, value, mask, *rest)

    def count(self, ptrs: Any, mask: Any, times: int = 1) -> None:
        addresses = np.sort(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)])
        if not len(addresses):
            return
        candidates = [(low, name) for name, (low, high) in self.spans.items() if low <= int(addresses[0]) <= high]
        argument = f"{self.kernel}.{max(candidates)[1] if candidates else '?'}"
        distinct = 1 + int(np.count_nonzero(np.diff(addresses)))
        self.by_argument[argument] += times * distinct * ptrs.get_element_ty().primitive_bitwidth // 8


class Operators(TorchDispatchMode):
    """Counts the inputs and outputs of PyTorch operators; traces into operators of NAMESPACE."""

    def __init__(self, traffic: MemoryTraffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        schema, kwargs = func._schema, kwargs or {}
        if func.namespace == NAMESPACE:
            with self:  # run its body: operators that it calls count
                return OPDEFS[schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        name = schema.name.partition("::")[2]
        if self.traffic.kernel is not None or name in ALLOCATE:  # the interpreter inspects arguments by operators
            return result
        arguments = {a.name: x for a, x in zip(schema.arguments, args, strict=False)} | kwargs
        changed = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if changed:
            written = tensors([arguments[key] for key in changed])
            read = tensors([x for key, x in arguments.items() if key not in changed or name not in OVERWRITE])
        else:
            storages = {x.untyped_storage().data_ptr() for x in tensors(arguments)}
            written = [x for x in tensors(result) if x.untyped_storage().data_ptr() not in storages]
            read = tensors(arguments)
        if written:
            self.traffic.by_argument[f"aten.{name}"] += sum(map(bytes_of, [*read, *written]))
        return result


def wrap(original: Callable, replacement: Callable) -> Callable:
    """A method that calls `replacement(original, *args, **kwargs)`."""
    return lambda *args, **kwargs: replacement(original, *args, **kwargs)


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def bytes_of(x: Tensor) -> int:
    """Bytes of a tensor's elements in memory; expanded dims, of stride 0, count once."""
    elements = math.prod(size if stride else min(size, 1) for size, stride in zip(x.shape, x.stride(), strict=True))
    return elements * x.element_size()


def span(x: Tensor) -> tuple[int, int]:
    """Addresses of the first and the last byte."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size() - 1

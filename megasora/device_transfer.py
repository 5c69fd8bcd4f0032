"""Moves an object with many tensors from the CPU to a GPU in one copy, which overlaps with what the GPU computes.

    threads of the loader                 side stream                       stream of the training
    tensors --pack--> pinned buffer  --copy-->  buffer on the GPU, event  --wait-->  views of the buffer

Each copy of pageable memory makes the host wait until the GPU has done all that was queued before. So all that a step
needs from the CPU is in pinned memory when the step begins. PyTorch's allocator of pinned memory reuses a buffer only
when the copies from it are done.

Objects are dataclasses, tuples, lists and dicts of tensors, nested in any way. A tensor in several places is copied
once. A `torch.device` in them says where the tensors beside it are, and becomes the new device.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
ON_CPU = {"on_cpu": True}  # metadata of a dataclass field whose tensors stay on the CPU
ALIGNMENT = 256  # bytes: where a tensor in a buffer may begin; kernels load 16 at once


def map_tensors(value: T, change: Callable[[Tensor], Tensor], device: torch.device) -> T:
    """A copy of `value` with `change(x)` for each tensor x, and `device` for each torch.device; without fields with the
    metadata ON_CPU, which stay as they are. Values that a dataclass caches (`cached_property`) are changed, too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, torch.device):
        return device
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        stays = {field.name for field in dataclasses.fields(value) if field.metadata.get("on_cpu")}
        result = copy.copy(value)
        for name, entry in vars(value).items():
            if name not in stays:
                vars(result)[name] = map_tensors(entry, change, device)
        return result
    if isinstance(value, dict):
        return {key: map_tensors(entry, change, device) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        entries = [map_tensors(entry, change, device) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def to_device(value: T, device: torch.device | str) -> T:
    """`value` with each tensor on `device`, copied by itself."""
    return map_tensors(value, lambda x: x.to(device, non_blocking=True), torch.device(device))


class Packed(Generic[T]):
    """An object on the CPU whose tensors are views of one buffer."""

    def __init__(self, value: T, host: Tensor | None = None, starts: dict[int, int] | None = None):
        """`starts`: first byte of each tensor of `value` in `host`, by id. `host` None: the tensors are anywhere."""
        self.value, self.host, self.starts = value, host, starts or {}


class Transferred(Generic[T]):
    """An object on its way to a GPU."""

    def __init__(self, value: T, buffer: Tensor | None = None, copied: torch.cuda.Event | None = None):
        self.value, self.buffer, self.copied = value, buffer, copied

    def wait(self) -> T:
        """The object, for use on the current stream, which waits for the copy; the host does not."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.buffer.device)
            stream.wait_event(self.copied)
            self.buffer.record_stream(stream)  # its memory is reused after what is queued there by then
        return self.value


class DeviceTransfer:
    """Copies objects to `device`, on a GPU in a stream of its own. On a CPU it leaves them as they are."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.copies = self.device.type != "cpu"
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def pack(self, value: T) -> Packed[T]:
        """`value` with all its tensors that are on the CPU in one buffer, pinned for a GPU. For any thread."""
        if not self.copies:
            return Packed(value)
        places: dict[int, tuple[Tensor, int]] = {}  # by id, with the tensor, so that the id stays its own
        size = 0

        def place(x: Tensor) -> Tensor:
            nonlocal size
            if x.device.type == "cpu" and id(x) not in places:
                places[id(x)] = x, size
                size += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
            return x

        map_tensors(value, place, torch.device("cpu"))
        with torch.cuda.device(self.device) if self.stream is not None else nullcontext():
            host = torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        views = {key: view_in(host, start, x).copy_(x) for key, (x, start) in places.items()}
        starts = {id(views[key]): start for key, (_, start) in places.items()}
        return Packed(map_tensors(value, lambda x: views.get(id(x), x), torch.device("cpu")), host, starts)

    def __call__(self, packed: Packed[T]) -> Transferred[T]:
        """Starts to copy what `pack` returned."""
        if packed.host is None:
            return Transferred(packed.value)
        buffer, copied = self.copy(packed.host)

        def moved(x: Tensor) -> Tensor:
            return view_in(buffer, packed.starts[id(x)], x) if id(x) in packed.starts else x

        return Transferred(map_tensors(packed.value, moved, self.device), buffer, copied)

    def copy(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy on the device, and the event of its end."""
        if self.stream is None:
            return host.to(self.device, copy=True), None
        with torch.cuda.stream(self.stream):
            return host.to(self.device, non_blocking=True), self.stream.record_event()


def view_in(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes of `buffer` [n] from `start` on as a contiguous tensor with the shape and dtype of `like`."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)

"""Reads pickles, and files of torch.save, of other programs without running what they hold.

A pickle may name any function of Python and call it. Here each name is looked up in a table that the caller gives; a
name that is not in it is an error that says the name, and nothing is imported. Tables hold types of data only:

    DTYPES, TENSORS       what torch.save writes of dtypes, sizes and tensors
    record("a.b.Name")    for objects of a class: a Record with the values, without the class

    load_pickle(file, path, allowed)        the object in a stream
    load_torch(file, path, allowed, span)   the object in an archive of torch.save; its tensors are StoredTensors, read
                                            from the file when `read` is called, so that memory holds one of them

The unpickler is that of the standard library in Python: its memo is a dict, where that in C makes an array as long as
the largest index that a file names.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megasora.errors import MegaSoraError, printable

MAX_PICKLE_BYTES = 1 << 30
MAX_TEXT = 120  # letters of a name in a message
LOCAL_HEADER = 30  # bytes before the name in a zip archive
PARSE_ERRORS = (
    pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, ValueError, TypeError, KeyError, IndexError,
    AttributeError, AssertionError, OverflowError, MemoryError, RecursionError, NotImplementedError, RuntimeError,
)  # fmt: skip

STORAGES = {  # class of a storage -> dtype
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip


class RefusedName(Exception):
    """A name that is not in the table."""


class Record:
    """An object of a class that is not imported: `args`, with which it was made, and `state`, what was saved of it."""

    def __new__(cls, *args: Any) -> Record:
        new = super().__new__(cls)
        new.args, new.state = args, None
        return new

    def __getitem__(self, name: str) -> Any:
        """A field of the object. Raises KeyError without one."""
        return dict(self.state or {})[name]

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.state or {}).get(name, default)


def record(name: str) -> type[Record]:
    """A new class of records, for objects of the class `name`."""
    return type(name.rpartition(".")[2], (Record,), {})


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file of torch.save, which has not been read."""

    path: Path
    offset: int  # in the file, of its storage
    length: int  # bytes of its storage
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    start: int  # element of the storage

    def read(self) -> Tensor:
        """The values, in their own dtype, contiguous. Raises OSError with the file."""
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if self.shape.numel() else 0
        values = self.read_elements(self.start, span)
        return values.as_strided(self.shape, self.stride).contiguous()

    def read_elements(self, start: int, count: int) -> Tensor:
        """Elements `start .. start + count - 1` of the storage, flat; reads only their bytes."""
        size = self.dtype.itemsize
        if not 0 <= start <= start + count <= self.length // size:
            raise ValueError(f"elements {start} to {start + count} of a storage of {self.length // size}")
        data = bytearray(count * size)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * size)
            read_into(file, memoryview(data))
        return torch.frombuffer(data, dtype=self.dtype) if count else torch.empty(0, dtype=self.dtype)


def read_into(file: BinaryIO, data: memoryview) -> None:
    """Fills `data`. Raises OSError if the file ends before."""
    while data:
        count = file.readinto(data)
        if not count:
            raise OSError(f"{file.name} ends too early")
        data = data[count:]


def size_of(values: Any = ()) -> torch.Size:
    """Raises ValueError unless these are the sides of a shape that torch can have."""
    sizes = tuple(values)
    if not all(type(size) is int and 0 <= size for size in sizes) or math.prod(max(size, 1) for size in sizes) >> 62:
        raise ValueError(f"a shape {sizes}")
    return torch.Size(sizes)


@dataclass(frozen=True)
class StorageClass:
    """Stands for torch.FloatStorage and the like."""

    dtype: torch.dtype


def parameter_of(data: Any, requires_grad: bool = True, hooks: Any = None) -> Any:
    return data


def tensor_of(storage: StoredTensor, start: int, shape: Any, stride: Any, *unused: Any) -> StoredTensor:
    """As torch._utils._rebuild_tensor_v2. Raises ValueError unless all elements are within the storage."""
    shape, stride = size_of(shape), tuple(stride)
    numbers = (start, *shape, *stride)
    if len(shape) != len(stride) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError(f"a tensor of shape {shape} and stride {stride}")
    last = start + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if shape.numel() and (last + 1) * storage.dtype.itemsize > storage.length:
        raise ValueError(f"a tensor of shape {list(shape)} in a storage of {storage.length} bytes")
    if shape.numel() * storage.dtype.itemsize > storage.length:  # stride 0: a small file, a large tensor
        raise ValueError(f"a tensor of shape {list(shape)} in a storage of {storage.length} bytes")
    return StoredTensor(storage.path, storage.offset, storage.length, storage.dtype, shape, stride, start)


DTYPES: dict[str, Any] = {
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    "torch.Size": size_of,
    "torch.strided": "strided",
    "torch.serialization._get_layout": str,
}
TENSORS: dict[str, Any] = {
    **DTYPES,
    **{f"torch.{name}Storage": StorageClass(dtype) for name, dtype in STORAGES.items()},
    "torch._utils._rebuild_tensor_v2": tensor_of,
    "torch._utils._rebuild_parameter": parameter_of,
    "collections.OrderedDict": collections.OrderedDict,
}


class AllowedUnpickler(pickle._Unpickler):
    """`allowed`: what each dotted name stands for. `persistent_load(key)`: the object of a persistent id."""

    def __init__(self, file: BinaryIO, allowed: Mapping[str, Any], persistent_load: Callable[[Any], Any] | None = None):
        super().__init__(file)
        self.allowed = allowed
        if persistent_load is not None:
            self.persistent_load = persistent_load

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self.allowed:
            raise RefusedName(full)
        return self.allowed[full]

    def get_extension(self, code: int) -> None:
        raise RefusedName(f"the registered extension {code}")

    def load_build(self) -> None:
        """Sets the state of a record; that of other objects could change the functions and classes of the table."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], collections.OrderedDict):  # of a state_dict: its versions
            raise pickle.UnpicklingError(f"a state of a {type(self.stack[-1]).__name__}")

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


def load_pickle(
    file: BinaryIO,
    path: Path,
    allowed: Mapping[str, Any],
    persistent_load: Callable[[Any], Any] | None = None,
    max_bytes: int = MAX_PICKLE_BYTES,
) -> Any:
    """The object that is pickled in `file`, from its position on. `path`: for messages.

    Raises MegaSoraError that names what the pickle holds and `allowed` has not, or says that it is no pickle.
    """
    try:
        data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ValueError(f"more than {max_bytes} bytes")
        return AllowedUnpickler(io.BytesIO(data), allowed, persistent_load).load()
    except RefusedName as error:
        raise MegaSoraError(
            f"{path} holds {printable(str(error), MAX_TEXT)}, which is not loaded: a pickle may run any code; use "
            "files of a source that you trust, with tensors and plain values only"
        ) from None
    except PARSE_ERRORS as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: BaseException) -> MegaSoraError:
    text = str(error) if isinstance(error, OSError | ValueError | zipfile.BadZipFile) else ""
    return MegaSoraError(
        f"{path} cannot be read: {printable(text or f'damaged data ({type(error).__name__})', MAX_TEXT)}; copy or save "
        "it again"
    )


class Span(io.RawIOBase):
    """Bytes `start .. start + length - 1` of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.position)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.position)])
        self.position += count
        return count


def load_torch(
    file: BinaryIO, path: Path, allowed: Mapping[str, Any] = TENSORS, span: tuple[int, int] | None = None
) -> Any:
    """The object of an archive that torch.save wrote, with StoredTensors for tensors.

    `file`: `path`, opened unbuffered. `span`: first byte and length of the archive; None: the whole file. Raises
    MegaSoraError, see `load_pickle`, also for the format of torch before 1.6, which is no archive.
    """
    try:
        start, length = span or (0, file.seek(0, io.SEEK_END))
        if not 0 <= start <= start + length <= file.seek(0, io.SEEK_END):
            raise ValueError(f"it has no bytes {start} to {start + length}")
        with zipfile.ZipFile(io.BufferedReader(Span(file, start, length))) as archive:
            entries = {re.sub(r"^[^/]*/", "", entry.filename): entry for entry in archive.infolist()}
            if "byteorder" in entries and archive.open(entries["byteorder"]).read(16) != b"little":
                raise ValueError("it is not little-endian")

            def storage(key: Any) -> StoredTensor:
                kind, storage_class, name, _, count = key
                if kind != "storage" or not isinstance(storage_class, StorageClass):
                    raise ValueError(f"a {kind} of another kind")
                offset, size = stored_bytes(file, start, entries[f"data/{name}"])
                if count * storage_class.dtype.itemsize != size:
                    raise ValueError(f"a storage of {size} bytes for {count} elements")
                return StoredTensor(path, offset, size, storage_class.dtype, torch.Size((count,)), (1,), 0)

            if entries["data.pkl"].file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"a pickle of {entries['data.pkl'].file_size} bytes")
            with archive.open(entries["data.pkl"]) as pickled:
                return load_pickle(pickled, path, allowed, storage)
    except PARSE_ERRORS as error:
        raise unreadable(path, error) from None


def stored_bytes(file: BinaryIO, start: int, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """First byte in the file, and number, of the bytes of an entry. Raises ValueError if it is compressed."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed")
    header = bytearray(LOCAL_HEADER)
    file.seek(start + entry.header_offset)
    read_into(file, memoryview(header))
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return start + entry.header_offset + LOCAL_HEADER + name + extra, entry.file_size

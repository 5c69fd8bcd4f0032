"""Which implementation computes the attention of a pack: what each supports, and the choice of "auto".

See attention.py. `SUPPORT` has the limits of the GPU libraries, by order of sums; `ORDER` the order in which "auto"
tries them, by chip. Two properties of a pack change it, as measured on an H100 (benchmarks/README.md):

    few keys        cross-attention to short captions has too few programs for the Hopper kernels; the backward of
                    FlashAttention-2, whose queries are cut (varlen_calls.py), is faster
    many lengths    cuDNN makes one call for each length, and an execution plan for each that is new

Memory-efficient attention with padding, and the equations, are several times slower than these. "auto" takes them where
no library supports the inputs; `notice` then says why, and what to change.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from megasora.kernels.attention_varlen import (
    FLASH2,
    FLASH3,
    FLASH4,
    import_error,
    num_processors,
    version_error,
)
from megasora.kernels.segments import Segments
from megasora.kernels.varlen_calls import KEY_BLOCK

BACKENDS = ("flash4", "flash3", "cudnn", "flash2", "varlen", "sdpa", "math")


class Support(NamedTuple):
    """Limits of a library for 16 bit on GPUs of compute capability 8.0 and later."""

    chips: tuple[int, ...]  # major compute capabilities; empty: all
    head_dim: int  # the largest; multiples of 8 only
    ordered_head_dim: int  # the largest with a deterministic backward pass; 0: it has none


SUPPORT = {
    "flash4": Support((9, 10), 128, 128),
    "flash3": Support((9,), 256, 192),
    "cudnn": Support((), 128, 0),
    "flash2": Support((), 256, 256),
    "varlen": Support((), 256, 256),
}
ORDER = {9: ("flash4", "flash3", "cudnn", "flash2", "varlen"), 10: ("flash4", "cudnn", "flash2", "varlen")}
ORDER_OF_OTHERS = ("flash2", "varlen")  # before and after Hopper and Blackwell, cuDNN is not faster
FLASH_ATTENTION_2 = ("flash2", "varlen")
SLOW = ("sdpa", "math")  # on GPUs

MAX_CUDNN_LENGTHS = 4  # of a pack
CUDNN_VERSION = 90100  # 9.1
INSTALL_FLASH4 = "pip install --pre flash-attn-4"


@functools.cache
def obstacle(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool = True
) -> str | None:
    """Why `backend` does not support such queries; None if it does."""
    if backend == "math" or (backend == "sdpa" and device.type == "cpu"):
        return None
    if device.type != "cuda":
        return f"it has no kernel for device {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
    if head_dim % 8:
        return f"head dim {head_dim} must be a multiple of 8"
    if backend == "sdpa":
        return "it takes no float64" if dtype == torch.float64 else None
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes bfloat16 and float16, not {dtype}"
    chips, largest, ordered = SUPPORT[backend]
    if deterministic and not ordered:
        return "its backward pass has no fixed order of sums; it needs model.deterministic=false"
    if chips and capability[0] not in chips:
        return (
            f"it needs compute capability {' or '.join(map(str, chips))}, {device} has {'.'.join(map(str, capability))}"
        )
    if head_dim > (ordered if deterministic else largest):
        order = " with a deterministic backward pass" if deterministic and head_dim <= largest else ""
        return f"it takes head dims up to {ordered if deterministic else largest}{order}, not {head_dim}"
    return missing(backend)


def missing(backend: str) -> str | None:
    """Why the library of `backend` cannot be used here; None if it can."""
    if backend == "cudnn":
        version = torch.backends.cudnn.version() or 0
        return None if version >= CUDNN_VERSION else f"cuDNN is {version}, it needs {CUDNN_VERSION} or newer"
    if backend == "flash2":
        return import_error(FLASH2) or version_error("flash_attn", (2, 7))
    modules = {"flash4": FLASH4, "flash3": FLASH3}
    return import_error(modules[backend]) if backend in modules else None


@functools.cache
def candidates(device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool = True) -> tuple[str, ...]:
    """The backends that "auto" can take for such queries, in the order of their speed for one long clip."""
    order = ORDER_OF_OTHERS
    if device.type == "cuda":
        order = ORDER.get(torch.cuda.get_device_capability(device)[0], order)
    return tuple(name for name in (*order, *SLOW) if obstacle(name, device, dtype, head_dim, deterministic) is None)


def auto_backend(q: Tensor, segments: Segments | None = None, deterministic: bool = True) -> str:
    """The choice of "auto" for queries like `q` [L, N, K]. `segments`: None for one long clip."""
    names = candidates(q.device, q.dtype, q.shape[-1], deterministic)
    if segments is None or names[0] in (*FLASH_ATTENTION_2, *SLOW):
        return names[0]
    key = "auto", names, q.shape[1]
    if key not in segments.plans:
        segments.plans[key] = choose(names, segments, q.shape[1], num_processors(q.device))
    return segments.plans[key]


def choose(names: tuple[str, ...], segments: Segments, heads: int, processors: int) -> str:
    """One of `names`, in this order, for a pack. `processors`: multiprocessors of the GPU."""
    lengths = {(segments.queries[g][1], segments.keys[g][1]) for g in segments.nonempty}
    programs = heads * sum(math.ceil(segments.keys[g][1] / KEY_BLOCK) for g in segments.nonempty)
    if 2 * programs <= processors:
        names = tuple(name for name in names if name in FLASH_ATTENTION_2) or names
    if len(lengths) > MAX_CUDNN_LENGTHS:
        names = tuple(name for name in names if name != "cudnn")
    return names[0]


def resolve_attention_backend(
    backend: str, q: Tensor, segments: Segments | None = None, deterministic: bool = True
) -> str:
    """One of BACKENDS: `backend`, or the choice of "auto". ValueError if it is unknown or does not support `q`."""
    if backend == "auto":
        return auto_backend(q, segments, deterministic)
    check_backend(backend, q.device, q.dtype, q.shape[-1], deterministic)
    return backend


def check_backend(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool = True
) -> None:
    """ValueError if `backend` is not one of BACKENDS, or does not support such queries."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be auto or one of {', '.join(BACKENDS)}")
    reason = obstacle(backend, device, dtype, head_dim, deterministic)
    if reason is not None:
        other = candidates(device, dtype, head_dim, deterministic)[0]
        raise ValueError(f"backend={backend!r} cannot compute this: {reason}; use {other!r} or 'auto'")


def notice(device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool = True) -> str:
    """A sentence on what makes the attention of "auto" slower than it could be on this GPU, and the remedy; empty if
    nothing does, or on other devices."""
    if device.type != "cuda":
        return ""
    name = candidates(device, dtype, head_dim, deterministic)[0]
    reason = obstacle("varlen", device, dtype, head_dim, deterministic)
    if name in SLOW:
        kind = "PyTorch's memory-efficient attention with padding" if name == "sdpa" else "plain matrix products"
        return (
            f"attention runs as {kind}, several times slower than FlashAttention: {reason}; {remedy(dtype, head_dim)}"
        )
    if obstacle("flash4", device, dtype, head_dim, deterministic) != import_error(FLASH4) or name in (
        "flash4",
        "flash3",
    ):
        return ""  # it could not be used if it were installed, or would not be faster
    if name == "cudnn":
        return (
            f"attention runs by cuDNN for packs of up to {MAX_CUDNN_LENGTHS} clip lengths, and by FlashAttention-2, "
            f"half as fast, for others; {INSTALL_FLASH4} is fast for all"
        )
    return f"attention runs by FlashAttention-2 ({name}), at half the speed of FlashAttention-4; {INSTALL_FLASH4}"


def remedy(dtype: torch.dtype, head_dim: int) -> str:
    if dtype not in (torch.float16, torch.bfloat16):
        return "use run.dtype=bfloat16, or another GPU"
    return f"change model.heads so that model.width / model.heads={head_dim} is a multiple of 8 and at most 256"


def selection(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool = True
) -> tuple[str, str]:
    """(the backend that a run with `backend` uses for one long clip, the `notice` if "auto" chose it). ValueError as of
    `check_backend`."""
    queries = device, dtype, head_dim, deterministic
    if backend == "auto":
        return candidates(*queries)[0], notice(*queries)
    check_backend(backend, *queries)
    return backend, ""

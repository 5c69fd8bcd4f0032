"""Backend selection (Triton or PyTorch) and Triton launch parameters, shared by all kernels.

Every operation takes `backend`: "triton", "torch" (the same maths in PyTorch, on any device), or "auto": Triton on a
CUDA device, PyTorch on other devices and for float64. On a CPU, Triton kernels run in Triton's interpreter, which is
enabled by TRITON_INTERPRET=1 in the environment when Triton is imported.

The launch configuration of a kernel is a table in its file, indexed by GPU architecture. Nothing is tuned by timing at
run time: ranks could choose differently, and would then sum in different orders.

Operators that launch kernels are registered with torch.library, so that torch.compile and meta tensors know them. Its
dispatcher costs more CPU time than all else in a launch; `call` goes around it where nobody looks.

The autograd Functions of the kernels return detached outputs: torch.compile of PyTorch 2.11 gives zeros for the
gradient of an output that was last returned by an in-place operation or by a `.to` that converts nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.nn import Parameter

INTERPRETED = triton.knobs.runtime.interpret  # read once, where Triton reads it
BACKENDS = ("auto", "triton", "torch")
PLAIN = Tensor, Parameter  # types of tensors, not of their subclasses


# Arguments that differ between packs: numbers of tokens, vectors and rows; indices of row tiles, of any alignment.
PACK_SIZES = ("R", "REAL", "L", "M", "COUNT", "GROUPS", "PROGRAM_TOKENS", "PROGRAM_VECTORS")
PACK_INDICES = ("tile_start_Q", "tile_row_Q", "first_tile_R", "first_tile_P")

# triton.jit compiles a version for each pattern of arguments that are 1 or divisible by 16: seconds, at almost every
# step of a run whose packs differ. A kernel gains nothing from these properties of the arguments above.
jit_for_packs = functools.partial(triton.jit, do_not_specialize=PACK_SIZES, do_not_specialize_on_alignment=PACK_INDICES)


class LaunchConfig(NamedTuple):
    """Size of the tile that a program holds at once, and how it is spread over threads."""

    tile_elements: int = 2048  # upper limit, except that a tile holds at least one vector
    elements_per_thread: int = 16  # of a tile; determines the number of warps
    num_stages: int = 3  # loop iterations whose loads are in flight at once

    def vectors_per_tile(self, *vector_size: int) -> int:
        """A power of two, at least 1. `vector_size`: factors of the number of elements of a vector."""
        return previous_power_of_2(self.tile_elements // math.prod(vector_size))

    def num_warps(self, *vector_size: int) -> int:
        """Warps of a program, 1 to 16. `vector_size`: as of `vectors_per_tile`."""
        elements = self.vectors_per_tile(*vector_size) * math.prod(vector_size)
        return min(16, previous_power_of_2(elements // (32 * self.elements_per_thread)))


def previous_power_of_2(n: int) -> int:
    """The largest power of two that is at most `n`; 1 for n < 1."""
    return 1 << max(1, n).bit_length() - 1


def cdiv(n: int, size: int) -> int:
    """Blocks of `size` that cover `n`. triton.cdiv on the host takes microseconds."""
    return -(-n // size)


LaunchTable = Mapping[str, LaunchConfig]  # by architecture (see `architecture`); "any" is the default


def architecture(device: torch.device) -> str:
    """sm80 for an A100, sm90 for an H100 or H200, sm100 for a B200; the device type where it is not CUDA."""
    return cuda_architecture(device) if device.type == "cuda" else device.type


@functools.cache
def cuda_architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def launch_config(table: LaunchTable, device: torch.device) -> LaunchConfig:
    return table.get(architecture(device), table["any"])


def resolve_backend(backend: str, x: Tensor) -> str:
    """ "triton" or "torch": `backend`, or the choice of "auto" for `x`.

    ValueError for an unknown name, or for Triton where it cannot compute.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "triton" if x.device.type in ("cuda", "meta") and x.dtype != torch.float64 else "torch"
    if backend == "triton" and x.dtype == torch.float64:
        raise ValueError("backend='triton' computes in fp32 and takes no float64; use backend='torch'")
    if backend == "triton" and x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            f"backend='triton' on {x.device}: Triton needs a GPU, or TRITON_INTERPRET=1 in the environment on a CPU"
        )
    return backend


def call(operator: CustomOpDef, x: Tensor, *arguments: object) -> Any:
    """`operator(x, *arguments)`; the function that it was made of, if nothing traces, records or fakes the call.

    To be used where no gradient is recorded: in the passes of an autograd Function.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or x.is_meta or type(x) not in PLAIN:
        return operator(x, *arguments)
    return operator._init_fn(x, *arguments)


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the computation: float64 stays, all else becomes fp32."""
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def check_device(**tensors: Tensor | None) -> None:
    """Raises ValueError, with the device of each, unless all tensors are on one device."""
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        raise ValueError("all must be on one device: " + ", ".join(f"{name} on {d}" for name, d in devices.items()))


def unit_stride(x: Tensor | None) -> Tensor | None:
    """`x`, or a contiguous copy if its last dim is not contiguous. Kernels take any stride of the other dims."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def row_stride(x_RD: Tensor | None) -> int:
    """Elements from one row to the next; 0 for None."""
    return 0 if x_RD is None else x_RD.stride(0)

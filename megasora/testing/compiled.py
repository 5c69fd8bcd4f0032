"""Kernels compiled for a GPU that is not there: python -m megasora.testing.compiled [--chip 90] [--size 3072x128]

    with compiling_for(90) as kernels:
        adaln_modulate(x, shift, scale, rows, 1e-6, via="triton")       CPU tensors; what comes out means nothing
    kernels[0].registers, kernels[0].spilled, ...

Every launch inside is a compilation and nothing else: Triton is given a driver that names the chip, a kernel's own
choice of how it is cut reads the same chip, and the compiler needs no GPU. What it made is read from its machine code
by cuobjdump, which comes with Triton: registers of a thread, bytes that did not fit them, shared memory, and how wide
the instructions are that move numbers from and to memory.

It runs where kernels are not interpreted: in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from megasora.kernels import launch
from megasora.testing.operations import OPERATIONS, Size, backward, forward

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of shared memory that a program may have
TOKENS = 64  # of a problem that is compiled: kernels do not depend on it
MOVES = {  # PTX: what moves numbers, with its width
    "load": re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)"),
    "copy": re.compile(
        r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)"
    ),  # on its way while others work
    "store": re.compile(r"\bst\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)"),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel as one launch wants it."""

    name: str
    specialisation: str  # types of its arguments, and values of those that are constants
    warps: int
    registers: int  # of a thread
    spilled: int  # bytes of a thread that are in memory in place of registers
    shared: int  # bytes of a program
    loads: dict[int, int]  # bytes that an instruction moves to a thread: number of such instructions
    stores: dict[int, int]


class ChipThatIsNotThere:
    """What Triton asks its driver before it compiles. Kernels are kept by device, so each chip is a device."""

    def __init__(self, chip: int):
        self.chip = chip

    def get_current_device(self) -> int:
        return self.chip

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, 32)


def obstacle() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if launch.INTERPRETED:
        return "TRITON_INTERPRET is set: kernels are interpreted in this process"
    for tool in ("ptxas", "cuobjdump"):
        try:
            getattr(triton.knobs.nvidia, tool)  # which looks for it
        except RuntimeError as error:
            return f"Triton's CUDA tools are not complete: {error}"
    return None


@contextmanager
def compiling_for(chip: int) -> Iterator[list[Compiled]]:
    """The kernels launched inside, in order, each once. `chip`: 80 for an A100, 90 for an H100. RuntimeError where
    nothing can be compiled."""
    reason = obstacle()
    if reason is not None:
        raise RuntimeError(reason)
    kernels: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in kernels:
            kernels[kernel.hash] = read(kernel)
            found.append(kernels[kernel.hash])
        return kernel

    found: list[Compiled] = []
    before = driver._active
    with ExitStack() as stack:
        driver.set_active(ChipThatIsNotThere(chip))
        stack.callback(setattr, driver, "_active", before)
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(mock.patch.object(launch, "chip_of", lambda device: f"sm{chip}"))
        stack.enter_context(mock.patch.object(launch, "INTERPRETED", True))  # take CPU tensors
        yield found


def read(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    source, constants = kernel.src, dict(kernel.src.constants)
    names = source.fn.arg_names
    values = [
        f"{name}={constants[i,]}" if (i,) in constants else f"{name}: {source.signature[name]}"
        for i, name in enumerate(names)
    ]
    ptx = kernel.asm["ptx"]
    loads, stores = Counter(), Counter()
    for count, vector, bits in [(stores, *m) for m in MOVES["store"].findall(ptx)] + [
        (loads, *m) for m in MOVES["load"].findall(ptx)
    ]:
        count[int(vector or 1) * int(bits) // 8] += 1
    loads.update(int(size, 0) for size in MOVES["copy"].findall(ptx))
    return Compiled(
        name=source.fn.__name__,
        specialisation=", ".join(values),
        warps=kernel.metadata.num_warps,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage.get("LOCAL", 0),
        shared=kernel.metadata.shared,
        loads=dict(sorted(loads.items())),
        stores=dict(sorted(stores.items())),
    )


def launch_all(operation: str, dtype: torch.dtype, size: Size) -> None:
    """What one of OPERATIONS launches, forward and backward."""
    problem = OPERATIONS[operation](size, dtype, "cpu")
    backward_pass = backward(problem.inputs, forward(problem.ours, problem.inputs))
    if backward_pass is not None:
        backward_pass()


def size_of(text: str) -> Size:
    width, head_dim = map(int, text.split("x"))
    return Size(TOKENS, width, head_dim)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chip", type=int, nargs="+", choices=SHARED_LIMIT, default=[90])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"])
    parser.add_argument("--size", type=size_of, nargs="+", default=[size_of("3072x128")], metavar="WIDTHxHEAD_DIM")
    parser.add_argument("--operation", choices=OPERATIONS, nargs="+", default=list(OPERATIONS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="file for every number")
    options = parser.parse_args(arguments)
    reason = obstacle()
    if reason is not None:
        parser.error(reason)

    results = []
    for chip in options.chip:
        with compiling_for(chip) as kernels:
            for operation, dtype, size in product(options.operation, options.dtype, options.size):
                known = len(kernels)
                launch_all(operation, DTYPES[dtype], size)
                sizes = {"width": size.width, "head_dim": size.head_dim}
                case = {"operation": operation, "chip": chip, "dtype": dtype} | sizes
                results += [case | asdict(kernel) for kernel in kernels[known:]]
    Console(width=160).print(table_of(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def table_of(results: list[dict]) -> Table:
    table = Table(title="kernels as compiled; bytes by instruction: how many move so many bytes for a thread")
    for name in ("operation", "chip", "dtype", "width", "head dim", "kernel", "warps", "registers", "spilled", "shared",
                 "loads", "stores"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("operation", "kernel") else "right")
    for r in results:
        counts = (" ".join(f"{n}x{size}" for size, n in r[key].items()) for key in ("loads", "stores"))
        cells = (r[key] for key in ("operation", "chip", "dtype", "width", "head_dim", "name", "warps", "registers",
                                    "spilled", "shared"))  # fmt: skip
        table.add_row(*map(str, cells), *counts)
    return table


if __name__ == "__main__":
    main()

"""Compiles kernels for GPUs without a GPU: python -m megasora.testing.compiled [--chip 90] [--size 3072x128]

    with compiling_for(90) as kernels:
        adaln_modulate(x, shift, scale, rows, 1e-6, backend="triton")   CPU tensors; results are undefined
    kernels[0].registers, kernels[0].spilled, ...

Launches inside only compile: Triton gets a driver that reports the chip, and the launch configuration is that of the
same chip. The machine code is inspected with cuobjdump, which comes with Triton: registers per thread, spilled bytes,
shared memory, and the width of loads and stores. From these follow the programs that fit one multiprocessor.

Needs a process in which kernels are not interpreted: without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import math
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
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # largest shared memory of a program in bytes
# Of a multiprocessor: registers, allocated to a thread in eights; shared memory in bytes, of which each program takes
# SHARED_OF_SYSTEM more than it asks for; warps and programs at most.
REGISTERS, REGISTER_UNIT, SHARED_OF_SYSTEM, MAX_WARPS, MAX_PROGRAMS = 65_536, 8, 1_024, 64, 32
SHARED = {80: 167_936, 90: 233_472, 100: 233_472}
TOKENS = 64  # of a compiled problem: kernels do not depend on it
MOVES = {  # PTX instructions that access memory, with their width
    "load": re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)"),
    "copy": re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)"),  # asynchronous
    "store": re.compile(r"\bst\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)"),
}


@dataclass(frozen=True)
class Compiled:
    """A kernel, compiled for one set of argument types and constants."""

    name: str
    specialisation: str  # types of its arguments, and values of its constants
    warps: int
    registers: int  # per thread
    spilled: int  # bytes per thread, in memory for lack of registers
    shared: int  # bytes per program
    programs: int  # that fit a multiprocessor at a time
    loads: dict[int, int]  # bytes per thread and instruction: number of such instructions
    stores: dict[int, int]


class OfflineDriver:
    """The methods of a Triton driver that compilation calls. Kernels are cached by device, so each chip is a device."""

    def __init__(self, chip: int):
        self.chip = chip

    def get_current_device(self) -> int:
        return self.chip

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, 32)


def obstacle() -> str | None:
    """Why kernels cannot be compiled in this process; None if they can."""
    if launch.INTERPRETED:
        return "TRITON_INTERPRET is set: kernels are interpreted in this process"
    for tool in ("ptxas", "cuobjdump"):
        try:
            getattr(triton.knobs.nvidia, tool)  # raises if it is not found
        except RuntimeError as error:
            return f"Triton's CUDA tools are not complete: {error}"
    return None


@contextmanager
def compiling_for(chip: int) -> Iterator[list[Compiled]]:
    """A list of the kernels launched inside, in order, without repetitions. `chip`: 80 for an A100, 90 for an H100.
    RuntimeError if kernels cannot be compiled in this process."""
    reason = obstacle()
    if reason is not None:
        raise RuntimeError(reason)
    kernels: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in kernels:
            kernels[kernel.hash] = inspect_kernel(kernel, chip)
            compiled.append(kernels[kernel.hash])
        return kernel

    compiled: list[Compiled] = []
    previous = driver._active
    with ExitStack() as stack:
        driver.set_active(OfflineDriver(chip))
        stack.callback(setattr, driver, "_active", previous)
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(mock.patch.object(launch, "architecture", lambda device: f"sm{chip}"))
        stack.enter_context(mock.patch.object(launch, "INTERPRETED", True))  # accept CPU tensors
        yield compiled


def programs_per_multiprocessor(chip: int, warps: int, registers: int, shared: int) -> int:
    """Programs that fit one multiprocessor at a time; `registers` per thread, `shared` in bytes per program."""
    by_registers = REGISTERS // (32 * warps * REGISTER_UNIT * math.ceil(registers / REGISTER_UNIT))
    by_shared = SHARED[chip] // (shared + SHARED_OF_SYSTEM)
    return min(by_registers, by_shared, MAX_WARPS // warps, MAX_PROGRAMS)


def inspect_kernel(kernel: Any, chip: int) -> Compiled:
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
    warps, registers, shared = kernel.metadata.num_warps, usage["REG"], kernel.metadata.shared
    return Compiled(
        name=source.fn.__name__,
        specialisation=", ".join(values),
        warps=warps,
        registers=registers,
        spilled=usage["STACK"] + usage.get("LOCAL", 0),
        shared=shared,
        programs=programs_per_multiprocessor(chip, warps, registers, shared),
        loads=dict(sorted(loads.items())),
        stores=dict(sorted(stores.items())),
    )


def launch_all(operation: str, dtype: torch.dtype, size: Size) -> None:
    """Runs one of OPERATIONS, forward and backward."""
    problem = OPERATIONS[operation](size, dtype, "cpu")
    backward_pass = backward(problem.inputs, forward(problem.triton, problem.inputs))
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
    parser.add_argument("--json", type=Path, help="file for all results")
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
    table = Table(
        title="compiled kernels; programs: on a multiprocessor; loads, stores: instructions x bytes per thread"
    )
    for name in ("operation", "chip", "dtype", "width", "head dim", "kernel", "warps", "registers", "spilled", "shared",
                 "programs", "loads", "stores"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("operation", "kernel") else "right")
    for r in results:
        counts = (" ".join(f"{n}x{size}" for size, n in r[key].items()) for key in ("loads", "stores"))
        cells = (r[key] for key in ("operation", "chip", "dtype", "width", "head_dim", "name", "warps", "registers",
                                    "spilled", "shared", "programs"))  # fmt: skip
        table.add_row(*map(str, cells), *counts)
    return table


if __name__ == "__main__":
    main()

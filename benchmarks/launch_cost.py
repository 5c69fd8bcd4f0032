"""CPU time that calling our kernels costs: python -m benchmarks.launch_cost [--out FILE]

A small model on a GPU waits for the CPU, which launches kernel after kernel. This measures what one call of each
operation costs the CPU, forward and backward, and one block of the model with all its operations. No GPU is needed:
tensors are tiny and on the CPU, and launches do nothing. So these are the checks of arguments, autograd, allocations
and PyTorch operators around a kernel, without CUDA's launcher and without Triton's, whose own time for arguments is
measured apart where Triton finds its compiler. Attention and matrix products of the block compute, so its time is
an upper bound.

    dispatcher    every operator is called through torch.library, as under torch.compile
    direct        as the kernels do otherwise: kernels/launch.py, `call`

Times are CPU time of the thread, the least of several rounds: other programs do not count, but slow caches down.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.record import environment, write_record
from benchmarks.transformer_block import as_leaf
from megasora.build import build_model, patch_dim
from megasora.config import CodecConfig, Config, ModelConfig
from megasora.data.pack import Record, make_batch
from megasora.kernels import launch
from megasora.kernels.adaln_triton import forward_triton
from megasora.model.block import BlockInputs, run_block
from megasora.testing.compiled import compiling_for, obstacle
from megasora.testing.operations import EPS, OPERATIONS, Size, build_rows

SIZE = Size(tokens=8, width=32, head_dim=32, row_tokens=4)
GRID = (2, 2, 2)  # frames, rows, columns of the tokens of a block
OPERATIONS_OF_BLOCKS = (
    "adaln_modulate", "gated_residual_adaln", "gated_residual_norm", "residual_adaln", "gated_add",
    "qk_norm_rope3d, per_head", "qk_norm_rope3d, across_heads", "rms_norm",
)  # fmt: skip
VARIANTS = ("dispatcher", "direct")

Passes = tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]  # the forward pass, and tensors that get a gradient


@dataclass(frozen=True)
class Cost:
    what: str  # an operation, or "block"
    variant: str
    forward_us: float
    backward_us: float


def operation(name: str) -> Passes:
    problem = OPERATIONS[name](SIZE, torch.bfloat16, "cpu")

    def forward() -> tuple[Tensor, ...]:
        outputs = problem.triton(*problem.inputs)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    return forward, [x for x in problem.inputs if x.requires_grad]


def block() -> Passes:
    """A block of the model in Wan's form: cross-attention, QK-norm across heads, modulation shared by the blocks."""
    model_config = ModelConfig(
        width=SIZE.width, depth=1, heads=SIZE.heads, modulation="shared", qk_norm="across_heads", text_depth=0,
        kernel_backend="triton",
    )  # fmt: skip
    config = Config(codec=CodecConfig(channels=16), model=model_config)
    model = build_model(config, patch_dim(config)).bfloat16().train()
    patches_LP, words = torch.randn(SIZE.tokens, patch_dim(config)), torch.randint(0, 257, (8, 16))
    batch = make_batch([Record(0, patches_LP, GRID, words, (64.0, 64.0, 4.0, 24.0), "a caption")], SIZE.tokens)
    with torch.no_grad():
        x_LD, inputs = model.embed_patches(batch), model.block_inputs(batch)
    x_LD, inputs = as_leaf(x_LD), BlockInputs(*map(as_leaf, inputs))
    leaves = [x_LD, *model.blocks["0"].parameters()]
    return (lambda: (run_block(model.blocks["0"], x_LD, inputs, "none"),)), leaves


@contextmanager
def launching(variant: str) -> Iterator[None]:
    """Kernels are launched on CPU tensors, and the launches do nothing."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", lambda *_, **__: None))
        stack.enter_context(mock.patch.object(launch, "INTERPRETED", True))  # accept CPU tensors
        if variant == "dispatcher":
            stack.enter_context(mock.patch.object(launch, "PLAIN", ()))
        yield


def microseconds(function: Callable[[], object], calls: int, rounds: int) -> float:
    """CPU time of a call, the least mean of `calls` calls in `rounds` rounds."""
    times = []
    for _ in range(rounds + 1):  # the first warms up
        start = time.thread_time()
        for _ in range(calls):
            function()
        times.append((time.thread_time() - start) / calls)
    return 1e6 * min(times[1:])


def cost(what: str, passes: Passes, variant: str, calls: int, rounds: int) -> Cost:
    forward, leaves = passes
    with launching(variant):
        grads = [torch.ones_like(y) for y in forward() if y.requires_grad]

        def both() -> None:
            roots = [y for y in forward() if y.requires_grad]
            torch.autograd.grad(roots, leaves, grads, allow_unused=True)

        forward_us = microseconds(forward, calls, rounds)
        return Cost(what, variant, forward_us, microseconds(both, calls, rounds) - forward_us)


def launcher_microseconds(calls: int, rounds: int) -> float | None:
    """Triton's own time for the arguments of one launch, that of adaLN with 26 of them; None without its compiler."""
    if obstacle() is not None:
        return None
    rows, x_LD = build_rows(SIZE, "cpu"), torch.zeros(SIZE.tokens, SIZE.width, dtype=torch.bfloat16)
    vectors = [x_LD[: rows.num_rows]] * 2
    index = rows.tile_start_Q, rows.tile_row_Q, rows.first_tile_P, rows.num_rows, rows.num_real

    def run() -> None:
        launch.call(forward_triton, x_LD, None, None, *vectors, None, None, *index, EPS, "layer")

    with compiling_for(90):
        compiled = microseconds(run, calls, rounds)
    with launching("direct"):
        return compiled - microseconds(run, calls, rounds)


def table_of(costs: list[Cost]) -> Table:
    table = Table(title="microseconds of the CPU for one call: forward + backward")
    for name in ("", *VARIANTS):
        table.add_column(name, justify="right" if name else "left")
    for what in dict.fromkeys(c.what for c in costs):
        by_variant = {c.variant: f"{c.forward_us:.0f} + {c.backward_us:.0f}" for c in costs if c.what == what}
        table.add_row(what, *(by_variant[variant] for variant in VARIANTS))
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=200, help="of each operation in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    head, repeats = environment(), (options.calls, options.rounds)
    cases = {name: operation(name) for name in OPERATIONS_OF_BLOCKS} | {"block": block()}
    costs = [cost(what, passes, variant, *repeats) for what, passes in cases.items() for variant in VARIANTS]
    launcher = launcher_microseconds(*repeats)
    console = Console()
    console.print(table_of(costs))
    if launcher is not None:
        console.print(f"Triton's launcher without CUDA's: {launcher:.0f} microseconds more for each kernel")
    if options.out is not None:
        write_record(options.out, head, {"costs": [asdict(c) for c in costs], "launcher_us": launcher})


if __name__ == "__main__":
    main()

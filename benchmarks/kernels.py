"""Measures kernels and blocks on a GPU: python -m benchmarks.kernels [--out benchmarks/results] [--quick]

Operations: every one of megasora/testing/operations.py, forward and backward, on bf16 packs with rows of 4,096 tokens.
The least traffic of a pass (activations read and written once) over its time is a bandwidth; the result is its fraction
of the bandwidth of a plain copy. The variants:

    triton     the Triton kernels of kernels/
    eager      the reference in the same file, operator by operator
    compile    torch.compile of the reference, for this shape only
    liger, quack    the closest kernel of these libraries, if installed: norms without rows

Launches: microseconds of the host to launch the same passes of a short pack, which bound small models.
Attention: a pack of clips in one call against one clip with the same FLOPs, in TFLOP/s.
Blocks: one transformer block, as the fraction of the FLOP/s of a matrix product; see transformer_block.py.

Copy and matrix product are measured at the start and at the end of the run (see gpu.py). Each result is written at
once; measurements skipped for lack of time are listed. --tune searches launch configurations instead, see tune.py.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.context_balance import heavy_tailed
from benchmarks.figure import draw
from benchmarks.gpu import CudaTimer, Deadline, gpu_environment, measure_limits, run_trials
from benchmarks.record import environment, write_record
from benchmarks.transformer_block import block_cases, block_table, measure_block
from benchmarks.tune import tune
from megasora.kernels.attention import Segments, attention
from megasora.testing.operations import EPS, OPERATIONS, Problem, Size, backward, forward

NO_GPU = (
    "benchmarks.kernels: no GPU here, nothing is measured and nothing written. On a machine with one, PyTorch for CUDA "
    "and numpy, matplotlib, pytest, rich: make gpu PYTHON=python3"
)
WIDTHS = (5120, 1536, 3072, 1152)  # Wan-14B, Wan-1.3B, Wan-5B, DiT-XL: the first two matter most
TOKENS = 65_536  # where all variants and widths are compared
OTHER_TOKENS = (16_384, 262_144, 4_096, 1_048_576)  # triton and eager only, as each shape needs a compilation
TIMED = [name for name in OPERATIONS if name != "gated_residual_norm"]  # moves what gated_residual_adaln does
MINUTES, QUICK_MINUTES = 8.0, 2.0
UNTIL = {
    "operations": 0.45,
    "launches": 0.5,
    "attention": 0.6,
    "blocks": 1.0,
}  # of the minutes, when to begin no more of each


# ---- operations


@dataclass(frozen=True)
class OperationResult:
    operation: str
    tokens: int
    width: int
    variant: str
    direction: str  # forward | backward; both if an error
    ms: float | None  # median; None: see error
    gb_s: float | None  # least bytes by the time
    of_copy: float | None
    least_bytes: float
    error: str | None = None


def rivals(operation: str) -> dict[str, Callable[..., Tensor]]:
    """The closest kernels of other libraries, as functions of the inputs of our problem."""
    functions: dict[str, Callable[..., Tensor]] = {}
    if operation == "adaln_modulate":
        with suppress(ImportError):
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            # a weight and a bias for all tokens instead of the vectors of rows
            functions["liger"] = lambda x, shift, scale: LigerLayerNormFunction.apply(x, scale[0], shift[0], EPS)
    if operation == "rms_norm":
        with suppress(ImportError):
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            functions["liger"] = lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)
        with suppress(ImportError):
            from quack import rmsnorm

            functions["quack"] = lambda x, weight: rmsnorm(x, weight, eps=EPS)
    return functions


def build_trial(function: Callable[..., Tensor | tuple[Tensor, ...]], problem: Problem) -> Callable[[CudaTimer], None]:
    def trial(timer: CudaTimer) -> None:
        outputs = timer.time("forward", lambda: forward(function, problem.inputs))
        backward_pass = backward(problem.inputs, outputs)
        if backward_pass is not None:
            timer.time("backward", backward_pass)

    return trial


def measure_operation(
    operation: str, size: Size, all_variants: bool, copy_gb_s: float, timer: CudaTimer
) -> list[OperationResult]:
    def result(
        variant: str, direction: str, ms: float | None, least: float, error: str | None = None
    ) -> OperationResult:
        gb_s = None if ms is None else least / ms / 1e6
        of_copy = None if gb_s is None else gb_s / copy_gb_s
        return OperationResult(operation, size.tokens, size.width, variant, direction, ms, gb_s, of_copy, least, error)

    try:
        problem = OPERATIONS[operation](size, torch.bfloat16, "cuda")
    except torch.cuda.OutOfMemoryError:
        return [result("triton", "both", None, 0.0, "out of memory: the inputs alone")]
    functions = {"triton": problem.triton, "eager": problem.reference}
    if all_variants:
        torch._dynamo.reset()  # otherwise this counts as another shape of the last one
        functions |= {"compile": torch.compile(problem.reference, dynamic=False), **rivals(operation)}
    timed = run_trials({variant: build_trial(function, problem) for variant, function in functions.items()}, timer)
    results = []
    for variant, times in timed.items():
        if times.error is not None:
            results.append(result(variant, "both", None, sum(problem.least_bytes.values()), times.error))
        for direction, ms in times.medians.items():
            results.append(result(variant, direction, ms, problem.least_bytes[direction]))
    return results


def operation_cases(quick: bool) -> Iterator[tuple[str, Size, bool]]:
    """Operation, size, and whether in all variants; most important first."""
    if quick:
        yield from ((operation, Size(TOKENS, WIDTHS[0]), True) for operation in TIMED)
        return
    for widths in (WIDTHS[:2], WIDTHS[2:]):
        for tokens in (TOKENS, *OTHER_TOKENS):
            for width in widths:
                for operation in TIMED:
                    yield operation, Size(tokens, width), tokens == TOKENS


def operation_table(tokens: int, results: list[OperationResult]) -> Table:
    """Results of packs of `tokens` tokens: the fraction of a copy's speed, forward and backward."""
    results = [r for r in results if r.tokens == tokens]
    variants = list(dict.fromkeys(r.variant for r in results))
    table = Table(title=f"{tokens:,} tokens, bf16: fraction of copy, forward | backward, by the least bytes")
    for name in ("operation", "width", *variants, "triton, ms", "compile / triton"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for operation, width in dict.fromkeys((r.operation, r.width) for r in results):
        by_pass = {(r.variant, r.direction): r for r in results if (r.operation, r.width) == (operation, width)}
        cells = [
            " | ".join(format_field(by_pass.get((variant, d)), "of_copy", "{:.0%}") for d in ("forward", "backward"))
            for variant in variants
        ]
        ms = " | ".join(format_field(by_pass.get(("triton", d)), "ms", "{:.3f}") for d in ("forward", "backward"))
        times = " | ".join(ratio(by_pass, d) for d in ("forward", "backward"))
        table.add_row(operation, str(width), *cells, ms, times)
    return table


def format_field(result: OperationResult | None, name: str, form: str) -> str:
    value = getattr(result, name, None)
    return "-" if value is None else form.format(value)


def ratio(by_pass: dict[tuple[str, str], OperationResult], direction: str) -> str:
    pair = by_pass.get(("compile", direction)), by_pass.get(("triton", direction))
    return "-" if None in pair else f"{pair[0].ms / pair[1].ms:.2f}"


# ---- launches


LAUNCH_SIZE = Size(tokens=256, width=1536, row_tokens=128)
LAUNCHES, LAUNCH_TRIALS = 20, 5  # of a trial; fewer than the GPU's queue takes


@dataclass(frozen=True)
class LaunchResult:
    operation: str
    variant: str
    forward_us: float  # of the host, median of the trials
    backward_us: float | None  # None: no backward pass


def launch_us(function: Callable[[], object]) -> float:
    """Microseconds that the host needs for a call of `function`, which must not wait for the GPU."""
    function()
    times = []
    for _ in range(LAUNCH_TRIALS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(LAUNCHES):
            function()
        times.append((time.perf_counter() - begin) / LAUNCHES * 1e6)
    return statistics.median(times)


def measure_launches(operation: str, device: str = "cuda") -> list[LaunchResult]:
    problem = OPERATIONS[operation](LAUNCH_SIZE, torch.bfloat16, device)
    results = []
    for variant, function in (("triton", problem.triton), ("eager", problem.reference)):
        passes = [lambda function=function: forward(function, problem.inputs)]
        gradients = backward(problem.inputs, passes[0]())
        if gradients is not None:

            def both(run: Callable[[], tuple[Tensor, ...]] = passes[0]) -> None:
                backward(problem.inputs, run())()

            passes.append(both)
        times = list(map(launch_us, passes))
        results.append(LaunchResult(operation, variant, times[0], times[1] - times[0] if times[1:] else None))
    return results


def launch_table(results: list[LaunchResult]) -> Table:
    table = Table(title="launches: microseconds of the host, forward | backward")
    for name in ("operation", "triton", "eager"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for operation in dict.fromkeys(r.operation for r in results):
        cells = [
            f"{r.forward_us:.0f} | {'-' if r.backward_us is None else format(r.backward_us, '.0f')}"
            for r in results
            if r.operation == operation
        ]
        table.add_row(operation, *cells)
    return table


# ---- attention in packs


@dataclass(frozen=True)
class AttentionResult:
    pack: str
    tokens: int
    heads: int
    head_dim: int
    clips: int
    longest: int
    single_tokens: int  # of the single clip, which has the same FLOPs as the pack
    tflop_s: dict[str, float]  # of the pack, by pass
    single_tflop_s: dict[str, float]
    fraction_of_single: dict[str, float]
    error: str | None = None


def attention_cases(quick: bool) -> Iterator[tuple[str, list[int], int]]:
    """Name, lengths of the clips, heads."""
    tokens = TOKENS
    yield "heavy tail", heavy_tailed(tokens, 64, tokens, 0).tolist(), 40
    if not quick:
        yield "clips of 8,192", [8192] * (tokens // 8192), 40
        yield "images of 1,024", [1024] * (tokens // 1024), 40
        yield "heavy tail", heavy_tailed(tokens, 64, tokens, 1).tolist(), 12


def attention_flops(lengths: list[int], heads: int, head_dim: int) -> dict[str, float]:
    """FLOPs of the two products of the forward pass and of the five of the backward pass."""
    forward_flops = 4.0 * heads * head_dim * sum(n * n for n in lengths)
    return {"forward": forward_flops, "backward": 2.5 * forward_flops}


def measure_attention(
    pack: str, lengths: list[int], heads: int, timer: CudaTimer, head_dim: int = 128
) -> AttentionResult:
    single_length = round(sum(n * n for n in lengths) ** 0.5)

    def build_clip_trial(clips: list[int]) -> Callable[[CudaTimer], None]:
        cu = torch.tensor([0, *clips]).cumsum(0).to(torch.int32)
        segments = Segments.from_cu_seqlens(cu, cu, sum(clips), "cuda")
        shape = sum(clips), heads, head_dim
        q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3))

        def trial(timer: CudaTimer) -> None:
            outputs = timer.time("forward", lambda: forward(lambda *qkv: attention(*qkv, segments), (q, k, v)))
            timer.time("backward", backward((q, k, v), outputs))

        return trial

    timed = run_trials({"pack": build_clip_trial(lengths), "single": build_clip_trial([single_length])}, timer)
    flops = {
        "pack": attention_flops(lengths, heads, head_dim),
        "single": attention_flops([single_length], heads, head_dim),
    }
    speed = {
        variant: {name: flops[variant][name] / ms / 1e9 for name, ms in times.medians.items()}
        for variant, times in timed.items()
    }
    return AttentionResult(
        pack,
        sum(lengths),
        heads,
        head_dim,
        len(lengths),
        max(lengths),
        single_length,
        speed["pack"],
        speed["single"],
        {name: value / speed["single"][name] for name, value in speed["pack"].items() if name in speed["single"]},
        next((f"{variant}: {times.error}" for variant, times in timed.items() if times.error is not None), None),
    )


def attention_table(results: list[AttentionResult]) -> Table:
    table = Table(title="attention of a pack against one clip of equal arithmetic: TFLOP/s, forward | backward")
    for name in ("pack", "clips", "longest", "heads", "pack, TFLOP/s", "one clip", "fraction"):
        table.add_column(name, justify="left" if name == "pack" else "right")
    for r in results:
        sides = (
            " | ".join(form.format(speed[d]) if d in speed else "-" for d in ("forward", "backward"))
            for speed, form in ((r.tflop_s, "{:.0f}"), (r.single_tflop_s, "{:.0f}"), (r.fraction_of_single, "{:.2f}"))
        )
        table.add_row(f"{r.pack}, {r.tokens:,} tokens", str(r.clips), f"{r.longest:,}", str(r.heads), *sides)
    return table


# ---- the run


class Record:
    """All results so far. If there is a `path`, the file is rewritten after each result."""

    def __init__(self, path: Path | None, head: dict[str, object]):
        self.path, self.head = path, head
        self.body: dict[str, object] = {}

    def put(self, name: str, value: object) -> None:
        self.body[name] = value
        self.write()

    def add(self, name: str, *values: object) -> None:
        self.body.setdefault(name, []).extend(values)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            write_record(self.path, self.head, self.body)


def record_path(out: Path | None, gpu: str) -> Path | None:
    """`out` if it is a JSON file; in a folder, a file named after the GPU."""
    if out is None or out.suffix == ".json":
        return out
    return out / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def run(record: Record, quick: bool, minutes: float, console: Console) -> None:
    deadlines = {name: Deadline(60 * minutes * share) for name, share in UNTIL.items()}
    timer = CudaTimer()
    limits = measure_limits(timer)
    record.put("limits", limits)
    console.print(f"copy {limits['copy_gb_s']:,.0f} GB/s, matrix product {limits['matmul_tflop_s']:,.0f} TFLOP/s")

    operations: list[OperationResult] = []
    for operation, size, all_variants in operation_cases(quick):
        if deadlines["operations"].passed:
            record.add("skipped", f"{operation}, {size.tokens} tokens, width {size.width}")
            continue
        results = measure_operation(operation, size, all_variants, limits["copy_gb_s"], timer)
        operations += results
        record.add("operations", *map(asdict, results))
        torch.cuda.empty_cache()
    for tokens in dict.fromkeys(r.tokens for r in operations):
        console.print(operation_table(tokens, operations))

    launches = []
    for operation in TIMED:
        if deadlines["launches"].passed:
            record.add("skipped", f"launches, {operation}")
            continue
        launches += measure_launches(operation)
        record.put("launches", list(map(asdict, launches)))
    console.print(launch_table(launches))

    packs = []
    for pack, lengths, heads in attention_cases(quick):
        if deadlines["attention"].passed:
            record.add("skipped", f"attention, {pack}")
            continue
        packs.append(measure_attention(pack, lengths, heads, timer))
        record.add("attention", asdict(packs[-1]))
    console.print(attention_table(packs))

    blocks = []
    for case in block_cases(quick):
        if deadlines["blocks"].passed:
            record.add("skipped", f"block, {case}")
            continue
        for result in measure_block(case, limits["matmul_tflop_s"], timer):
            blocks.append(result)
            record.add("blocks", asdict(result))
    console.print(block_table(blocks))
    record.put("limits_at_the_end", measure_limits(timer))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file, or a folder for one named after the GPU; with a plot")
    parser.add_argument("--quick", action="store_true", help="one width, fewer shapes, in 2 minutes")
    parser.add_argument("--minutes", type=float, help=f"approximate time limit; {MINUTES:g} without --quick")
    parser.add_argument("--tune", action="store_true", help="search launch configurations; prints, writes no file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU)
        return
    console = Console(width=170)
    if options.tune:
        tune(CudaTimer(), console)
        return

    gpu = gpu_environment()
    path = record_path(options.out, str(gpu["name"]))
    record = Record(path, environment() | {"gpu": gpu})
    run(record, options.quick, options.minutes or (QUICK_MINUTES if options.quick else MINUTES), console)
    if path is not None:
        draw(record.head | record.body, path.with_suffix(".png"))
        console.print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()

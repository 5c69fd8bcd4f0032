"""Kernels and blocks on a GPU against its limits: python -m benchmarks.kernels [--out benchmarks/results] [--quick]

Operations: every one of megasora/testing/operations.py, forward and backward, on bf16 packs whose rows are 4,096 tokens
long. A pass has a least number of bytes to move (activations read and written once); by the time it takes, that is a
speed, and divided by the speed of a plain copy the fraction of the GPU's memory that it has the use of. The ways:

    ours       the Triton kernels of kernels/
    eager      the reference in the same file, operator by operator
    compile    torch.compile of the reference, for this shape alone
    liger, quack    the closest kernel of these libraries, where they are installed: norms without rows

Attention: a pack of clips in one call against one clip over the whole call that is as much arithmetic, by TFLOP/s.
Blocks: one transformer block, by the fraction of the matrix product's FLOP/s that it has the use of; see
transformer_block.py.

Both limits are measured at the start of the run and once more at its end (see gpu.py). A result is written as it comes;
what the minutes do not suffice for is listed. --tune tries other cuts of our kernels instead, see tune.py.
"""

from __future__ import annotations

import argparse
import re
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
from benchmarks.gpu import Clock, Deadline, gpu_surroundings, measure_limits, take_turns
from benchmarks.record import surroundings, write_record
from benchmarks.transformer_block import block_cases, block_table, measure_block
from benchmarks.tune import tune
from megasora.kernels.attention import Segments, attention
from megasora.testing.operations import EPS, OPERATIONS, Problem, Size, backward, forward

NO_GPU = (
    "benchmarks.kernels: no GPU here, nothing is measured and nothing written. On a machine with one, PyTorch for CUDA "
    "and numpy, matplotlib, pytest, rich: make gpu PYTHON=python3"
)
WIDTHS = (5120, 1536, 3072, 1152)  # Wan-14B, Wan-1.3B, Wan-5B, DiT-XL: the first two matter most
TOKENS = 65_536  # where all ways and widths are compared
OTHER_TOKENS = (16_384, 262_144, 4_096, 1_048_576)  # ours and eager alone: a compilation is for one shape
TIMED = [name for name in OPERATIONS if name != "gated_residual_norm"]  # moves what gated_residual_adaln does
MINUTES, QUICK_MINUTES = 8.0, 2.0
UNTIL = {"operations": 0.5, "attention": 0.6, "blocks": 1.0}  # of the minutes, when to begin no more of each


# ---- operations


@dataclass(frozen=True)
class OperationResult:
    operation: str
    tokens: int
    width: int
    way: str
    direction: str  # forward | backward; both where there is none of either
    ms: float | None  # median; None: see error
    gb_s: float | None  # least bytes by the time
    of_copy: float | None
    least_bytes: float
    error: str | None = None


def rivals(operation: str) -> dict[str, Callable[..., Tensor]]:
    """The closest of other libraries, on the inputs of our problem."""
    found: dict[str, Callable[..., Tensor]] = {}
    if operation == "adaln_modulate":
        with suppress(ImportError):
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            # a weight and a bias for all tokens in the place of rows' vectors
            found["liger"] = lambda x, shift, scale: LigerLayerNormFunction.apply(x, scale[0], shift[0], EPS)
    if operation == "rms_norm":
        with suppress(ImportError):
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            found["liger"] = lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)
        with suppress(ImportError):
            from quack import rmsnorm

            found["quack"] = lambda x, weight: rmsnorm(x, weight, eps=EPS)
    return found


def turn_of(function: Callable[..., Tensor | tuple[Tensor, ...]], problem: Problem) -> Callable[[Clock], None]:
    def turn(clock: Clock) -> None:
        outputs = clock.time("forward", lambda: forward(function, problem.inputs))
        backward_pass = backward(problem.inputs, outputs)
        if backward_pass is not None:
            clock.time("backward", backward_pass)

    return turn


def measure_operation(
    operation: str, size: Size, all_ways: bool, copy_gb_s: float, clock: Clock
) -> list[OperationResult]:
    def result(way: str, direction: str, ms: float | None, least: float, error: str | None = None) -> OperationResult:
        gb_s = None if ms is None else least / ms / 1e6
        of_copy = None if gb_s is None else gb_s / copy_gb_s
        return OperationResult(operation, size.tokens, size.width, way, direction, ms, gb_s, of_copy, least, error)

    try:
        problem = OPERATIONS[operation](size, torch.bfloat16, "cuda")
    except torch.cuda.OutOfMemoryError:
        return [result("ours", "both", None, 0.0, "out of memory: the inputs alone")]
    functions = {"ours": problem.triton, "eager": problem.reference}
    if all_ways:
        torch._dynamo.reset()  # or it would count this as one more shape of the last one
        functions |= {"compile": torch.compile(problem.reference, dynamic=False), **rivals(operation)}
    timed = take_turns({way: turn_of(function, problem) for way, function in functions.items()}, clock)
    results = []
    for way, times in timed.items():
        if times.error is not None:
            results.append(result(way, "both", None, sum(problem.least_bytes.values()), times.error))
        for direction, ms in times.medians.items():
            results.append(result(way, direction, ms, problem.least_bytes[direction]))
    return results


def operation_cases(quick: bool) -> Iterator[tuple[str, Size, bool]]:
    """Operation, size, and whether in all ways; what matters most comes first."""
    if quick:
        yield from ((operation, Size(TOKENS, WIDTHS[0]), True) for operation in TIMED)
        return
    for widths in (WIDTHS[:2], WIDTHS[2:]):
        for tokens in (TOKENS, *OTHER_TOKENS):
            for width in widths:
                for operation in TIMED:
                    yield operation, Size(tokens, width), tokens == TOKENS


def operation_table(tokens: int, results: list[OperationResult]) -> Table:
    """Of packs of so many tokens: the fraction of copy, forward and backward."""
    here = [r for r in results if r.tokens == tokens]
    ways = list(dict.fromkeys(r.way for r in here))
    table = Table(title=f"{tokens:,} tokens, bf16: fraction of copy, forward | backward, by the least bytes")
    for name in ("operation", "width", *ways, "ours, ms", "compile / ours"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for operation, width in dict.fromkeys((r.operation, r.width) for r in here):
        found = {(r.way, r.direction): r for r in here if (r.operation, r.width) == (operation, width)}
        cells = [
            " | ".join(shown(found.get((way, d)), "of_copy", "{:.0%}") for d in ("forward", "backward")) for way in ways
        ]
        ms = " | ".join(shown(found.get(("ours", d)), "ms", "{:.3f}") for d in ("forward", "backward"))
        times = " | ".join(ratio(found, d) for d in ("forward", "backward"))
        table.add_row(operation, str(width), *cells, ms, times)
    return table


def shown(result: OperationResult | None, name: str, form: str) -> str:
    value = getattr(result, name, None)
    return "-" if value is None else form.format(value)


def ratio(found: dict[tuple[str, str], OperationResult], direction: str) -> str:
    pair = found.get(("compile", direction)), found.get(("ours", direction))
    return "-" if None in pair else f"{pair[0].ms / pair[1].ms:.2f}"


# ---- attention in packs


@dataclass(frozen=True)
class AttentionResult:
    pack: str
    tokens: int
    heads: int
    head_dim: int
    clips: int
    longest: int
    whole_tokens: int  # of the one clip whose arithmetic is the same
    tflop_s: dict[str, float]  # of the pack, by pass
    whole_tflop_s: dict[str, float]
    of_whole: dict[str, float]
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
    """Of both products of the forward pass, and of the five of the backward pass."""
    forward_flops = 4.0 * heads * head_dim * sum(n * n for n in lengths)
    return {"forward": forward_flops, "backward": 2.5 * forward_flops}


def measure_attention(pack: str, lengths: list[int], heads: int, clock: Clock, head_dim: int = 128) -> AttentionResult:
    whole = round(sum(n * n for n in lengths) ** 0.5)

    def turn_of_clips(clips: list[int]) -> Callable[[Clock], None]:
        cu = torch.tensor([0, *clips]).cumsum(0).to(torch.int32)
        segments = Segments.from_cu_seqlens(cu, cu, sum(clips), "cuda")
        shape = sum(clips), heads, head_dim
        q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3))

        def turn(clock: Clock) -> None:
            outputs = clock.time("forward", lambda: forward(lambda *qkv: attention(*qkv, segments), (q, k, v)))
            clock.time("backward", backward((q, k, v), outputs))

        return turn

    timed = take_turns({"pack": turn_of_clips(lengths), "whole": turn_of_clips([whole])}, clock)
    flops = {"pack": attention_flops(lengths, heads, head_dim), "whole": attention_flops([whole], heads, head_dim)}
    speed = {
        way: {name: flops[way][name] / ms / 1e9 for name, ms in times.medians.items()} for way, times in timed.items()
    }
    return AttentionResult(
        pack,
        sum(lengths),
        heads,
        head_dim,
        len(lengths),
        max(lengths),
        whole,
        speed["pack"],
        speed["whole"],
        {name: value / speed["whole"][name] for name, value in speed["pack"].items() if name in speed["whole"]},
        next((f"{way}: {times.error}" for way, times in timed.items() if times.error is not None), None),
    )


def attention_table(results: list[AttentionResult]) -> Table:
    table = Table(title="attention of a pack against one clip of equal arithmetic: TFLOP/s, forward | backward")
    for name in ("pack", "clips", "longest", "heads", "pack, TFLOP/s", "one clip", "fraction"):
        table.add_column(name, justify="left" if name == "pack" else "right")
    for r in results:
        sides = (
            " | ".join(form.format(speed[d]) if d in speed else "-" for d in ("forward", "backward"))
            for speed, form in ((r.tflop_s, "{:.0f}"), (r.whole_tflop_s, "{:.0f}"), (r.of_whole, "{:.2f}"))
        )
        table.add_row(f"{r.pack}, {r.tokens:,} tokens", str(r.clips), f"{r.longest:,}", str(r.heads), *sides)
    return table


# ---- the run


class Record:
    """Everything measured so far, in a file after each result if there is to be one."""

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
    """`out`, or a file named after the GPU in it where it is a folder."""
    if out is None or out.suffix == ".json":
        return out
    return out / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def run(record: Record, quick: bool, minutes: float, console: Console) -> None:
    deadlines = {name: Deadline(60 * minutes * share) for name, share in UNTIL.items()}
    clock = Clock()
    limits = measure_limits(clock)
    record.put("limits", limits)
    console.print(f"copy {limits['copy_gb_s']:,.0f} GB/s, matrix product {limits['matmul_tflop_s']:,.0f} TFLOP/s")

    operations: list[OperationResult] = []
    for operation, size, all_ways in operation_cases(quick):
        if deadlines["operations"].passed:
            record.add("left_out", f"{operation}, {size.tokens} tokens, width {size.width}")
            continue
        results = measure_operation(operation, size, all_ways, limits["copy_gb_s"], clock)
        operations += results
        record.add("operations", *map(asdict, results))
        torch.cuda.empty_cache()
    for tokens in dict.fromkeys(r.tokens for r in operations):
        console.print(operation_table(tokens, operations))

    packs = []
    for pack, lengths, heads in attention_cases(quick):
        if deadlines["attention"].passed:
            record.add("left_out", f"attention, {pack}")
            continue
        packs.append(measure_attention(pack, lengths, heads, clock))
        record.add("attention", asdict(packs[-1]))
    console.print(attention_table(packs))

    blocks = []
    for case in block_cases(quick):
        if deadlines["blocks"].passed:
            record.add("left_out", f"block, {case}")
            continue
        results = measure_block(case, limits["matmul_tflop_s"], clock)
        blocks += results
        record.add("blocks", *map(asdict, results))
        torch.cuda.empty_cache()
    console.print(block_table(blocks))
    record.put("limits_at_the_end", measure_limits(clock))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file, or a folder for one named after the GPU; with a picture")
    parser.add_argument("--quick", action="store_true", help="one width, fewer shapes, in 2 minutes")
    parser.add_argument("--minutes", type=float, help=f"that are not exceeded by much; {MINUTES:g} if not --quick")
    parser.add_argument("--tune", action="store_true", help="try other cuts of our kernels; nothing is written")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU)
        return
    console = Console(width=170)
    if options.tune:
        tune(Clock(), console)
        return

    gpu = gpu_surroundings()
    path = record_path(options.out, str(gpu["name"]))
    record = Record(path, surroundings() | {"gpu": gpu})
    run(record, options.quick, options.minutes or (QUICK_MINUTES if options.quick else MINUTES), console)
    if path is not None:
        draw(record.head | record.body, path.with_suffix(".png"))
        console.print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()

"""FP8 products of linears (model.fp8_recipe), against those in bf16: python -m benchmarks.float8 [--out FILE.json]

Without --curves, on a GPU: forward and backward of a block's linears in the shapes of Wan, by each recipe, in
alternating trials (gpu.py), quantization included; and the passes of quantization alone. Without a GPU, or with
REHEARSE=1 in the environment, the same with tiny shapes and emulated products: its times mean nothing.

--curves WORK    trains the same small model with every recipe, from the same seeds, emulated on a CPU in bf16: makes
                 and ingests clips below WORK, trains, and compares. A run in fp32 without FP8 shows how far rounding to
                 bf16 alone takes two runs apart. Complete runs below WORK are kept, others are resumed.

    smoothed     mean training loss of `SMOOTHING` steps
    largest      largest relative difference of the smoothed loss to that of `none`, after `SETTLED` steps
    final        of the last smoothed loss
    validation   of the last validation loss, mean of all timesteps
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.gpu import CudaTimer, gpu_environment, measure_limits, run_trials
from benchmarks.record import environment, write_record
from megasora.kernels.float8 import E4M3, quantize, why_not
from megasora.kernels.linear import PLAIN, RECIPES, Float8Products, Linear

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"Wan-1.3B": (36_864, 1536, 8_960), "Wan-14B": (36_864, 5120, 13_824)}  # tokens, width, MLP width
TINY = {"tiny": (64, 32, 48)}
VARIANTS = ("bf16", *RECIPES)
SMOOTHING, SETTLED = 20, 60  # steps
CURVES = {  # name of a run: settings
    "none": ["model.fp8_recipe=none"],
    **{recipe: [f"model.fp8_recipe={recipe}"] for recipe in RECIPES},
    "float32": ["model.fp8_recipe=none", "run.dtype=float32"],
}
SETTINGS = [  # of configs/demo.yaml, for a codec without weights and fewer steps
    "run.device=cpu", "run.dtype=bfloat16", "run.threads=1", "codec.name=dct", "codec.path=", "optim.warmup_steps=50",
    "optim.ema_decay=0.9", "validation.every=50", "evaluation.prompts=0", "wandb.mode=disabled",
]  # fmt: skip


# ---------------------------------------------------------------------- speed


@dataclass(frozen=True)
class LinearResult:
    shape: str
    linear: str
    tokens: int
    inputs: int
    outputs: int
    variant: str
    forward_ms: float | None  # None: see error
    backward_ms: float | None
    tflop_s: float | None
    error: str | None = None


class WallTimer:
    """`CudaTimer` without a GPU."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    def time(self, name: str, function: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = function()
        self.ms[name] = self.ms.get(name, 0.0) + 1e3 * (time.perf_counter() - start)
        return result

    def pop_times(self) -> dict[str, float]:
        ms, self.ms = self.ms, {}
        return ms

    def discard(self) -> None:
        self.ms = {}


def linears_of(width: int, hidden: int) -> dict[str, tuple[int, int, int]]:
    """Name: input features, output features, how many of a block have this shape."""
    return {
        "qkv": (width, 3 * width, 1),
        "q, out": (width, width, 3),  # out of self-attention, q and out of cross-attention
        "up": (width, hidden, 1),
        "down": (hidden, width, 1),
    }


def measure_linear(shape: str, name: str, tokens: int, inputs: int, outputs: int, timer, device) -> list[LinearResult]:
    module = Linear(inputs, outputs).to(device, torch.bfloat16)
    x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, outputs, device=device, dtype=torch.bfloat16)

    def trial(variant: str) -> Callable:
        products = PLAIN if variant == "bf16" else Float8Products(variant)

        def run(timer) -> None:
            reason = None if variant == "bf16" else why_not(x.device, variant != "tensorwise")
            if reason is not None:
                raise RuntimeError(reason)
            module.products = products
            y = timer.time("forward", lambda: module(x))
            timer.time("backward", lambda: torch.autograd.grad(y, [x, module.weight, module.bias], grad))

        return run

    results = []
    for variant, times in run_trials({v: trial(v) for v in VARIANTS}, timer).items():
        sizes = (shape, name, tokens, inputs, outputs, variant)
        if times.error is not None:
            results.append(LinearResult(*sizes, None, None, None, times.error))
            continue
        forward, backward = times.medians["forward"], times.medians["backward"]
        results.append(LinearResult(*sizes, forward, backward, 6e-9 * tokens * inputs * outputs / (forward + backward)))
    return results


def measure_quantize(tokens: int, width: int, timer, device) -> dict[str, float]:
    """Milliseconds of each way to quantize [tokens, width]."""
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)

    def trial(matrix: Tensor, per_row: bool) -> Callable:
        return lambda timer: timer.time("pass", lambda: quantize(matrix, E4M3, per_row))

    ways = {
        "per row": trial(x, True),
        "per tensor": trial(x, False),
        "per column, transposed": trial(x.t(), True),
    }
    return {name: times.medians["pass"] for name, times in run_trials(ways, timer).items() if times.error is None}


def speed(console: Console) -> dict[str, object]:
    on_gpu = torch.cuda.is_available() and not os.environ.get("REHEARSE")
    timer, device = (CudaTimer(), "cuda") if on_gpu else (WallTimer(), "cpu")
    if not on_gpu:
        console.print("no GPU: tiny shapes and emulated products, to show that it runs; the times mean nothing")
    results: list[LinearResult] = []
    quantized: dict[str, dict[str, float]] = {}
    limits = measure_limits(timer) if on_gpu else {}
    for shape, (tokens, width, hidden) in (SHAPES if on_gpu else TINY).items():
        for name, (inputs, outputs, _) in linears_of(width, hidden).items():
            results += measure_linear(shape, name, tokens, inputs, outputs, timer, device)
        quantized[shape] = measure_quantize(tokens, width, timer, device)
    console.print(table_of_linears(results))
    for shape, ms in quantized.items():
        tokens, width, _ = {**SHAPES, **TINY}[shape]
        gb_s = {way: 5e-6 * tokens * width / value for way, value in ms.items()}  # 2 for the maximum, 3 for the values
        console.print(f"quantize [{tokens}, {width}]: " + ", ".join(f"{way} {v:.0f} GB/s" for way, v in gb_s.items()))
    for error in sorted({f"{r.variant}: {r.error}" for r in results if r.error}):
        console.print(error)
    return {
        "gpu": gpu_environment() if on_gpu else None,
        "emulated": not on_gpu,
        "limits": limits,
        "linears": [asdict(r) for r in results],
        "quantize_ms": quantized,
    }


def table_of_linears(results: list[LinearResult]) -> Table:
    table = Table(title="linears of a block: forward + backward, ms (times as fast as bf16)")
    for column in ("shape", "linear", "of a block", *VARIANTS):
        table.add_column(column, justify="left" if column in ("shape", "linear") else "right")
    sizes = {**SHAPES, **TINY}
    for shape in dict.fromkeys(r.shape for r in results):
        _, width, hidden = sizes[shape]
        totals = dict.fromkeys(VARIANTS, 0.0)
        for name, (*_, count) in linears_of(width, hidden).items():
            ms = {r.variant: total_ms(r) for r in results if (r.shape, r.linear) == (shape, name)}
            totals = {v: totals[v] + count * ms[v] for v in VARIANTS}
            table.add_row(shape, name, str(count), *(cell(ms[v], ms["bf16"]) for v in VARIANTS))
        table.add_row(shape, "all", "6", *(cell(totals[v], totals["bf16"]) for v in VARIANTS), end_section=True)
    return table


def total_ms(result: LinearResult) -> float:
    """NaN if it failed."""
    return float("nan") if result.error is not None else result.forward_ms + result.backward_ms


def cell(ms: float, bf16_ms: float) -> str:
    return "-" if np.isnan(ms) else f"{ms:.2f} ({bf16_ms / ms:.2f})"


# ---------------------------------------------------------------------- loss curves


@dataclass(frozen=True)
class Curve:
    recipe: str
    losses: list[float]  # of each training step
    validation: dict[int, float]  # loss by step


@dataclass(frozen=True)
class Difference:
    """Relative differences to the curve of `none`."""

    recipe: str
    steps: int
    largest: float
    final: float
    validation: float
    validation_step: int


def train_curves(work: Path, steps: int) -> list[Curve]:
    if not (work / "shards" / "dataset.json").exists():
        run("tools/make_clips.py", "--out", work / "clips", "--clips", 600, "--val-clips", 64)
        run("-m", "megasora.cli", "ingest", work / "clips", "--out", work / "shards", "codec.name=dct")
    for name, settings in CURVES.items():
        data = [f"run.dir={work / 'runs' / name}", f"run.steps={steps}", f"data.shards={work / 'shards'}"]
        run("-m", "megasora.train", "configs/demo.yaml", *SETTINGS, *data, *settings)
    return [read_curve(work / "runs" / name, name) for name in CURVES]


def run(*command: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT, env=environment)


def read_curve(run_dir: Path, name: str) -> Curve:
    lines, validated = (
        [json.loads(line) for line in (run_dir / file).read_text(encoding="utf-8").splitlines()]
        for file in ("metrics.jsonl", "validation.jsonl")
    )
    return Curve(name, [line["loss"] for line in lines], {line["step"]: line["loss"] for line in validated})


def compare(curve: Curve, none: Curve) -> Difference:
    """Over the steps that both have."""
    steps = min(len(curve.losses), len(none.losses))
    window = np.full(SMOOTHING, 1 / SMOOTHING)
    ours, theirs = (np.convolve(c.losses[:steps], window, "valid") for c in (curve, none))
    differences, last = np.abs(ours / theirs - 1), max(curve.validation.keys() & none.validation.keys())
    settled = differences[max(0, min(SETTLED - SMOOTHING, len(differences) - 1)) :]
    validation = abs(curve.validation[last] / none.validation[last] - 1)
    return Difference(curve.recipe, steps, float(settled.max()), float(differences[-1]), validation, last)


def table_of_curves(curves: list[Curve], differences: list[Difference]) -> Table:
    table = Table(title="difference to the loss without FP8")
    for column in ("recipe", "steps", "last smoothed loss", "validation loss", "largest", "final", "validation"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for curve, d in zip(curves, differences, strict=True):
        smoothed = np.mean(curve.losses[d.steps - SMOOTHING : d.steps])
        losses = f"{smoothed:.4f}", f"{curve.validation[d.validation_step]:.4f} (step {d.validation_step})"
        table.add_row(d.recipe, str(d.steps), *losses, *(f"{v:.2%}" for v in (d.largest, d.final, d.validation)))
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    parser.add_argument("--curves", type=Path, metavar="WORK", help="compare loss curves; folder of clips and runs")
    parser.add_argument("--steps", type=int, default=300, help="of a loss curve (default 300)")
    options = parser.parse_args(arguments)
    head, console = environment(), Console(width=140)
    if options.curves is None:
        body = speed(console)
    else:
        curves = train_curves(options.curves.resolve(), options.steps)
        differences = [compare(curve, curves[0]) for curve in curves]
        console.print(table_of_curves(curves, differences))
        body = {"curves": [asdict(c) for c in curves], "differences": [asdict(d) for d in differences]}
    if options.out:
        write_record(options.out, head, body)
        console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

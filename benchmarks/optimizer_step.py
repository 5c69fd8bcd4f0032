"""The optimizer step in one pass over memory, and in the passes that it replaces: python -m benchmarks.optimizer_step

    apart    norm and clipping tensor by tensor, torch.optim.AdamW over the flat weights, a copy in bf16, the average,
             and gradients zeroed twice: the passes of DeepSpeed's BF16_Optimizer and of a separate average
    fused    sum_of_squares and adamw_ of kernels/adamw.py; gradients are overwritten by the next pack, not zeroed
    add      the bf16 gradients of a pack, added to the fp32 sums: converted and then added, or added at once

Counted without a GPU, on small tensors of the same proportions: bytes per weight, in Triton's interpreter, and launches
on a GPU: operators and kernels, where a fused or foreach one of PyTorch counts once. Times are those of this device: of
a GPU if there is one, in milliseconds for --weights; else of one CPU core. No cache is modelled in the bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from benchmarks.record import environment, write_record
from megasora.kernels.adamw import AdamWRule, Averages, adamw_, sum_of_squares

GPU_WEIGHTS, CPU_WEIGHTS, COUNTED_WEIGHTS = 1_420_000_000, 16_000_000, 1 << 17
TENSORS = 770  # of Wan-1.3B's shape with 1.42 B weights
VECTOR_SHARE = 1e-3  # of the weights: biases and norms, which are two of three tensors
MAX_NORM, DECAY = 1.0, 0.9999
RULE = AdamWRule(lr=1e-4, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01, number=10)
TRIALS = 7
FREE = ("view", "detach", "split", "slice", "select", "unbind", "as_strided", "alias", "empty", "narrow", "t")


def sizes_of(weights: int, tensors: int = TENSORS) -> list[int]:
    """Elements of each tensor: two of three are vectors; together `weights`."""
    vectors = tensors * 2 // 3
    vector = max(1, int(weights * VECTOR_SHARE) // vectors)
    matrix = (weights - vectors * vector) // (tensors - vectors)
    sizes = [vector if i % 3 else matrix for i in range(tensors - 1)]
    return [*sizes, weights - sum(sizes)]


class Problem:
    """Weights, moments, gradients and an average, flat, as on one rank."""

    def __init__(self, weights: int, device: torch.device, backend: str):
        self.backend = backend
        zeros = [torch.zeros(weights, device=device) for _ in range(5)]
        self.w, self.m, self.v, self.grad, self.average = zeros
        self.grad.fill_(1e-3)
        self.compute = torch.zeros(weights, dtype=torch.bfloat16, device=device)
        self.pack_grad = torch.full_like(self.compute, 1e-3)
        sizes = sizes_of(weights)
        self.grads, self.pack_grads = self.grad.split(sizes), self.pack_grad.split(sizes)
        self.parameter = torch.nn.Parameter(self.w)
        is_fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW([self.parameter], lr=RULE.lr, betas=RULE[1:3], eps=RULE.eps, fused=is_fused)
        step = torch.tensor(float(RULE.number), device=device if is_fused else "cpu")
        self.optimizer.state[self.parameter] = {"step": step, "exp_avg": self.m, "exp_avg_sq": self.v}

    @torch.no_grad()
    def apart(self) -> None:
        norm = torch.stack([torch.linalg.vector_norm(grad) for grad in self.grads]).square().sum().sqrt()
        factor = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        for grad in self.grads:
            grad.mul_(factor)
        self.parameter.grad = self.grad
        self.optimizer.step()
        self.compute.copy_(self.w)
        torch._foreach_lerp_([self.average], [self.w], 1 - DECAY)
        self.grad.zero_()
        self.grad.zero_()

    @torch.no_grad()
    def fused(self) -> None:
        norm = sum_of_squares(self.grad, self.backend).sqrt()
        factor = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0).float()
        averages = Averages([self.average], [1 - DECAY])
        adamw_(self.w, self.m, self.v, self.grad, RULE, factor, norm.isfinite(), averages, self.compute, self.backend)

    @torch.no_grad()
    def add_apart(self) -> None:
        for total, grad in zip(self.grads, self.pack_grads, strict=True):
            total.add_(grad.to(total.dtype))

    @torch.no_grad()
    def add_fused(self) -> None:
        for total, grad in zip(self.grads, self.pack_grads, strict=True):
            total.add_(grad)

    def variants(self) -> dict[str, Callable[[], None]]:
        return {"apart": self.apart, "fused": self.fused, "add, apart": self.add_apart, "add, at once": self.add_fused}


@dataclass(frozen=True)
class Result:
    variant: str
    bytes_per_weight: float
    launches: int
    ms: float


class Launches(TorchDispatchMode):
    """Counts operators that do work on a device, and Triton kernels, which do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.kernels = 0, mock.patch.object(GridExecutor, "__call__", self.launch)

    def __enter__(self) -> Launches:
        self.kernels.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.kernels.stop()

    def launch(self, *arguments: object, **named: object) -> None:
        self.count += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        self.count += not name.startswith(FREE)
        return func(*args, **(kwargs or {}))


def count(weights: int) -> dict[str, tuple[float, int]]:
    """(bytes per weight, launches) of each variant. In a process with Triton's interpreter."""
    from megasora.testing.memory_traffic import MemoryTraffic

    problem, counts = Problem(weights, torch.device("cpu"), "triton"), {}
    # on a GPU AdamW is one launch that loads w, m, v and the gradient, and stores w, m and v
    problem.optimizer.step = lambda: torch._fused_adamw_(
        [problem.w], [problem.grad], [problem.m], [problem.v], [], [torch.tensor(1.0)], lr=RULE.lr, beta1=RULE.beta1,
        beta2=RULE.beta2, weight_decay=RULE.weight_decay, eps=RULE.eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    for variant, run in problem.variants().items():
        with MemoryTraffic() as traffic:
            run()
        total = traffic.bytes
        if variant == "apart":  # counted as w, m, v and grad both loaded and stored
            assert traffic.by_argument["aten._fused_adamw_"] > 0
            total += 28 * weights - traffic.by_argument["aten._fused_adamw_"]
        with Launches() as launches:
            run()
        counts[variant] = total / weights, launches.count
    return counts


def count_in_interpreter(weights: int) -> dict[str, tuple[float, int]]:
    """`count`, in a process of its own: kernels of this one may not be interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.json"
        command = [sys.executable, "-m", "benchmarks.optimizer_step", "--count", str(weights), "--out", str(path)]
        subprocess.run(command, check=True, env=environment)
        return json.loads(path.read_text(encoding="utf-8"))


def measure(weights: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each variant: the median of trials that take turns."""
    problem = Problem(weights, device, "auto")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {variant: [] for variant in problem.variants()}
    for trial in range(TRIALS + 1):
        for variant, run in problem.variants().items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if trial:  # the first one compiles
                times[variant].append(1e3 * (time.perf_counter() - start))
    return {variant: median(values) for variant, values in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=int, help=f"{GPU_WEIGHTS:,} on a GPU, {CPU_WEIGHTS:,} on a CPU by default")
    parser.add_argument("--count", type=int, help="only count, in this process, with so many weights")
    parser.add_argument("--out", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    if options.count:
        options.out.write_text(json.dumps(count(options.count)), encoding="utf-8")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "one CPU core"
    weights = options.weights or (GPU_WEIGHTS if device.type == "cuda" else CPU_WEIGHTS)
    times = measure(weights, device)
    try:
        counts = count_in_interpreter(COUNTED_WEIGHTS)
    except subprocess.CalledProcessError:  # Triton 3.6's interpreter fails with numpy 2.4 and later
        counts = {}
    results = [Result(variant, *counts.get(variant, (float("nan"), 0)), ms) for variant, ms in times.items()]
    title = f"optimizer step of {weights:,} weights in {TENSORS} tensors, one average; {name}"
    Console(width=120).print(table_of(title, weights, results))
    if options.out:
        body = {"device": name, "weights": weights, "results": [asdict(result) for result in results]}
        write_record(options.out, environment(), body)


def table_of(title: str, weights: int, results: list[Result]) -> Table:
    table = Table(title=title)
    for column in ("variant", "bytes a weight", "launches", "ms", "GB/s"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for r in results:
        gb_s = r.bytes_per_weight * weights / r.ms / 1e6
        table.add_row(r.variant, f"{r.bytes_per_weight:.1f}", str(r.launches), f"{r.ms:.2f}", f"{gb_s:.0f}")
    return table


if __name__ == "__main__":
    main()

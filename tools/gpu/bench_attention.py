"""bench_attention.py OUT.json: TFLOP/s and relative error of every attention backend here, in both orders of sums.

Cases are packs of Wan's shapes: one clip, a long clip with many short ones, several equal clips, clips of several
lengths, and cross-attention to captions. `auto`: what model.attention_backend=auto takes for the case. `first_ms`: the
first forward and backward pass, with what a library compiles or plans for a new shape; `host_ms`: of the host, to
launch a forward pass. Errors are relative to the first implementation that ran. REHEARSE=1: tiny cases on a CPU,
without times.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from megasora.kernels.attention import Segments, attention
from megasora.kernels.attention_choice import BACKENDS, auto_backend, obstacle

HEAD_DIM = 128
REHEARSE = bool(os.environ.get("REHEARSE"))
DEVICE = torch.device("cpu") if REHEARSE else torch.device("cuda", 0)
DTYPE = torch.float32 if REHEARSE else torch.bfloat16
WARMUPS, TRIALS = (0, 1) if REHEARSE else (1, 3)
CASES = {  # name: (tokens of the clips, heads, text tokens of each or 0 for self-attention)
    "14B, one clip of 36,864": ([36_864], 40, 0),
    "1.3B, one clip of 36,864": ([36_864], 12, 0),
    "1.3B, 29,184 and 60 x 128": ([29_184] + [128] * 60, 12, 0),
    "14B, 8 clips of 4,608": ([4_608] * 8, 40, 0),
    "1.3B, 4 clips of 6,400 to 12,288": ([6_400, 8_192, 10_240, 12_288], 12, 0),
    "14B, caption of 512": ([36_864], 40, 512),
    "1.3B, caption of 20": ([36_864], 12, 20),
    "14B, caption of 20": ([36_864], 40, 20),
    "1.3B, caption of 512": ([36_864], 12, 512),
}
ORDERS = ("deterministic", "any order")
REHEARSED_CASES = {"small": ([96], 2, 0), "small, 2 lengths": ([40, 64], 2, 0), "small, caption": ([96], 2, 7)}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def implementations(segments: Segments) -> dict[str, Attention]:
    """Each backend of this machine in each order of sums that it has; "math" would take too much memory."""

    def implementation(backend: str, deterministic: bool) -> Attention:
        return lambda q, k, v: attention(q, k, v, segments, backend=backend, deterministic=deterministic)

    return {
        f"{backend}, {'deterministic' if deterministic else 'any order'}": implementation(backend, deterministic)
        for backend in BACKENDS
        for deterministic in (False, True)
        if obstacle(backend, DEVICE, DTYPE, HEAD_DIM, deterministic) is None
        and (REHEARSE or backend not in ("math", "sdpa") or (backend == "sdpa" and not deterministic))
    }


def synchronized_time() -> float:
    if not REHEARSE:
        torch.cuda.synchronize()
    return time.perf_counter()


def synchronized_ms(begin: float) -> float:
    return (synchronized_time() - begin) * 1e3


def median_ms(function: Callable[[], object]) -> float:
    times = []
    for _ in range(WARMUPS + TRIALS):
        if REHEARSE:
            function()
            times.append(1.0)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[WARMUPS:])[TRIALS // 2]


def measure(
    function: Attention, inputs: list[Tensor], flops: float, expected: list[Tensor] | None
) -> tuple[dict, list[Tensor]]:
    """(figures, output and gradients in fp32). `flops`: of the forward pass; the backward pass has 2.5 times that."""
    before = 0
    if not REHEARSE:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    out = function(*inputs)
    grad = torch.ones_like(out) / 8
    gradients = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    first_ms = synchronized_ms(begin)
    results = [x.detach().float() for x in (out, *gradients)]
    again = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    repeats = all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    del gradients, again
    begin = synchronized_time()
    function(*inputs)
    host_ms = (time.perf_counter() - begin) * 1e3
    forward = median_ms(lambda: function(*inputs))
    backward = median_ms(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(results, expected or results, strict=True)]
    figures = {
        "relative_error": max(errors),
        "gradients_repeat_bitwise": repeats,
        "first_ms": first_ms,
        "host_ms": host_ms,
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tflop_per_s": flops / forward / 1e9,
        "backward_tflop_per_s": 2.5 * flops / backward / 1e9,
    }
    if not REHEARSE:
        figures["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return figures, results


def run(out: str, lines: list[dict]) -> None:
    """Measures all cases; writes the file after each, so that what is measured survives a time limit."""
    for case, (lengths, heads, text) in (REHEARSED_CASES if REHEARSE else CASES).items():
        keys = [text or n for n in lengths]
        cu_q, cu_k = (torch.tensor([0, *accumulate(x)], dtype=torch.int32) for x in (lengths, keys))
        segments = Segments.from_cu_seqlens(cu_q, cu_k, sum(lengths), DEVICE)
        flops = 4.0 * heads * HEAD_DIM * sum(n * m for n, m in zip(lengths, keys, strict=True))
        shapes = [(n, heads, HEAD_DIM) for n in (sum(lengths), sum(keys), sum(keys))]
        inputs = [torch.randn(shape, dtype=DTYPE, device=DEVICE, requires_grad=True) for shape in shapes]
        expected = None
        auto = {order: auto_backend(inputs[0], segments, order == "deterministic") for order in ORDERS}
        for name, function in implementations(segments).items():
            backend, order = name.split(", ")
            line = {"case": case, "implementation": name, "auto": auto[order] == backend}
            try:
                figures, results = measure(function, inputs, flops, expected)
                line |= figures
                expected = expected or results
            except Exception as error:  # out of memory, or no kernel for this shape
                line["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            lines.append(line)
            with open(out, "w", encoding="utf-8") as file:
                json.dump(lines, file, indent=1)
            print(f"{case:33} {name:22}", line.get("error") or summary(line), flush=True)


def summary(line: dict) -> str:
    return (
        f"{line['forward_tflop_per_s']:6.0f} | {line['backward_tflop_per_s']:6.0f} TFLOP/s, "
        f"{line['forward_ms']:8.2f} | {line['backward_ms']:8.2f} ms, relative error {line['relative_error']:.1e}"
        f", first {line['first_ms']:.0f} ms, host {line['host_ms']:.2f} ms"
        + (", repeats" if line["gradients_repeat_bitwise"] else "")
        + (", auto" if line["auto"] else "")
    )


def main() -> None:
    run(sys.argv[1], [])


if __name__ == "__main__":
    main()

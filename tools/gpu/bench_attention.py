"""bench_attention.py OUT.json: TFLOP/s and relative error of every attention implementation of this machine.

Cases are packs of Wan's shapes: one clip, a long clip with many short ones, several equal clips, and cross-attention to
captions. Errors are relative to the first implementation that ran. REHEARSE=1: tiny cases on a CPU, without times.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megasora.kernels.attention import Segments, attention, obstacle

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
    "14B, caption of 512": ([36_864], 40, 512),
    "1.3B, caption of 20": ([36_864], 12, 20),
}
REHEARSED_CASES = {"small": ([96], 2, 0), "small, caption": ([96], 2, 7)}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def cudnn_dense(lengths: list[int], heads: int) -> Attention:
    """cuDNN's attention by PyTorch, for clips of one length as a batch."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(set(lengths)) > 1:
            raise ValueError("dense attention needs clips of one length")
        q, k, v = (x.view(len(lengths), -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.MATH if REHEARSE else SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, heads, q.shape[-1])

    return dense


def implementations(segments: Segments, lengths: list[int], heads: int) -> dict[str, Attention]:
    def megasora_attention(backend: str, deterministic: bool) -> Attention:
        return lambda q, k, v: attention(q, k, v, segments, backend=backend, deterministic=deterministic)

    result = {}
    for backend in ("flash4", "flash3", "flash2", "varlen"):
        if obstacle(backend, DEVICE, DTYPE, HEAD_DIM) is None:
            result[f"{backend}, nondeterministic"] = megasora_attention(backend, False)
            result[f"{backend}, deterministic"] = megasora_attention(backend, True)
    result["sdpa, nondeterministic"] = megasora_attention("sdpa", False)
    result["cuDNN by torch, dense"] = cudnn_dense(lengths, heads)
    return result


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
    out = function(*inputs)
    grad = torch.ones_like(out) / 8
    gradients = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    results = [x.detach().float() for x in (out, *gradients)]
    again = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    repeats = all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    del gradients, again
    forward = median_ms(lambda: function(*inputs))
    backward = median_ms(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(results, expected or results, strict=True)]
    figures = {
        "relative_error": max(errors),
        "gradients_repeat_bitwise": repeats,
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
        for name, function in implementations(segments, lengths, heads).items():
            line = {"case": case, "implementation": name}
            try:
                figures, results = measure(function, inputs, flops, expected)
                line |= figures
                expected = expected or results
            except Exception as error:  # out of memory, or no kernel for this shape
                line["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            lines.append(line)
            with open(out, "w", encoding="utf-8") as file:
                json.dump(lines, file, indent=1)
            print(f"{case:28} {name:26}", line.get("error") or summary(line), flush=True)


def summary(line: dict) -> str:
    return (
        f"{line['forward_tflop_per_s']:6.0f} | {line['backward_tflop_per_s']:6.0f} TFLOP/s, "
        f"{line['forward_ms']:8.2f} | {line['backward_ms']:8.2f} ms, relative error {line['relative_error']:.1e}"
        + (", repeats" if line["gradients_repeat_bitwise"] else "")
    )


def main() -> None:
    run(sys.argv[1], [])


if __name__ == "__main__":
    main()

"""Figures of a device: memory in use and attainable speed."""

from __future__ import annotations

import resource

import torch
from torch import Tensor


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the GPU, or on a CPU the most that was resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_matmul_flops_per_s(device: torch.device, size: int = 8192, repeats: int = 10) -> float:
    """Runs a large bf16 matrix product on this GPU; returns its FLOP/s, which MFU is relative to."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product: Tensor = a @ a
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        torch.matmul(a, a, out=product)
    end.record()
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (start.elapsed_time(end) / 1000)

"""Figures of a step on a device: memory in use, speed, times."""

from __future__ import annotations

import resource
from typing import Any

import torch

from megasora.parallel.world import World


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the GPU, or on a CPU the most that was resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def speed_columns(
    times: dict[str, float], num_items: int, unit: str, flops: float, matmul_flops_per_s: float | None, world: World
) -> dict[str, Any]:
    """What metrics.jsonl has of the speed and memory of a step; `times`: seconds by name, with `step`, of this rank.

    `num_items`, of `unit`, and `flops`: of the step on all ranks. `matmul_flops_per_s`: of one device, None if it was
    not measured.
    """
    return {
        f"{unit}_per_second": num_items / times["step"],
        **{f"time_{name}": round(seconds, 5) for name, seconds in times.items()},
        "mfu": flops / times["step"] / (matmul_flops_per_s * world.size) if matmul_flops_per_s else None,
        "peak_memory_gib": round(peak_memory(world.device) / 2**30, 3),
    }

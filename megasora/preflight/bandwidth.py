"""Bandwidth between nodes: exchanges with two partners, and an all-reduce over all nodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import TCPStore

TIMEOUT_SECONDS = 5.0
MESSAGE_BYTES, REPEATS = 4 << 20, 10


def measure_bandwidth(store: TCPStore, rank: int, size: int, device: str) -> tuple[float, float]:
    """GiB/s of this node (`rank` of `size` nodes) with its faster partner, and of an all-reduce over all nodes.

    Raises RuntimeError if a node does not answer or a sum is wrong.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=dist.PrefixStore("bandwidth", store), rank=rank, world_size=size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )  # fmt: skip
    data = torch.ones(MESSAGE_BYTES // 4, device=device)
    received = torch.empty_like(data)
    rates = []
    for distance in (1, 2):  # with two partners a slow node is distinguished from a slow partner
        partner = rank ^ distance
        if partner < size:
            rates.append(gib_per_second(lambda p=partner: exchange(data, received, p), device))
        dist.barrier()
    all_reduce_rate = gib_per_second(lambda: all_reduce_mean(data), device) if size > 1 else 0.0
    if abs(float(data[0]) - 1) > 1e-5:
        raise RuntimeError("a sum over the nodes is wrong")
    dist.destroy_process_group()
    return max(rates, default=0.0), all_reduce_rate


def exchange(data: Tensor, received: Tensor, partner: int) -> None:
    import torch.distributed as dist

    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, data, partner), dist.P2POp(dist.irecv, received, partner)])
    for work in works:
        work.wait()


def all_reduce_mean(data: Tensor) -> None:
    import torch.distributed as dist

    dist.all_reduce(data)
    data /= dist.get_world_size()


def gib_per_second(transfer: Callable[[], object], device: str) -> float:
    """The highest rate at which `transfer` moves MESSAGE_BYTES, after one call that opens the connections."""
    import torch

    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        transfer()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return MESSAGE_BYTES / min(times[1:]) / (1 << 30)

"""Products of tensor-parallel matrices over symmetric memory: memory of all GPUs of a node that each of them can read.

    all_gather_matmul        tokens of a peer are copied, multiplied, and those of the next are copied meanwhile
    matmul_reduce_scatter    the product for a peer is computed while that for the one before is copied to it

The values are those of the collectives in tensor.py, up to the order of sums. There, one collective brings the tokens
of all peers, on multiprocessors that the product then lacks; here copy engines do, one peer at a time, so that products
begin with the first. The operators are PyTorch's (`torch.ops.symm_mem`), for GPUs that are connected
by NVLink. `obstacle` says why ranks cannot use them.

Letters: `t` ranks, `L` tokens of all, `D` and `F` features.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory  # noqa: F401  registers torch.ops.symm_mem
from torch import Tensor

from megasora.parallel.mesh import Axis

PROBED_TOKENS, PROBED_FEATURES = 64, 128


def all_gather_matmul(x: Tensor, matrix: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """(the product [L, F] of all ranks' x with `matrix`, all ranks' x [L, D]), for x [L/t, D] and `matrix` [D, F]."""
    full, (y,) = torch.ops.symm_mem.fused_all_gather_matmul(x.contiguous(), [matrix], 0, axis.group.group_name)
    return y, full


def matmul_reduce_scatter(x: Tensor, matrix: Tensor, axis: Axis) -> Tensor:
    """This rank's tokens [L/t, D] of the sum of all ranks' products, for x [L, F] and `matrix` [F, D]."""
    return torch.ops.symm_mem.fused_matmul_reduce_scatter(x.contiguous(), matrix, "sum", 0, axis.group.group_name)


def obstacle(axis: Axis, device: torch.device) -> str | None:
    """Why the ranks of an axis cannot use symmetric memory; None if they can. All of them must call it, and all get the
    same answer: that of the first rank that has one. It computes both products of small matrices as a trial."""
    nodes, reasons = zip(*gathered((platform.node(), missing(axis, device)), axis), strict=True)
    if not any(reasons) and len(set(nodes)) > 1:
        return f"its ranks are on {len(set(nodes))} nodes"
    if not any(reasons):
        reasons = gathered(failed_trial(axis, device), axis)
    return next((reason for reason in reasons if reason is not None), None)


def gathered(value: Any, axis: Axis) -> list[Any]:
    """The values of all ranks of the axis."""
    values = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def missing(axis: Axis, device: torch.device) -> str | None:
    """What this rank lacks, as far as it knows by itself."""
    if not axis.is_split:
        return "parallel.tensor is 1"
    if device.type != "cuda":
        return f"it needs GPUs, not {device.type}"
    if not hasattr(torch.ops.symm_mem, "fused_all_gather_matmul"):
        return f"torch {torch.__version__} has no operators for it"
    own = torch.cuda.current_device() if device.index is None else device.index
    others = (gpu for gpu in range(torch.cuda.device_count()) if gpu != own)
    unreachable = [gpu for gpu in others if not torch.cuda.can_device_access_peer(own, gpu)]
    return f"GPU {own} cannot read the memory of GPU {unreachable[0]}" if unreachable else None


def failed_trial(axis: Axis, device: torch.device) -> str | None:
    """The error of both products of small matrices on this rank; None if they are those of the collectives."""
    x = torch.full((PROBED_TOKENS, PROBED_FEATURES), 1.0 + axis.rank, dtype=torch.bfloat16, device=device)
    matrix = torch.ones(PROBED_FEATURES, PROBED_FEATURES, dtype=torch.bfloat16, device=device)
    try:
        y, full = all_gather_matmul(x, matrix, axis)
        summed = matmul_reduce_scatter(full, matrix, axis)
    except (RuntimeError, AssertionError, ValueError) as error:  # of a driver, a container, a group over nodes
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    rows = torch.arange(1, axis.size + 1, device=device).repeat_interleave(PROBED_TOKENS)[:, None]
    expected = PROBED_FEATURES * rows  # of y, exact in bfloat16
    if not (full == rows).all() or not (y == expected).all():
        return "the product of gathered tokens is wrong"
    own = slice(PROBED_TOKENS * axis.rank, PROBED_TOKENS * (axis.rank + 1))
    return None if (summed == axis.size * expected[own]).all() else "the summed product is wrong"

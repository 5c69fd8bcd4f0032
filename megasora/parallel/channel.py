"""A channel from one process to another, for threads: it has no part in the groups of the steps.

Both ends open it at the same time; then a thread of one sends tensors, and a thread of the other receives them in the
same order. It lasts as long as the launch: a hang of the other process is noticed by the watchdog.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

TIMEOUT = timedelta(days=1)  # of one message; the watchdog ends a hang first


class Channel:
    """One end of a channel over gloo. `name`: unique in the launch, the same on both ends. `rank`: of this process."""

    def __init__(self, name: str, sender: int, receiver: int, rank: int):
        own = int(rank == receiver)
        store = dist.PrefixStore(f"channel/{name}/{sender}-{receiver}", _get_default_store())
        # not new_group: its name depends on how many groups a process is in, which ends of a channel need not agree on
        self.group, self.other = dist.ProcessGroupGloo(store, own, 2, TIMEOUT), 1 - own

    def send(self, data: Tensor) -> None:
        """Returns once `data`, on the CPU and contiguous, may change."""
        self.group.send([data], self.other, 0).wait()

    def receive(self, count: int, dtype: torch.dtype) -> Tensor:
        """The next tensor, [count] of `dtype`, as it was sent."""
        data = torch.empty(count, dtype=dtype)
        self.group.recv([data], self.other, 0).wait()
        return data

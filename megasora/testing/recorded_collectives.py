"""Records what a rank sends and receives: every collective and every point-to-point message of a piece of code.

    with RecordedCollectives() as recorded:
        trainer.train_step(...)
    recorded.messages  # [Message("all_reduce", torch.float32, 212584, ranks=(1, 3, 5, 7)), ...]

The calls are recorded in PyTorch's dispatcher, so it does not matter which library makes them, or in which autograd
function. It works on any process group. On torch's fake group (`megasora.testing.spawn.run_fake_rank`) one process is
one rank of a world of any size, e.g. rank 77 of 512.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Message:
    """One call of a collective, or one side of a point-to-point message."""

    op: str  # all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, barrier, send or recv
    dtype: torch.dtype
    elements: int  # of the whole tensor: the output of an all-gather, the input of a reduce-scatter
    ranks: tuple[int, ...]  # global ranks of the process group


class Traffic(NamedTuple):
    """What messages are summed by; see `traffic`."""

    op: str
    dtype: torch.dtype
    ranks: tuple[int, ...]


def traffic(messages: list[Message]) -> Counter[Traffic]:
    """Elements by (op, dtype, ranks), without messages in groups of one rank, which send nothing."""
    elements: Counter[Traffic] = Counter()
    for message in messages:
        if len(message.ranks) > 1:
            elements[Traffic(message.op, message.dtype, message.ranks)] += message.elements
    return elements


# By operator of torch.ops.c10d: (op, index of the argument with the whole tensor or tensors, index of the group)
OPERATORS = {
    "allreduce_": ("all_reduce", 0, 1),
    "_allgather_base_": ("all_gather", 0, 2),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "alltoall_base_": ("all_to_all", 0, 2),
    "broadcast_": ("broadcast", 0, 1),
    "barrier": ("barrier", 0, 1),
    "send": ("send", 0, 1),
    "recv_": ("recv", 0, 1),
}


class RecordedCollectives(TorchDispatchMode):
    """Records all messages while it is entered. KeyError at a collective that is not in OPERATORS.

    On a fake group, where nothing is transferred, it fills what `fill_received` says.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.record(func._schema.name.removeprefix("c10d::"), args)
        return result

    def record(self, operator: str, args: tuple) -> None:
        op, tensor_argument, group_argument = OPERATORS[operator]
        tensors = args[tensor_argument]
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        group = dist.ProcessGroup.unbox(args[group_argument])
        ranks = tuple(dist.get_process_group_ranks(group))
        self.messages += [Message(op, tensor.dtype, tensor.numel(), ranks) for tensor in tensors]
        if dist.get_backend(group) == "fake":
            fill_received(op, args)


def fill_received(op: str, args: tuple) -> None:
    """Fills the tensors that a call on a fake group leaves uninitialized, in some releases of PyTorch.

    Outputs of reduce-scatter and all-to-all get this rank's own input. Messages of `recv` get 0 if they are
    floating-point, else 1, which lets pipeline stages agree on static shapes.
    """
    if op == "recv":
        for tensor in args[0]:
            tensor.fill_(0 if tensor.is_floating_point() else 1)
    elif op in ("reduce_scatter", "all_to_all"):
        output, own = args[0].view(-1), args[1].reshape(-1)
        output.copy_(own[: len(output)]) if len(own) >= len(output) else output.zero_()

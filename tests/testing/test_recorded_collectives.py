"""RecordedCollectives records every collective, whoever calls it, and point-to-point messages."""

import pytest
import torch
import torch.distributed as dist

from megasora.testing.recorded_collectives import Message, RecordedCollectives, Traffic, traffic
from megasora.testing.spawn import run_fake_rank

RANKS, PAIR = (0, 1, 2, 3), (1, 3)


class AllReduceGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad)
        return grad


def recorded_messages():
    """Messages of one call of each collective, on rank 1 of 4, and the tensors that two receives filled."""
    pair = dist.new_group(list(PAIR))
    x = torch.ones(8, dtype=torch.bfloat16)
    received, vote = torch.full((3,), torch.nan), torch.zeros(1, dtype=torch.int32)
    leaf = torch.zeros(5, requires_grad=True)
    loss = AllReduceGradient.apply(leaf).sum()
    with RecordedCollectives() as recorded:
        dist.all_reduce(x)
        dist.all_gather_into_tensor(torch.empty(16, dtype=torch.bfloat16), x, group=pair)
        dist.reduce_scatter_tensor(torch.empty(2, dtype=torch.bfloat16), x)
        dist.all_to_all_single(torch.empty(8, dtype=torch.bfloat16), x)
        dist.broadcast(x, 0)
        send = dist.P2POp(dist.isend, x, 3, pair)
        for work in dist.batch_isend_irecv([send, dist.P2POp(dist.irecv, received, 3, pair)]):
            work.wait()
        dist.recv(vote, 0)
        loss.backward()
    dist.all_reduce(x)  # not recorded
    return recorded.messages, received, vote


def test_each_collective_is_recorded_with_its_dtype_elements_and_ranks():
    messages, received, vote = run_fake_rank(recorded_messages, 1, 4)
    assert messages == [
        Message("all_reduce", torch.bfloat16, 8, RANKS),
        Message("all_gather", torch.bfloat16, 16, PAIR),
        Message("reduce_scatter", torch.bfloat16, 8, RANKS),
        Message("all_to_all", torch.bfloat16, 8, RANKS),
        Message("broadcast", torch.bfloat16, 8, RANKS),
        Message("send", torch.bfloat16, 8, PAIR),
        Message("recv", torch.float32, 3, PAIR),
        Message("recv", torch.int32, 1, RANKS),
        Message("all_reduce", torch.float32, 5, RANKS),
    ]
    assert received.tolist() == [0.0, 0.0, 0.0] and vote.tolist() == [1]


def gather_while_recording():
    with RecordedCollectives():
        dist.gather(torch.ones(1), None, dst=0)


def test_a_collective_that_cannot_be_recorded_raises_an_error():
    with pytest.raises(RuntimeError, match="KeyError: 'gather_'"):
        run_fake_rank(gather_while_recording, 1, 4)


def test_traffic_sums_elements_and_omits_groups_of_one_rank():
    messages = [Message("send", torch.float32, 3, PAIR)] * 2 + [Message("all_reduce", torch.float32, 9, (1,))]
    assert traffic(messages) == {Traffic("send", torch.float32, PAIR): 6}

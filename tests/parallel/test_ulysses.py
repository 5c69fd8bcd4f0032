"""What is in flight while a rank computes: the order of all-to-alls, waits and attention on one Ulysses rank.

The values are tested in test_context_attention.py, the elements that a step sends in test_step_traffic.py.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megasora.kernels.attention import attention_backward, attention_forward
from megasora.kernels.segments import Segments
from megasora.parallel.mesh import Axis
from megasora.parallel.ulysses import SavedOutput, UlyssesAttention, head_groups

RANKS, TOKENS, HEADS, HEAD_DIM = 2, 3, 10, 2  # two groups: 2 and 3 heads of a rank


class RecordingRank:
    """One rank without its peer, from which it receives what it sends itself. `events`: (what, group)."""

    def __init__(self):
        self.ulysses, self.events = Axis("ulysses", RANKS, 0, None), []
        self.segments = Segments.from_ranges(*(torch.tensor([x]) for x in (0, 6, 0, 6)), RANKS * TOKENS, "cpu")

    def all_to_all(self, x):
        group = {2: 0, 3: 1}[x.shape[-2]]
        name = {3: "qkv", 1: "token", 4: "out"}[x.shape[2] if x.ndim == 5 else 4]
        self.events.append((f"send {name}", group))
        return x.contiguous(), SimpleNamespace(wait=lambda: self.events.append((f"wait {name}", group)))

    def attend_forward(self, q, k, v, segments):
        self.events.append(("attention", {2: 0, 3: 1}[q.shape[1]]))
        return attention_forward(q, k, v, segments)

    def attend_backward(self, grad, q, k, v, out, lse, segments):
        self.events.append(("attention", {2: 0, 3: 1}[q.shape[1]]))
        return attention_backward(grad, q, k, v, out, lse, segments)

    def pop_events(self):
        events, self.events = self.events, []
        return events


def positions(events):
    """{event: index}; every event occurs once."""
    assert len(set(events)) == len(events)
    return {event: index for index, event in enumerate(events)}


def leaves():
    generator = torch.Generator().manual_seed(0)
    shape = TOKENS, HEADS, HEAD_DIM
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def test_an_all_to_all_is_in_flight_during_the_attention_of_the_other_group():
    rank = RecordingRank()
    out = UlyssesAttention.apply(*leaves(), rank, rank.segments, None)
    for sent, returned in (("qkv", "out"), ("token", "qkv")):  # forward, then backward
        at = positions(rank.pop_events())
        assert at["send " + sent, 1] < at["wait " + sent, 0] < at["attention", 0] < at["wait " + sent, 1]
        assert at["send " + returned, 0] < at["attention", 1] < at["wait " + returned, 0]
        if sent == "qkv":
            out.sum().backward()


def before_backward(events):
    return events[: events.index(("backward of the rest", 0))]


def after_backward(events):
    return events[events.index(("backward of the rest", 0)) + 1 :]


def test_a_recomputation_sends_and_the_backward_pass_of_attention_waits():
    rank, saved_output = RecordingRank(), []

    def block(q, k, v, saved_output):
        rank.events.append(("block", 0))
        x = UlyssesAttention.apply(q * 1, k * 1, v * 1, rank, rank.segments, saved_output)
        rank.events.append(("rest of the block", 0))
        x = x.square()  # saves its input, so that attention is recomputed first
        x.register_hook(lambda grad: rank.events.append(("backward of the rest", 0)))
        return x * x

    y = checkpoint(block, *leaves(), saved_output, use_reentrant=False, preserve_rng_state=False)
    assert ("attention", 1) in rank.pop_events()
    y.sum().backward()
    events = rank.pop_events()
    recomputed, rest = before_backward(events), after_backward(events)
    assert recomputed == [
        ("block", 0), ("send qkv", 0), ("send qkv", 1), ("send token", 0), ("send token", 1), ("rest of the block", 0),
    ]  # fmt: skip
    assert rest[:4] == [("wait qkv", 0), ("wait qkv", 1), ("wait token", 0), ("wait token", 1)]  # what was sent above
    assert [event for event in rest if event[0] == "attention"] == [("attention", 0), ("attention", 1)]


@pytest.mark.parametrize("recompute", ["full", "keep_attention"])
def test_gradients_of_a_recomputed_block_are_those_without_recompute(recompute):
    rank, inputs, again = RecordingRank(), leaves(), leaves()
    UlyssesAttention.apply(*inputs, rank, rank.segments, None).square().sum().backward()
    saved_output = [] if recompute == "keep_attention" else None
    y = checkpoint(UlyssesAttention.apply, *again, rank, rank.segments, saved_output, use_reentrant=False)
    y.square().sum().backward()
    for x, other in zip(inputs, again, strict=True):
        assert torch.equal(x.grad, other.grad) and x.grad.any()
    if saved_output:
        (saved,) = saved_output
        assert isinstance(saved, SavedOutput) and not saved.arriving
        assert not any(x.requires_grad for x in (saved.out_LNK, *saved.lse))


def test_groups_have_all_heads_and_grow_in_number_with_the_root_of_the_heads():
    for heads in range(1, 65):
        groups = head_groups(heads)
        assert [h for group in groups for h in range(group.start, group.stop)] == list(range(heads))
        sizes = [group.stop - group.start for group in groups]
        assert sizes == sorted(sizes) and max(sizes) - min(sizes) <= 1
    assert {heads: len(head_groups(heads)) for heads in (1, 3, 5, 12, 20, 40)} == {
        1: 1,
        3: 1,
        5: 2,
        12: 2,
        20: 3,
        40: 4,
    }

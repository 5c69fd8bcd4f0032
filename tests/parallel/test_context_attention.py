"""ContextAttention on several ranks, against attention over the whole pack in one process.

The packs are split over the ranks by hand and at random. One group of processes per world size runs all its cases.
"""

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megasora.batch import ContextSplit
from megasora.config import ParallelConfig
from megasora.kernels.attention import Segments, attention, attention_reference
from megasora.parallel.context_attention import ContextAttention, Transfer
from megasora.parallel.mesh import Axis, build_mesh
from megasora.parallel.ring_exchanges import build_context_segments
from megasora.testing.spawn import run_ranks

HEADS, HEAD_DIM = 12, 4


@dataclass(frozen=True)
class Case:
    ring: int
    ulysses: int
    pieces: list  # (rank of the ring, segment, first token, one past the last)
    slots_per_rank: int  # of a rank of the ring
    dtype: torch.dtype = torch.float64

    @property
    def split(self):
        return ContextSplit(self.ring, self.slots_per_rank, torch.tensor(self.pieces).view(-1, 4))

    @property
    def lengths(self):
        """Of the segments of the pack."""
        return [max(p[3] for p in self.pieces if p[1] == s) for s in range(1 + max(p[1] for p in self.pieces))]

    @property
    def segments(self):
        cu = torch.tensor([0, *self.lengths]).cumsum(0)
        return Segments.from_cu_seqlens(cu, cu, int(cu[-1]), "cpu")

    def inputs(self):
        """q, k, v and the gradient of out, each [tokens of the pack, N, K]."""
        generator = torch.Generator().manual_seed(0)
        shape = sum(self.lengths), HEADS, HEAD_DIM
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype) for _ in range(4)]

    def tokens(self, rank):
        """int64 [slots_per_rank]: the token of the pack in each slot of rank `rank` of the ring; -1 is padding."""
        first_of_segment = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        pieces = [p for p in self.pieces if p[0] == rank]
        tokens = [first_of_segment[s] + t for _, s, start, stop in pieces for t in range(start, stop)]
        return torch.tensor(tokens + [-1] * (self.slots_per_rank - len(tokens)))


def random_case(seed, ring, ulysses=1, longest=300):
    """Segments of 1 to hundreds of tokens, each on one rank or split at random over several; ranks may have padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return int(torch.randint(high, (), generator=generator))

    pieces = []
    for segment in range(7):
        length = 1 + draw((3, 20, longest)[segment % 3])
        ranks = torch.randperm(ring, generator=generator)[: 1 + draw(min(ring, length))].tolist()
        cuts = (1 + torch.randperm(length - 1, generator=generator)[: len(ranks) - 1]).sort().values.tolist()
        pieces += [(r, segment, a, b) for r, a, b in zip(ranks, [0, *cuts], [*cuts, length], strict=True)]
    order = torch.randperm(len(pieces), generator=generator).tolist()
    pieces = sorted((pieces[i] for i in order), key=lambda piece: piece[0])  # segments in any order on a rank
    fullest = max(sum(b - a for r, _, a, b in pieces if r == rank) for rank in range(ring))
    return Case(ring, ulysses, pieces, ulysses * (-(-fullest // ulysses) + draw(4)))


def even(ring, length, **options):
    """One segment, the same number of its tokens on every rank."""
    share = length // ring
    return Case(ring, 1, [(r, 0, r * share, (r + 1) * share) for r in range(ring)], share, **options)


CASES = {
    "ring 2, one clip": Case(2, 1, [(0, 0, 0, 40), (1, 0, 40, 65)], 45),
    "ring 2, no clip split": Case(2, 1, [(0, 0, 0, 9), (0, 2, 0, 1), (1, 1, 0, 12)], 14),
    "ring 2, one clip split": Case(2, 1, [(0, 1, 0, 20), (0, 0, 0, 30), (1, 0, 30, 33), (1, 2, 0, 300)], 310),
    "ring 2, nothing on rank 1": Case(2, 1, [(0, 0, 0, 9), (0, 1, 0, 4)], 16),
    "ring 2, random": random_case(1, 2),
    "ring 2, fp32": even(2, 512, dtype=torch.float32),
    "ring 2, bf16": even(2, 512, dtype=torch.bfloat16),
    "ulysses 2, random": random_case(2, 1, 2),
    "ulysses 2, no padding": Case(1, 2, [(0, 0, 0, 10), (0, 1, 0, 6)], 16),
    "ring 3, one exchange each way": Case(3, 1, [(0, 0, 0, 7), (1, 0, 7, 30), (1, 1, 0, 5), (2, 2, 0, 11)], 30),
    "ring 3, rank 0 has a middle piece": Case(3, 1, [(0, 0, 0, 9), (0, 1, 5, 9), (1, 1, 0, 5), (2, 0, 9, 70)], 64),
    "ring 3, nothing on rank 1": Case(3, 1, [(0, 0, 0, 7), (2, 0, 7, 9), (2, 1, 0, 5)], 8),
    "ring 3, random": random_case(3, 3),
    "ring 4, exchanges that some ranks skip": Case(
        4, 1, [(0, 0, 0, 8), (0, 1, 0, 3), (1, 0, 8, 20), (1, 2, 0, 6), (2, 3, 0, 9), (3, 1, 3, 9), (3, 2, 6, 17)], 24
    ),
    "ring 4, random": random_case(4, 4),
    "ring 4, another random": random_case(5, 4, longest=40),
    "ring 4, fp32": even(4, 512, dtype=torch.float32),
    "ring 4, bf16": even(4, 512, dtype=torch.bfloat16),
    "ring 2 x ulysses 2, random": random_case(6, 2, 2),
    "ring 2 x ulysses 2, bf16": Case(2, 2, [(0, 0, 0, 30), (1, 0, 30, 50), (1, 1, 0, 9)], 32, dtype=torch.bfloat16),
    "ulysses 4, random": random_case(7, 1, 4),
}
each_case = pytest.mark.parametrize("name", CASES)


def cases_named(*words):
    return pytest.mark.parametrize("name", [name for name in CASES if any(word in name for word in words)])


def run_case(case, context, mesh):
    """(tokens, [out, dq, dk, dv] of a call and of one with its saved output, bytes sent in each pass)."""
    local = case.slots_per_rank // case.ulysses
    tokens = case.tokens(mesh.ring.rank)[mesh.ulysses.rank * local :][:local]
    q, k, v, grad_out = (x[tokens.clamp(min=0)] for x in case.inputs())  # padding is not zero
    leaves = [x.requires_grad_() for x in (q, k, v)]
    segments = context.segments(SimpleNamespace(context_split=case.split, patches_LP=torch.zeros(local, 1)))
    saved_output, results, sent = [], [], []
    for _ in range(2):
        out = context(*leaves, segments, saved_output)
        sent.append(context.pop_bytes_sent())
        gradients = torch.autograd.grad(out, leaves, grad_out)
        sent.append(context.pop_bytes_sent())
        results.append([out.detach(), *gradients])
    assert not any(x.requires_grad for x in tensors_of(saved_output))
    return tokens, results, sent


def tensors_of(saved_output):
    return [
        x
        for saved in saved_output
        for x in ([saved] if isinstance(saved, torch.Tensor) else [saved.out_LNK, *saved.lse])
    ]


def run_all():
    processes, contexts, results = dist.get_world_size(), {}, {}
    for name, case in CASES.items():
        if case.ring * case.ulysses == processes:
            if (case.ring, case.ulysses) not in contexts:
                mesh = build_mesh(ParallelConfig(context=processes, ulysses=case.ulysses), "cpu")
                contexts[case.ring, case.ulysses] = ContextAttention(mesh.ring, mesh.ulysses), mesh
            results[name] = run_case(case, *contexts[case.ring, case.ulysses])
    return results


@functools.cache
def results_of(processes):
    return run_ranks(run_all, processes)


def ranks_of(name):
    """Results of a case by rank, Ulysses innermost."""
    case = CASES[name]
    return [rank[name] for rank in results_of(case.ring * case.ulysses)]


def gathered(name):
    """out, dq, dk, dv of the whole pack, put together from the ranks."""
    case = CASES[name]
    whole = [torch.full((sum(case.lengths), HEADS, HEAD_DIM), torch.nan, dtype=case.dtype) for _ in range(4)]
    for tokens, (first, _), _ in ranks_of(name):
        for x, local in zip(whole, first, strict=True):
            x[tokens[tokens >= 0]] = local[tokens >= 0]
    return whole


@functools.cache
def expected(name):
    return out_and_gradients(lambda *args: attention_reference(*args)[0], CASES[name], torch.float64)


def out_and_gradients(function, case, dtype):
    q, k, v, grad_out = (x.to(dtype) for x in case.inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = function(*leaves, case.segments)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def relative_error(x, reference):
    return float((x.double() - reference).norm() / reference.norm())


@each_case
def test_output_and_gradients_equal_those_of_one_process(name):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[CASES[name].dtype]
    for x, reference in zip(gathered(name), expected(name), strict=True):
        assert x.dtype == CASES[name].dtype
        assert relative_error(x, reference) < tolerance


@each_case
def test_padding_has_zero_output_and_zero_gradient(name):
    for tokens, (first, _), _ in ranks_of(name):
        for x in first:
            assert (x[tokens < 0] == 0).all() and (x[tokens >= 0] != 0).any() == bool((tokens >= 0).any())


@each_case
def test_a_second_call_reuses_the_saved_output_and_gives_the_same_gradients(name):
    for _, (first, second), _ in ranks_of(name):
        assert all(map(torch.equal, first, second))


def exchanged_bytes(case, rank):
    """Bytes of (keys and values that a rank of the ring sends in one pass, gradients that it returns)."""
    elements = 2 * HEADS // case.ulysses * HEAD_DIM
    local = {s: b - a for r, s, a, b in case.pieces if r == rank}
    others = [(s, b - a) for r, s, a, b in case.pieces if r != rank and s in local]
    wide = torch.promote_types(case.dtype, torch.float32)
    keys = sum(local[s] for s, _ in others) * elements * case.dtype.itemsize
    return keys, sum(length for _, length in others) * elements * wide.itemsize


@each_case
def test_a_rank_sends_the_keys_that_others_need_and_no_more(name):
    case = CASES[name]
    for rank, (tokens, _, sent) in enumerate(ranks_of(name)):
        keys, gradients = exchanged_bytes(case, rank // case.ulysses)
        one = len(tokens) * HEADS * HEAD_DIM * case.dtype.itemsize * (case.ulysses - 1) // case.ulysses
        all_to_all = 4 * one  # q, k, v and out
        # The saved output replaces the exchanges of the second forward pass, not its all-to-alls.
        assert sent == [keys + all_to_all, keys + gradients + all_to_all, all_to_all, keys + gradients + all_to_all]


def test_nothing_is_sent_if_no_clip_is_split():
    assert all(sent == [0, 0, 0, 0] for _, _, sent in ranks_of("ring 2, no clip split"))


@cases_named("fp32", "bf16")
def test_rounding_error_does_not_grow_with_the_number_of_exchanges(name):
    single = out_and_gradients(attention, CASES[name], CASES[name].dtype)
    for x, one_process, reference in zip(gathered(name), single, expected(name), strict=True):
        assert relative_error(x, reference) < 1.5 * relative_error(one_process, reference)


class RecordingAttention(ContextAttention):
    """One rank of a ring without its peers: records what it posts and waits for, receives zeros."""

    def __init__(self, ring, rank):
        self.ring, self.ulysses, self.bytes_sent = Axis("ring", ring, rank, None), Axis("ulysses", 1, 0, None), 0
        self.backend, self.deterministic = "auto", True
        self.events = []

    def post(self, sent, dst, received, src, tag):
        if sent is None and received is None:
            return Transfer([], None, None)
        self.events.append(("post", tag, None if sent is None else dst, None if received is None else src))
        work = SimpleNamespace(wait=lambda: self.events.append(("wait", tag)))
        return Transfer([work], sent, None if received is None else received.zero_())


def recorded_events(case, rank, backward):
    context = RecordingAttention(case.ring, rank)
    segments = build_context_segments(case.split, rank, "cpu")
    q = k = v = torch.ones(case.slots_per_rank, 1, 2, requires_grad=True)
    out = context(q, k, v, segments)
    if backward:
        context.events.clear()
        out.sum().backward()
    return context.events


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_ranks_that_run_their_exchanges_in_order_do_not_deadlock(seed, backward):
    case = random_case(seed, 8, longest=30)
    queues = [[event[1:] for event in recorded_events(case, rank, backward) if event[0] == "post"] for rank in range(8)]
    assert sum(map(len, queues)) > 10
    sent, received = set(), set()  # (tag, src, dst) that this end has started
    while any(queues):
        for rank, queue in enumerate(queues):
            if queue:
                tag, dst, src = queue[0]
                sent |= {(tag, rank, dst)} if dst is not None else set()
                received |= {(tag, src, rank)} if src is not None else set()
        finished = [
            rank
            for rank, queue in enumerate(queues)
            if queue
            and (queue[0][1] is None or (queue[0][0], rank, queue[0][1]) in received)
            and (queue[0][2] is None or (queue[0][0], queue[0][2], rank) in sent)
        ]
        assert finished, f"deadlock: {[queue[:1] for queue in queues]}"
        for rank in finished:
            queues[rank].pop(0)


@pytest.mark.parametrize("backward", [False, True])
def test_the_next_keys_are_posted_before_the_current_ones_are_waited_for(backward):
    for rank in range(4):
        events = [event[:2] for event in recorded_events(even(4, 16), rank, backward)]
        keys = [tag for kind, tag in events if kind == "post" and tag % 2 == 0]
        assert keys == [2, 4, 6] and events[0] == ("post", 2)
        for tag, following in zip(keys, keys[1:], strict=False):
            assert events.index(("post", following)) < events.index(("wait", tag))
        for kind, tag in events:  # gradients are in flight during the next computation
            if kind == "wait" and tag in (3, 5):
                assert events.index(("post", tag + 2)) < events.index(("wait", tag))


def test_the_forward_pass_skips_exchanges_in_which_the_rank_does_nothing():
    case = CASES["ring 4, exchanges that some ranks skip"]
    assert [event[:2] for event in recorded_events(case, 0, backward=False)] == [
        ("post", 2), ("post", 6), ("wait", 2), ("wait", 6),
    ]  # fmt: skip
    assert recorded_events(case, 2, backward=False) == []


def test_inputs_that_do_not_fit_the_split_raise_an_error():
    context = RecordingAttention(2, 0)
    case = CASES["ring 2, one clip"]
    share = SimpleNamespace(context_split=case.split, patches_LP=torch.zeros(45, 1))
    x = torch.zeros(45, 1, 2)
    with pytest.raises(ValueError, match="it has no context_split"):
        context.segments(SimpleNamespace(context_split=None, patches_LP=torch.zeros(45, 1)))
    with pytest.raises(ValueError, match=r"2 ranks of 45 slots, the axes 2 \(ring\) of 1 \(ulysses\) x 44"):
        context.segments(SimpleNamespace(context_split=case.split, patches_LP=torch.zeros(44, 1)))
    with pytest.raises(ValueError, match="q has 44 tokens on each of 1 Ulysses ranks, the split has 45 slots"):
        context(x[1:], x[1:], x[1:], context.segments(share))
    with pytest.raises(ValueError, match="one shape"):
        context(x, x, x.double(), context.segments(share))
    with pytest.raises(ValueError, match="segments end at query 9, after the last of 8"):
        build_context_segments(Case(2, 1, [(0, 0, 0, 9)], 8).split, 0, "cpu")
    context.ulysses = Axis("ulysses", 2, 0, None)
    with pytest.raises(ValueError, match="3 heads cannot be divided by 2 Ulysses ranks"):
        y = torch.zeros(22, 3, 2)
        context(y, y, y, build_context_segments(ContextSplit(2, 44, torch.zeros(0, 4, dtype=torch.int64)), 0, "cpu"))

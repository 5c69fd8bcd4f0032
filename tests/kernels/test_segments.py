"""Segments: invalid input, and that both forms assign to each query the keys of its segment."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megasora.kernels.segments import BUCKET_WASTE, Segments, TokenIndex


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pack(lengths_q, lengths_k=None, padding=0):
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_q if lengths_k is None else lengths_k)
    return Segments.from_cu_seqlens(cu_q, cu_k, int(cu_q[-1]) + padding, "cpu")


def ranges(start_q, length_q, start_k, length_k, num_queries):
    return Segments.from_ranges(*map(torch.tensor, (start_q, length_q, start_k, length_k)), num_queries, "cpu")


def scattered(seed):
    """Segments with gaps, in random order, some without queries or keys; keys anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *size):
        return torch.randint(high, size, generator=generator)

    length_q, gap = draw(7, 9), draw(3, 9)
    start_q = (length_q + gap).cumsum(0) - length_q
    order = torch.randperm(9, generator=generator)
    num_queries = int((length_q + gap).sum()) + int(draw(4, 1))
    return Segments.from_ranges(start_q[order], length_q[order], draw(40, 9), draw(9, 9), num_queries, "cpu")


def keys_by_query(segments):
    """The keys of each query, in order, by the ranges."""
    keys = [[] for _ in range(segments.num_queries)]
    for (a, m), (c, n) in zip(segments.queries, segments.keys, strict=True):
        for i in range(a, a + m):
            keys[i] = list(range(c, c + n))
    return keys


CASES = {
    "a pack": pack([5, 1, 12, 7]),
    "padding": pack([5, 1, 12, 7], padding=6),
    "captions": pack([4, 9, 1, 6], [3, 0, 7, 0], padding=2),
    "gaps": ranges([12, 0, 6], [8, 5, 0], [3, 20, 0], [6, 10, 3], 22),
    "swapped": ranges([10, 0], [10, 10], [0, 15], [15, 15], 20),
    "keys of which some are contiguous": ranges([0, 4, 8], [4, 4, 4], [0, 3, 9], [3, 3, 3], 12),
    "shared keys": ranges([0, 5, 9], [5, 4, 11], [0, 0, 2], [4, 4, 10], 20),
    **{f"scattered {seed}": scattered(seed) for seed in range(6)},
}
each_case = pytest.mark.parametrize("segments", CASES.values(), ids=CASES)


@each_case
def test_varlen_assigns_each_query_the_keys_of_its_segment(segments):
    varlen = segments.varlen
    keys = varlen.keys.gather(torch.arange(100)).tolist()
    actual = []
    cu_q, cu_k = varlen.cu_q.tolist(), varlen.cu_k.tolist()
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        assert a < b and c <= d
        actual += [keys[c:d]] * (b - a)
    assert actual == keys_by_query(segments)
    assert cu_q[0] == cu_k[0] == 0 and cu_k[-1] == len(keys)
    assert (varlen.max_q, varlen.max_k) == (varlen.cu_q.diff().max(), varlen.cu_k.diff().max())
    assert varlen.cu_q.dtype == varlen.cu_k.dtype == torch.int32


@each_case
def test_keyless_are_the_queries_without_keys(segments):
    keyless = [] if segments.varlen.keyless is None else segments.varlen.keyless.tolist()
    assert keyless == [i for i, keys in enumerate(keys_by_query(segments)) if not keys]


@each_case
def test_buckets_assign_each_query_the_keys_of_its_segment(segments):
    actual = [[] for _ in range(segments.num_queries)]
    for queries, keys in segments.buckets:
        indices = [side.pad(torch.arange(100)) for side in (queries, keys)]
        assert [x.shape for x in indices] == [queries.shape, keys.shape]
        valid = [torch.ones(s.shape, dtype=torch.bool) if s.valid is None else s.valid for s in (queries, keys)]
        for i, j, is_query, is_key in zip(*indices, *valid, strict=True):
            for query in i[is_query].tolist():
                actual[query] = j[is_key].tolist()
        for side, x, is_valid in zip((queries, keys), indices, valid, strict=True):
            valid_tokens = side.valid_tokens.gather(torch.arange(100)).tolist()
            assert side.unpad(x).tolist() == x[is_valid].tolist() == valid_tokens
    assert actual == keys_by_query(segments)


def test_without_keys_there_are_no_calls():
    for segments in (pack([4, 3], [0, 0]), pack([0, 0], [2, 1], padding=2), ranges([0], [0], [0], [0], 0)):
        assert segments.varlen is None and segments.buckets == ()


@pytest.mark.parametrize(
    "segments",
    [pack([5, 1, 12], padding=3), pack([4, 9, 6], [3, 0, 7]), ranges([3, 0], [5, 3], [20, 11], [4, 9], 9)],
    ids=["a pack", "captions", "from the middle"],
)
def test_contiguous_keys_are_not_copied(segments):
    x = torch.zeros(40, 2, 4)
    first = min(start for start, length in segments.keys if length)
    assert segments.varlen.keys.gather(x).data_ptr() == x[first].data_ptr()


def test_both_forms_are_computed_once():
    segments = pack([5, 1, 12], padding=3)
    assert segments.varlen is segments.varlen and segments.buckets is segments.buckets


class Transfers(TorchDispatchMode):
    """Counts transfers from the CPU to another device."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function is torch.ops.aten._to_copy.default:
            self.count += arguments[0].device.type == "cpu" and result.device.type != "cpu"
        return result


def test_varlen_needs_one_transfer_to_the_device():
    columns = map(torch.tensor, ([12, 0], [8, 5], [3, 20], [6, 10]))
    segments = Segments.from_ranges(*columns, 22, "meta")
    with Transfers() as transfers:
        varlen = segments.varlen
    assert transfers.count == 1
    assert {x.device.type for x in (varlen.cu_q, varlen.cu_k, varlen.keys.index, varlen.keyless)} == {"meta"}


@pytest.mark.parametrize("deterministic", [True, False])
def test_values_of_duplicate_tokens_add_up(deterministic):
    tokens = TokenIndex.from_index(torch.tensor([2, 0, 2]), has_duplicates=True, device="cpu")
    out = torch.zeros(4, 2)
    tokens.scatter(torch.tensor([[1.0, 2], [3, 4], [5, 6]]), out, deterministic)
    assert out.tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]]


def test_buckets_have_little_padding():
    lengths = torch.randint(1, 400, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    cu = cumulative(lengths)
    segments = Segments.from_cu_seqlens(cu, cu, sum(lengths), "cpu")
    computed = sum(math.prod(b.queries.shape) * b.keys.shape[1] for b in segments.buckets)
    assert computed <= BUCKET_WASTE**2 * sum(n * n for n in lengths)
    assert len(segments.buckets) <= 2 + math.log(400, BUCKET_WASTE)


def test_a_segment_with_many_keys_does_not_pad_those_with_few():
    segments = ranges([0, 10, 20], [10, 10, 10], [0, 9, 2000], [9, 1900, 11], 30)
    assert sum(math.prod(b.queries.shape) * b.keys.shape[1] for b in segments.buckets) <= 10 * 1900 + 20 * 11


@pytest.mark.parametrize("lengths", [[100], [25, 25, 25, 25]], ids=str)
def test_equal_segments_are_one_call_without_padding_or_copies(lengths):
    segments = pack(lengths)
    assert len(segments.buckets) == 1
    x = torch.zeros(100, 2, 4)
    for side in segments.buckets[0]:
        assert side.valid is None and side.pad(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "num_queries", "message"),
    [
        ([1, 4], [0, 4], 4, "cu_q must be cumulative lengths from 0"),
        ([0, 4, 2], [0, 4, 4], 4, "cu_q must be cumulative lengths from 0"),
        ([0, 4], [0, 3, 2], 4, "cu_k must be cumulative lengths from 0"),
        ([0], [0], 4, "cu_q must be cumulative lengths from 0"),
        ([0, 4], [0, 2, 4], 4, "cu_q has 1 segments, cu_k 2"),
        ([0, 5], [0, 5], 4, "cu_q ends at 5, after the last of 4 queries"),
    ],
)
def test_invalid_cu_seqlens_raise(cu_q, cu_k, num_queries, message):
    with pytest.raises(ValueError, match=message):
        Segments.from_cu_seqlens(torch.tensor(cu_q), torch.tensor(cu_k), num_queries, "cpu")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([0, 3], [4, 4], [0, 4], [4, 4], 8), "a query is in two segments"),
        (([0], [4], [0, 4], [4, 4], 8), "1 ranges of queries, 2 of keys"),
        (([5], [4], [0], [4], 8), "segments end at query 9, after the last of 8"),
        (([0], [-1], [0], [4], 8), "must not begin or end before 0"),
        (([0], [1], [-2], [4], 8), "must not begin or end before 0"),
    ],
)
def test_invalid_ranges_raise(columns, message):
    with pytest.raises(ValueError, match=message):
        ranges(*columns)

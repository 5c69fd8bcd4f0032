"""The backward attention of a pack in several calls: equal to one call, and all multiprocessors have work."""

import math

import pytest
import torch
from torch import Tensor

from megasora.kernels import attention_varlen
from megasora.kernels.attention import attention_reference
from megasora.kernels.attention_padded import MATH
from megasora.kernels.attention_varlen import VarlenKernel, varlen_backward
from megasora.kernels.segments import Segments
from megasora.kernels.varlen_calls import LEAST_PART, Shape, call_tiles, group_segments, plan_calls

H100 = 132  # multiprocessors


def segments_of(lengths: list[int], key_lengths: list[int] | None = None, padding: int = 0) -> Segments:
    queries, keys = torch.tensor(lengths), torch.tensor(key_lengths or lengths)
    starts, key_starts = (x.cumsum(0) - x for x in (queries, keys))
    return Segments.from_ranges(starts, queries, key_starts, keys, sum(lengths) + padding, "cpu")


def math_backward(grad_out, q, k, v, out, lse, varlen, deterministic) -> tuple[Tensor, ...]:
    """As the libraries: NaN where a query has no key."""
    dq, dk, dv = (torch.full_like(x, math.nan) for x in (q, k, v))
    for i, j in zip(varlen.cu_q.tolist(), varlen.cu_k.tolist(), strict=True):
        assert i <= len(q) and j <= len(k)
    bounds = zip(varlen.cu_q, varlen.cu_q[1:], varlen.cu_k, varlen.cu_k[1:], strict=False)
    for a, b, c, d in bounds:
        if c < d:
            tensors = (x.transpose(0, 1)[None] for x in (grad_out[a:b], q[a:b], k[c:d], v[c:d], out[a:b]))
            gradients = MATH.backward(*tensors, lse[:, a:b][None], None)
            dq[a:b], dk[c:d], dv[c:d] = (x[0].transpose(0, 1) for x in gradients)
    return dq, dk, dv


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    ("lengths", "key_lengths", "padding", "dtype"),
    [
        ([40, 2300, 30, 20, 700, 30, 25], None, 3, torch.float64),  # one call per size, in an order of their own
        ([5000, 3000, 60], [20, 7, 12], 0, torch.float64),  # captions: queries in parts that share their keys
        ([5000, 3000, 60], [20, 7, 12], 5, torch.float32),
        ([300, 310], None, 1, torch.float64),  # one call
    ],
)
def test_several_calls_give_the_gradients_of_one(monkeypatch, lengths, key_lengths, padding, dtype, deterministic):
    segments = segments_of(lengths, key_lengths, padding)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(n, 2, 8, generator=generator, dtype=dtype)  # noqa: E731
    q, k, v, grad_out = (
        draw(segments.num_queries),
        draw(segments.num_keys),
        draw(segments.num_keys),
        draw(segments.num_queries),
    )
    out, lse = attention_reference(q, k, v, segments)
    kernel = VarlenKernel(None, math_backward, divided=True)
    tensors = grad_out, q, k, v, out, lse, segments, deterministic
    monkeypatch.setattr(attention_varlen, "num_processors", lambda device: 1)
    expected = varlen_backward(kernel, *tensors)
    monkeypatch.setattr(attention_varlen, "num_processors", lambda device: H100)
    gradients = varlen_backward(kernel, *tensors)
    assert not any(segments.plans[Shape(2, 1, deterministic)])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for gradient, one_call in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, one_call, rtol=tolerance, atol=tolerance)


def test_every_query_is_in_one_call_with_all_its_keys():
    segments = segments_of([4096, 100, 0, 130, 9000, 64], [77, 5, 3, 0, 20, 9])
    calls = plan_calls(segments, Shape(12, H100, True))
    keys_of_query: dict[int, list[int]] = {}
    for call in calls:
        queries = call.queries.gather(torch.arange(segments.num_queries)).tolist()
        keys = call.varlen.keys.gather(torch.arange(segments.num_keys)).tolist()
        cu_q, cu_k = call.varlen.cu_q.tolist(), call.varlen.cu_k.tolist()
        for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
            for query in queries[a:b]:
                assert query not in keys_of_query
                keys_of_query[query] = keys[c:d]
    expected = {
        query: list(range(first_key, first_key + num_keys))
        for (first, length), (first_key, num_keys) in zip(segments.queries, segments.keys, strict=True)
        for query in range(first, first + length)
        if num_keys
    }
    assert len(calls) >= 1 and keys_of_query == expected


def test_a_long_clip_among_short_ones_has_its_own_call_if_sums_have_a_fixed_order():
    lengths = [29_184] + [128] * 60
    ranges = [(0, length) for length in lengths]
    fixed, free = (Shape(12, H100, deterministic) for deterministic in (True, False))
    assert sorted(group_segments(ranges, ranges, fixed)) == [[0], list(range(1, 61))]
    assert group_segments(ranges, ranges, free) == [list(range(61))]
    sizes = [(math.ceil(n / 64), math.ceil(n / 128)) for n in lengths]
    together, apart = call_tiles(sizes, fixed), call_tiles(sizes[:1], fixed) + call_tiles(sizes[1:], fixed)
    assert together > 8 * apart


def test_equal_clips_and_single_ones_take_one_call():
    for lengths in ([36_864], [4608] * 8, [500] * 60):
        for deterministic in (True, False):
            assert plan_calls(segments_of(lengths), Shape(40, H100, deterministic)) == ()


def test_queries_of_a_caption_are_cut_until_all_multiprocessors_work():
    segments = segments_of([36_864], [20])
    (call,) = plan_calls(segments, Shape(12, H100, False))
    lengths = call.varlen.cu_q.diff().tolist()
    assert len(lengths) * 12 > H100 - 12 and sum(lengths) == 36_864 and min(lengths) >= LEAST_PART
    assert call.varlen.cu_k.diff().tolist() == [20] * len(lengths) and call.varlen.keys.has_duplicates
    assert plan_calls(segments_of([36_864], [512 * 40]), Shape(12, H100, False)) == ()

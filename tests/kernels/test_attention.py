"""Attention inside segments: every way of computing it against the plain maths, in float64."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megasora.kernels.attention import (
    CPU,
    PLAIN,
    Segments,
    attention,
    attention_backward,
    attention_forward,
    attention_reference,
)
from megasora.kernels.merge_partial_attention import merge_partial_attention
from megasora.kernels.segments import BUCKET_WASTE

# lengths of the segments' queries and keys; the first pack is self-attention
PACKS = {
    "uneven": ([5, 1, 12, 7, 7, 1, 30], None),
    "one segment": ([17], None),
    "all of one token": ([1, 1, 1], None),
    "longer than the kernels' tiles": ([700, 40], None),
    "captions": ([4, 9, 1, 6, 5], [3, 2, 7, 1, 2]),
    "an empty caption": ([4, 9, 1, 6], [3, 0, 7, 0]),
}


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_inputs(num_q, num_k, heads=3, head_dim=8):
    shapes = (num_q, heads, head_dim), (num_k, heads, head_dim), (num_k, heads, head_dim)
    return tuple(normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))


def make(lengths_q, lengths_k=None, padding=0):
    """(q, k, v, segments) in float64 with `padding` more queries and keys than the segments have."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    num_q, num_k = sum(lengths_q) + padding, sum(lengths_k) + padding
    segments = Segments.from_cu_seqlens(cumulative(lengths_q), cumulative(lengths_k), num_q, "cpu")
    return *make_inputs(num_q, num_k), segments


def ranges(start_q, length_q, start_k, length_k, num_queries):
    return Segments.from_ranges(*map(torch.tensor, (start_q, length_q, start_k, length_k)), num_queries, "cpu")


def reference(q, k, v, segments):
    return attention_reference(q, k, v, segments)[0]


def output_and_gradients(function, q, k, v, segments):
    out = function(q, k, v, segments)
    return out, torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), (q, k, v))


def assert_equals_reference(q, k, v, segments, tolerance=1e-12):
    out, gradients = output_and_gradients(attention, q, k, v, segments)
    expected, expected_gradients = output_and_gradients(reference, q, k, v, segments)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance)


def test_reference_is_attention_under_a_block_diagonal_mask():
    q, k, v, segments = make([4, 9, 1], [3, 2, 7])
    own_q, own_k = (torch.repeat_interleave(torch.arange(3), torch.tensor(n)) for n in ([4, 9, 1], [3, 2, 7]))
    scores = torch.einsum("qnk,snk->nqs", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(own_q[:, None] != own_k[None], -torch.inf)
    out, lse = attention_reference(q, k, v, segments)
    torch.testing.assert_close(out, torch.einsum("nqs,snk->qnk", scores.softmax(-1), v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_output_and_every_gradient_equal_the_reference(lengths, padding):
    assert_equals_reference(*make(*lengths, padding=padding))


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_log_sum_exp_equals_the_reference(lengths):
    q, k, v, segments = make(*lengths, padding=2)
    _, lse = attention_forward(q, k, v, segments)
    torch.testing.assert_close(lse, attention_reference(q, k, v, segments)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [CPU, PLAIN], ids=["cpu", "plain"])
@pytest.mark.parametrize("masked", [False, True])
def test_each_backend_gives_the_output_and_every_gradient(backend, masked):
    shapes = (2, 3, 7, 8), (2, 3, 11, 8), (2, 3, 11, 8)
    q, k, v = (normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    real = torch.arange(11) < torch.tensor([[11], [6]])
    bias = torch.zeros(2, 1, 1, 11, dtype=q.dtype).masked_fill(~real[:, None, None], -torch.inf).expand(2, 3, 7, 11)
    bias = bias if masked else None
    scores = q @ k.mT / math.sqrt(8) + (0 if bias is None else bias)
    expected, grad_out = scores.softmax(-1) @ v, normal(2, 3, 7, 8, seed=5)
    with torch.no_grad():
        out, lse = backend.forward(q, k, v, bias)
        gradients = backend.backward(grad_out, q, k, v, out, lse, bias)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, (q, k, v), grad_out), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
def test_error_is_the_rounding_of_the_dtype(dtype, tolerance):
    q, k, v, segments = make([5, 1, 12, 7, 30], padding=3)
    narrow = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    out, gradients = output_and_gradients(attention, *narrow, segments)
    expected, expected_gradients = output_and_gradients(reference, *wide, segments)
    for x, wanted in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), wanted, rtol=tolerance, atol=tolerance)
    assert attention_forward(*narrow, segments)[1].dtype == torch.float32


@pytest.mark.parametrize(
    "given",
    [([12, 0, 6], [8, 5, 0], [3, 20, 0], [6, 10, 3], 20), ([10, 0], [10, 10], [0, 15], [15, 15], 20)],
    ids=["with gaps", "swapped"],
)
def test_segments_may_lie_anywhere_and_in_any_order(given):
    assert_equals_reference(*make_inputs(20, 30), ranges(*given))


def test_gradients_of_keys_of_several_segments_add_up():
    q, k, v = make_inputs(20, 12)
    assert_equals_reference(q, k, v, ranges([0, 5, 9], [5, 4, 11], [0, 0, 2], [4, 4, 10], 20))


def test_no_segment_at_all_gives_zeros():
    q, k, v = make_inputs(4, 3)
    nowhere = Segments.from_ranges(*[torch.zeros(0, dtype=torch.int64)] * 4, 4, "cpu")
    out, lse = attention_forward(q, k, v, nowhere)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert all((x == 0).all() for x in attention_backward(out, q, k, v, out, lse, nowhere))


def test_a_rank_without_tokens_gets_an_empty_result():
    q, k, v = make_inputs(0, 0)
    out, gradients = output_and_gradients(attention, q, k, v, ranges([0], [0], [0], [0], 0))
    assert out.shape == (0, 3, 8) and all(x.shape == (0, 3, 8) for x in gradients)


@pytest.mark.parametrize("lengths", [[13], [6, 7], [2, 11]], ids=str)
def test_the_layout_in_memory_does_not_matter(lengths):
    *inputs, segments = make(lengths)
    strided = [x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_() for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    packed = torch.stack([x.detach() for x in inputs], 1).unbind(1)
    expected, expected_gradients = output_and_gradients(attention, *inputs, segments)
    for variant in (strided, [x.requires_grad_() for x in packed]):
        out, gradients = output_and_gradients(attention, *variant, segments)
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-13, atol=1e-13)
    ones = torch.autograd.grad(attention(*inputs, segments).sum(), inputs)  # a gradient with strides of 0
    torch.testing.assert_close(
        ones, torch.autograd.grad(reference(*inputs, segments).sum(), inputs), rtol=1e-12, atol=1e-12
    )


def test_parts_of_the_keys_merge_to_the_whole():
    q, k, v = make_inputs(9, 30)
    whole = attention_forward(q, k, v, ranges([0], [9], [0], [30], 9))
    parts = [attention_forward(q, k, v, ranges([0], [9], [a], [b - a], 9)) for a, b in [(0, 3), (3, 19), (19, 30)]]
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge_partial_attention(out, lse, *part)
    torch.testing.assert_close((out, lse), whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("parts", [2, 8, 64])
def test_error_of_merging_in_fp32_does_not_grow_with_the_number_of_parts(parts):
    inputs = [x.detach().float() for x in make_inputs(64, 512)]
    expected, _ = attention_reference(*(x.double() for x in inputs), ranges([0], [64], [0], [512], 64))
    size = 512 // parts
    out, lse = torch.zeros_like(inputs[0]), torch.full((64, 3), -math.inf)
    for start in range(0, 512, size):
        part = attention_forward(*inputs, ranges([0], [64], [start], [size], 64))
        out, lse = merge_partial_attention(out, lse, *part)
    alone, _ = attention_forward(*inputs, ranges([0], [64], [0], [512], 64))
    assert (out.double() - expected).norm() < 1.5 * (alone.double() - expected).norm()


def test_gradients_of_parts_of_the_keys_add_up_to_those_of_the_whole():
    q, k, v = make_inputs(9, 30)
    whole, grad_out = ranges([0], [9], [0], [30], 9), normal(9, 3, 8, seed=7)
    out, lse = attention_forward(q, k, v, whole)
    expected = attention_backward(grad_out, q, k, v, out, lse, whole)
    parts = [
        attention_backward(grad_out, q, k, v, out, lse, ranges([0], [9], [a], [b - a], 9))
        for a, b in [(0, 3), (3, 19), (19, 30)]
    ]
    for i, wanted in enumerate(expected):
        torch.testing.assert_close(sum(part[i] for part in parts), wanted, rtol=1e-13, atol=1e-13)


def test_merging_with_no_keys_changes_nothing_and_makes_no_nan():
    out, lse = normal(5, 2, 4).float(), normal(5, 2, seed=1).float()
    nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for merged in (merge_partial_attention(out, lse, *nothing), merge_partial_attention(*nothing, out, lse)):
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    merged = merge_partial_attention(*nothing, *nothing)
    assert torch.equal(merged[0], nothing[0]) and torch.equal(merged[1], nothing[1])


def test_merging_takes_place_in_fp32_at_least_and_hides_no_nan():
    out, lse = normal(5, 2, 4).bfloat16(), normal(5, 2, seed=1).float()
    assert [x.dtype for x in merge_partial_attention(out, lse, out, lse)] == [torch.float32] * 2
    broken = torch.full_like(out, math.nan)
    assert merge_partial_attention(out, lse, broken, lse)[0].isnan().all()


def test_a_second_run_of_the_same_forward_computes_nothing(monkeypatch):
    q, k, v, segments = make([5, 9], padding=1)
    out, expected = output_and_gradients(attention, q, k, v, segments)
    kept = []
    first = attention(q, k, v, segments, kept)
    monkeypatch.setattr("megasora.kernels.attention.attention_forward", None)
    for _ in range(2):
        replayed, gradients = output_and_gradients(lambda *args: attention(*args, kept), q, k, v, segments)
        assert torch.equal(replayed, out) and all(map(torch.equal, gradients, expected))
    assert first.requires_grad and not any(x.requires_grad for x in kept)


def test_recomputed_activations_take_the_attention_from_the_first_run(monkeypatch):
    q, k, v, segments = make([5, 9])
    runs = []
    monkeypatch.setattr(
        "megasora.kernels.attention.attention_forward", lambda *args: runs.append(args) or attention_forward(*args)
    )
    _, expected = output_and_gradients(lambda *args: attention(*args).sin(), q, k, v, segments)
    kept = []

    def recomputed(*args):
        return checkpoint(lambda *inner: attention(*inner, kept).sin(), *args, use_reentrant=False)

    _, gradients = output_and_gradients(recomputed, q, k, v, segments)
    assert len(runs) == 2 and all(map(torch.equal, gradients, expected))


def test_padding_gives_zeros_and_gets_no_gradient():
    q, k, v, segments = make([5, 1, 12], padding=7)
    out, gradients = output_and_gradients(attention, q, k, v, segments)
    assert (out[18:] == 0).all() and (out[:18] != 0).all()
    for gradient in gradients:
        assert (gradient[18:] == 0).all()


def test_tokens_with_an_empty_caption_get_zeros_and_no_gradient():
    q, k, v, segments = make([4, 9, 6], [3, 0, 2])
    out, (q_gradient, _, _) = output_and_gradients(attention, q, k, v, segments)
    assert (out[4:13] == 0).all() and (q_gradient[4:13] == 0).all()
    assert (out[:4] != 0).all() and (out[13:] != 0).all()


def test_a_pack_without_any_key_gives_zeros():
    q, k, v, segments = make([4, 3], [0, 0], padding=2)
    assert (attention(q, k, v, segments) == 0).all() and (reference(q, k, v, segments) == 0).all()


def test_a_segment_does_not_see_its_neighbours():
    q, k, v, segments = make([5, 6, 5])
    before = attention(q, k, v, segments)
    with torch.no_grad():
        for x in (q, k, v):
            x[5:11] += 1.0
    after = attention(q, k, v, segments)
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[11:], after[11:])
    assert not torch.isclose(before[5:11], after[5:11]).any()


def test_a_segment_of_one_token_returns_its_value():
    q, k, v, segments = make([1, 4, 1])
    out = attention(q, k, v, segments)
    torch.testing.assert_close(out[[0, 5]], v[[0, 5]], rtol=1e-14, atol=1e-14)


def test_buckets_compute_little_more_than_the_segments_need():
    lengths = torch.randint(1, 400, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    cu = cumulative(lengths)
    segments = Segments.from_cu_seqlens(cu, cu, sum(lengths), "cpu")
    computed = sum(math.prod(b.queries.shape) * b.keys.shape[1] for b in segments.buckets)
    assert computed <= BUCKET_WASTE**2 * sum(n * n for n in lengths)
    assert len(segments.buckets) <= 2 + math.log(400, BUCKET_WASTE)


def test_one_segment_of_many_keys_does_not_lengthen_those_of_few():
    segments = ranges([0, 10, 20], [10, 10, 10], [0, 9, 2000], [9, 1900, 11], 30)
    assert sum(math.prod(b.queries.shape) * b.keys.shape[1] for b in segments.buckets) <= 10 * 1900 + 20 * 11


@pytest.mark.parametrize("lengths", [[100], [25, 25, 25, 25]], ids=str)
def test_a_pack_of_equal_segments_is_one_call_without_padding_or_copies(lengths):
    segments = make(lengths)[3]
    assert len(segments.buckets) == 1
    x = torch.zeros(100, 2, 4)
    for side in segments.buckets[0]:
        assert side.real is None and side.take(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "num_queries", "message"),
    [
        ([1, 4], [0, 4], 4, "cu_q must be cumulative lengths from 0"),
        ([0, 4, 2], [0, 4, 4], 4, "cu_q must be cumulative lengths from 0"),
        ([0, 4], [0, 3, 2], 4, "cu_k must be cumulative lengths from 0"),
        ([0], [0], 4, "cu_q must be cumulative lengths from 0"),
        ([0, 4], [0, 2, 4], 4, "cu_q has 1 segments, cu_k 2"),
        ([0, 5], [0, 5], 4, "cu_q ends at 5, behind the last of 4 queries"),
    ],
)
def test_lengths_that_cannot_be_are_refused(cu_q, cu_k, num_queries, message):
    with pytest.raises(ValueError, match=message):
        Segments.from_cu_seqlens(torch.tensor(cu_q), torch.tensor(cu_k), num_queries, "cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([0, 3], [4, 4], [0, 4], [4, 4], 8), "a query is in two segments"),
        (([0], [4], [0, 4], [4, 4], 8), "1 ranges of queries, 2 of keys"),
        (([5], [4], [0], [4], 8), "segments end at query 9, behind the last of 8"),
        (([0], [-1], [0], [4], 8), "must not begin or end before 0"),
        (([0], [1], [-2], [4], 8), "must not begin or end before 0"),
    ],
)
def test_ranges_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ranges(*given)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, segments = make([5, 3])
    with pytest.raises(ValueError, match="equal N and K"):
        attention(q, k[:, :2], v[:, :2], segments)
    with pytest.raises(ValueError, match="equal N and K"):
        attention(q, k, v[:-1], segments)
    with pytest.raises(ValueError, match="one dtype"):
        attention(q, k.float(), v, segments)
    with pytest.raises(ValueError, match="q has 7 tokens, its segments were made for 8"):
        attention(q[:-1], k, v, segments)
    with pytest.raises(ValueError, match="k has 7 tokens, its segments end at 8"):
        attention(q, k[:-1], v[:-1], segments)
    with pytest.raises(ValueError, match=r"lse is \(3, 8\)"):
        attention_backward(q, q, k, v, q, torch.zeros(3, 8, dtype=q.dtype), segments)

"""Attention inside segments: the bucketed computation against the plain maths, in float64."""

import math

import pytest
import torch

from megasora.kernels.attention import BUCKET_WASTE, Segments, attention, attention_reference

# lengths of the segments' queries and keys; the first pack is self-attention
PACKS = {
    "uneven": ([5, 1, 12, 7, 7, 1, 30], None),
    "one segment": ([17], None),
    "all of one token": ([1, 1, 1], None),
    "captions": ([4, 9, 1, 6, 5], [3, 2, 7, 1, 2]),
    "an empty caption": ([4, 9, 1, 6], [3, 0, 7, 0]),
}


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make(lengths_q, lengths_k=None, padding=0, heads=3, head_dim=8, seed=0):
    """(q, k, v, segments) in float64 with `padding` more queries than the segments have."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    generator = torch.Generator().manual_seed(seed)
    num_q, num_k = sum(lengths_q) + padding, sum(lengths_k) + padding
    shapes = ((num_q, heads, head_dim), (num_k, heads, head_dim), (num_k, heads, head_dim))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    return q, k, v, Segments.from_cu_seqlens(cumulative(lengths_q), cumulative(lengths_k), num_q, "cpu")


def output_and_gradients(function, q, k, v, segments):
    out = function(q, k, v, segments)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out, torch.autograd.grad((out * weight).sum(), (q, k, v))


def test_reference_is_attention_under_a_block_diagonal_mask():
    q, k, v, segments = make([4, 9, 1], [3, 2, 7])
    own_q, own_k = (torch.repeat_interleave(torch.arange(3), cu.diff()) for cu in (segments.cu_q, segments.cu_k))
    scores = torch.einsum("qnk,snk->nqs", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(own_q[:, None] != own_k[None], -torch.inf).softmax(-1)
    torch.testing.assert_close(
        attention_reference(q, k, v, segments), torch.einsum("nqs,snk->qnk", weights, v), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_output_and_every_gradient_equal_the_reference(lengths, padding):
    inputs = make(*lengths, padding=padding)
    out, gradients = output_and_gradients(attention, *inputs)
    expected, expected_gradients = output_and_gradients(attention_reference, *inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


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
    assert (attention(q, k, v, segments) == 0).all() and (attention_reference(q, k, v, segments) == 0).all()


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
    computed = sum(len(b.queries) * b.queries.shape[1] * b.keys.shape[1] for b in segments.buckets)
    assert computed <= BUCKET_WASTE**2 * sum(n * n for n in lengths)
    assert len(segments.buckets) <= 2 + math.log(400, BUCKET_WASTE)


def test_one_long_segment_is_one_call_without_mask():
    segments = make([100])[3]
    assert len(segments.buckets) == 1 and segments.buckets[0].mask is None


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


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, segments = make([5, 3])
    with pytest.raises(ValueError, match="equal N and K"):
        attention(q, k[:, :2], v[:, :2], segments)
    with pytest.raises(ValueError, match="equal N and K"):
        attention(q, k, v[:-1], segments)
    with pytest.raises(ValueError, match="q has 7 tokens, its segments were made for 8"):
        attention(q[:-1], k, v, segments)
    with pytest.raises(ValueError, match="k has 7 tokens, its segments end at 8"):
        attention(q, k[:-1], v[:-1], segments)

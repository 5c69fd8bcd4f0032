"""Merging attention to some keys with attention to others: the kernel and PyTorch against the maths in float64."""

import math

import pytest
import torch

from megasora.kernels.merge_partial_attention import (
    merge_partial_attention,
    merge_partial_attention_reference,
    merge_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(5, 2, 4), (7, 3, 96), (1, 1, 1), (33, 40, 8), (2, 5, 300), (0, 3, 8)]  # tokens, heads, head dim

# numpy's, which computes in the interpreter, of infinities that the kernel allows for
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
each_via = pytest.mark.parametrize("via", ["torch", "triton"])


def make(num_tokens, heads, head_dim, dtype=torch.float32, spread=1.0):
    """out_a, lse_a, out_b, lse_b; `spread`: of the log-sum-exps."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    sides = [(normal(num_tokens, heads, head_dim).to(dtype), spread * normal(num_tokens, heads)) for _ in range(2)]
    return [x.to(DEVICE) for side in sides for x in side]


def expected(given):
    """By the weights of both sides, in float64."""
    out_a, lse_a, out_b, lse_b = (x.double() for x in given)
    lse = (lse_a.exp() + lse_b.exp()).log()
    return (lse_a - lse).exp()[..., None] * out_a + (lse_b - lse).exp()[..., None] * out_b, lse


def assert_merges(given, via, wanted, tolerance=1e-6):
    out, lse = merge_partial_attention(*given, via=via)
    assert out.dtype == lse.dtype == torch.float32
    for x, y in zip((out, lse), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


@each_via
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merged_is_the_sum_by_the_weights(via, shape):
    given = make(*shape)
    assert_merges(given, via, expected(given))


def test_float64_stays_float64():
    given = [x.double() for x in make(5, 3, 8)]
    for via in ("auto", "torch"):
        torch.testing.assert_close(merge_partial_attention(*given, via=via), expected(given), rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match="no float64"):
        merge_partial_attention(*given, via="triton")


@each_via
@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float32", "float16")], ids=str)
def test_outputs_of_16_bit_merge_in_fp32(via, dtypes):
    given = make(9, 3, 24)
    given[0], given[2] = (given[i].to(getattr(torch, dtype)) for i, dtype in zip((0, 2), dtypes, strict=True))
    assert_merges(given, via, expected(given))


@each_via
def test_the_layout_in_memory_does_not_matter(via):
    given = make(7, 3, 24)
    wanted = expected(given)
    far = [torch.stack((x, x), 1)[:, 1] for x in given]  # as keys' and values' gradients come from a hop
    turned = [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in given]  # as lse comes from FlashAttention
    for variant in (far, turned, far[:2] + turned[2:]):
        assert not any(x.is_contiguous() for x in variant)
        assert_merges(variant, via, wanted)


@each_via
def test_inputs_stay_as_they_were(via):
    given = make(5, 2, 4)
    before = [x.clone() for x in given]
    merge_partial_attention(*given, via=via)
    assert all(map(torch.equal, given, before))


@each_via
def test_merging_with_no_keys_changes_nothing_and_makes_no_nan(via):
    out, lse, *_ = make(5, 3, 24)
    nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for given in ((out, lse, *nothing), (*nothing, out, lse)):
        merged = merge_partial_attention(*given, via=via)
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    merged = merge_partial_attention(*nothing, *nothing, via=via)
    assert torch.equal(merged[0], nothing[0]) and torch.equal(merged[1], nothing[1])


@each_via
@pytest.mark.parametrize(("spread", "larger"), [(30.0, 1.0), (3e4, 1e4)], ids=str)
def test_a_side_that_weighs_nothing_leaves_the_other_however_large_the_numbers(via, spread, larger):
    given = make(33, 3, 8, spread=spread)
    given[0] = larger * given[0]
    out_a, lse_a, out_b, lse_b = (x.double() for x in given)
    shift = torch.maximum(lse_a, lse_b)  # as exp of the numbers themselves is inf
    out, lse = expected((out_a, lse_a - shift, out_b, lse_b - shift))
    assert_merges(given, via, (out, lse + shift))


@each_via
def test_a_nan_is_not_hidden(via):
    out, lse, *_ = make(5, 3, 24)
    broken = torch.full_like(out, math.nan)
    nowhere, no_number = torch.full_like(lse, -math.inf), torch.full_like(lse, math.nan)
    for one, other in ((lse, lse), (lse, nowhere), (nowhere, lse)):
        assert merge_partial_attention(out, one, broken, other, via=via)[0].isnan().all()
        assert merge_partial_attention(broken, one, out, other, via=via)[0].isnan().all()
        assert merge_partial_attention(out, no_number, out, other, via=via)[1].isnan().all()
        assert merge_partial_attention(out, one, out, no_number, via=via)[1].isnan().all()


@each_via
def test_error_does_not_grow_with_the_number_of_parts(via):
    generator = torch.Generator().manual_seed(0)
    values, scores = torch.randn(64, 4, 2, 8, generator=generator), 3 * torch.randn(64, 4, 2, generator=generator)
    weights = scores.double().softmax(0)
    wanted = (weights[..., None] * values.double()).sum(0).to(DEVICE), scores.double().logsumexp(0).to(DEVICE)
    out, lse = values[0].to(DEVICE), scores[0].to(DEVICE)
    for value, score in zip(values[1:].to(DEVICE), scores[1:].to(DEVICE), strict=True):  # a key a part
        out, lse = merge_partial_attention(out, lse, value, score, via=via)
    torch.testing.assert_close(out.double(), wanted[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse.double(), wanted[1], rtol=2e-6, atol=2e-6)


def test_reference_equals_the_sum_by_the_weights():
    given = [x.double() for x in make(7, 3, 24)]
    torch.testing.assert_close(merge_partial_attention_reference(*given), expected(given), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(7, 3, 24), (0, 3, 8)], ids=str)
def test_the_operator_keeps_what_it_promises_to_pytorch(shape):
    torch.library.opcheck(merge_triton, tuple(make(*shape)))


@each_via
def test_no_gradient_is_recorded(via):
    given = [x.requires_grad_() for x in make(5, 2, 4)]
    assert not any(x.requires_grad for x in merge_partial_attention(*given, via=via))


def test_shapes_that_do_not_fit_are_refused():
    out, lse, *_ = make(5, 2, 4)
    with pytest.raises(ValueError, match=r"out_a \(5, 2, 4\) and out_b \(4, 2, 4\) must have one shape"):
        merge_partial_attention(out, lse, out[1:], lse)
    with pytest.raises(ValueError, match=r"lse_a \(2, 5\) must be \[L, N\] of outputs \(5, 2, 4\)"):
        merge_partial_attention(out, lse.T, out, lse)
    with pytest.raises(ValueError, match=r"lse_b \(4, 2\) must be"):
        merge_partial_attention(out, lse, out, lse[1:])
    with pytest.raises(ValueError, match="lse_b on meta"):
        merge_partial_attention(out, lse, out, lse.to("meta"))
    with pytest.raises(ValueError, match="via='fast'"):
        merge_partial_attention(out, lse, out, lse, via="fast")

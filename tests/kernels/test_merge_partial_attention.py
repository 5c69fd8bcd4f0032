"""Merging of partial attention: the kernel and the PyTorch version against the maths in float64."""

import math

import pytest
import torch
from agreement import TRITON_DEVICE, each_backend

from megasora.kernels.merge_partial_attention import (
    merge_partial_attention,
    merge_partial_attention_reference,
    merge_triton,
)

SHAPES = [(5, 2, 4), (7, 3, 96), (1, 1, 1), (33, 40, 8), (2, 5, 300), (0, 3, 8)]  # tokens, heads, head dim

# of numpy in the interpreter: the kernel computes with infinities on purpose
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(num_tokens, heads, head_dim, dtype=torch.float32, spread=1.0):
    """out_a, lse_a, out_b, lse_b; `spread`: standard deviation of the log-sum-exps."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    sides = [(normal(num_tokens, heads, head_dim).to(dtype), spread * normal(num_tokens, heads)) for _ in range(2)]
    return [x.to(TRITON_DEVICE) for side in sides for x in side]


def expected(tensors):
    """The weighted sum, in float64."""
    out_a, lse_a, out_b, lse_b = (x.double() for x in tensors)
    lse = (lse_a.exp() + lse_b.exp()).log()
    return (lse_a - lse).exp()[..., None] * out_a + (lse_b - lse).exp()[..., None] * out_b, lse


def assert_merges(tensors, backend, expected_result, tolerance=1e-6):
    out, lse = merge_partial_attention(*tensors, backend=backend)
    assert out.dtype == lse.dtype == torch.float32
    for x, y in zip((out, lse), expected_result, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


@each_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_result_is_the_weighted_sum(backend, shape):
    tensors = make(*shape)
    assert_merges(tensors, backend, expected(tensors))


def test_float64_stays_float64():
    tensors = [x.double() for x in make(5, 3, 8)]
    for backend in ("auto", "torch"):
        torch.testing.assert_close(
            merge_partial_attention(*tensors, backend=backend), expected(tensors), rtol=1e-14, atol=1e-14
        )
    with pytest.raises(ValueError, match="no float64"):
        merge_partial_attention(*tensors, backend="triton")


@each_backend
@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float32", "float16")], ids=str)
def test_outputs_of_16_bit_merge_in_fp32(backend, dtypes):
    tensors = make(9, 3, 24)
    tensors[0], tensors[2] = (tensors[i].to(getattr(torch, dtype)) for i, dtype in zip((0, 2), dtypes, strict=True))
    assert_merges(tensors, backend, expected(tensors))


@each_backend
def test_the_layout_in_memory_does_not_matter(backend):
    tensors = make(7, 3, 24)
    expected_result = expected(tensors)
    far = [torch.stack((x, x), 1)[:, 1] for x in tensors]  # as keys' and values' gradients come from an exchange
    turned = [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in tensors]  # as lse comes from FlashAttention
    for variant in (far, turned, far[:2] + turned[2:]):
        assert not any(x.is_contiguous() for x in variant)
        assert_merges(variant, backend, expected_result)


@each_backend
def test_inputs_are_not_modified(backend):
    tensors = make(5, 2, 4)
    before = [x.clone() for x in tensors]
    merge_partial_attention(*tensors, backend=backend)
    assert all(map(torch.equal, tensors, before))


@each_backend
def test_merging_with_a_side_without_keys_changes_nothing_and_gives_no_nan(backend):
    out, lse, *_ = make(5, 3, 24)
    nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for tensors in ((out, lse, *nothing), (*nothing, out, lse)):
        merged = merge_partial_attention(*tensors, backend=backend)
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    merged = merge_partial_attention(*nothing, *nothing, backend=backend)
    assert torch.equal(merged[0], nothing[0]) and torch.equal(merged[1], nothing[1])


@each_backend
@pytest.mark.parametrize(("spread", "larger"), [(30.0, 1.0), (3e4, 1e4)], ids=str)
def test_a_side_of_negligible_weight_leaves_the_other_unchanged_for_large_values(backend, spread, larger):
    tensors = make(33, 3, 8, spread=spread)
    tensors[0] = larger * tensors[0]
    out_a, lse_a, out_b, lse_b = (x.double() for x in tensors)
    shift = torch.maximum(lse_a, lse_b)  # exp of the lse itself is inf
    out, lse = expected((out_a, lse_a - shift, out_b, lse_b - shift))
    assert_merges(tensors, backend, (out, lse + shift))


@each_backend
def test_nan_propagates(backend):
    out, lse, *_ = make(5, 3, 24)
    broken = torch.full_like(out, math.nan)
    no_keys, nan_lse = torch.full_like(lse, -math.inf), torch.full_like(lse, math.nan)
    for one, other in ((lse, lse), (lse, no_keys), (no_keys, lse)):
        assert merge_partial_attention(out, one, broken, other, backend=backend)[0].isnan().all()
        assert merge_partial_attention(broken, one, out, other, backend=backend)[0].isnan().all()
        assert merge_partial_attention(out, nan_lse, out, other, backend=backend)[1].isnan().all()
        assert merge_partial_attention(out, one, out, nan_lse, backend=backend)[1].isnan().all()


@each_backend
def test_error_does_not_grow_with_the_number_of_parts(backend):
    generator = torch.Generator().manual_seed(0)
    values, scores = torch.randn(64, 4, 2, 8, generator=generator), 3 * torch.randn(64, 4, 2, generator=generator)
    weights = scores.double().softmax(0)
    expected_out = (weights[..., None] * values.double()).sum(0).to(TRITON_DEVICE)
    expected_lse = scores.double().logsumexp(0).to(TRITON_DEVICE)
    out, lse = values[0].to(TRITON_DEVICE), scores[0].to(TRITON_DEVICE)
    for value, score in zip(values[1:].to(TRITON_DEVICE), scores[1:].to(TRITON_DEVICE), strict=True):
        out, lse = merge_partial_attention(out, lse, value, score, backend=backend)
    torch.testing.assert_close(out.double(), expected_out, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6)


def test_the_reference_equals_the_weighted_sum():
    tensors = [x.double() for x in make(7, 3, 24)]
    torch.testing.assert_close(merge_partial_attention_reference(*tensors), expected(tensors), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(7, 3, 24), (0, 3, 8)], ids=str)
def test_the_operator_passes_opcheck(shape):
    torch.library.opcheck(merge_triton, tuple(make(*shape)))


@each_backend
def test_no_gradient_is_recorded(backend):
    tensors = [x.requires_grad_() for x in make(5, 2, 4)]
    assert not any(x.requires_grad for x in merge_partial_attention(*tensors, backend=backend))


def test_shapes_that_do_not_match_raise():
    out, lse, *_ = make(5, 2, 4)
    with pytest.raises(ValueError, match=r"out_a \(5, 2, 4\) and out_b \(4, 2, 4\) must have one shape"):
        merge_partial_attention(out, lse, out[1:], lse)
    with pytest.raises(ValueError, match=r"lse_a \(2, 5\) must be \[L, N\] of outputs \(5, 2, 4\)"):
        merge_partial_attention(out, lse.T, out, lse)
    with pytest.raises(ValueError, match=r"lse_b \(4, 2\) must be"):
        merge_partial_attention(out, lse, out, lse[1:])
    with pytest.raises(ValueError, match="lse_b on meta"):
        merge_partial_attention(out, lse, out, lse.to("meta"))
    with pytest.raises(ValueError, match="backend='fast'"):
        merge_partial_attention(out, lse, out, lse, backend="fast")

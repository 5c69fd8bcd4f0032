"""RMSNorm: against the plain maths, whole and in parts, and what it keeps for the backward pass."""

import threading

import pytest
import torch

from megasora.kernels.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-6


def inputs(*shape, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(size, generator=draw, dtype=torch.float64) for size in (shape, shape[-1:], shape))
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), grad


def gradients(function, x, weight, grad, *rest):
    out = function(x, weight, EPS, *rest)
    return out, *torch.autograd.grad(out, (x, weight), grad.to(out.dtype))


@pytest.mark.parametrize("shape", [(7, 3, 8), (5, 12), (1, 2), (4, 0, 6)], ids=str)
def test_output_and_gradients_are_those_of_the_maths(shape):
    x, weight, grad = inputs(*shape)
    found, expected = gradients(rms_norm, x, weight, grad), gradients(rms_norm_reference, x, weight, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_gradients_are_the_slopes_of_the_output():
    x, weight, _ = inputs(3, 2, 4)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight))


def test_a_strided_view_gives_what_its_copy_gives():
    qkv = inputs(6, 3, 8)[0].detach()
    weight = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(rms_norm(qkv[:, 1], weight, EPS), rms_norm(qkv[:, 1].clone(), weight, EPS))


def test_bfloat16_is_rounded_once():
    x, weight, grad = inputs(50, 64, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    found = gradients(rms_norm, x, weight, grad.bfloat16())
    expected = gradients(rms_norm_reference, *exact, grad.bfloat16())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-5)


def test_parts_of_a_vector_on_two_ranks_are_normed_as_one():
    """Two threads stand for the ranks; what they exchange is the sum of their parts alone."""
    x, weight, grad = inputs(9, 12)
    expected = gradients(rms_norm_reference, x, weight, grad)
    meeting, given, found = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def rank(r):
        def total(part):
            given[r] = part
            meeting.wait()
            whole = given[0] + given[1]
            meeting.wait()
            return whole

        mine = slice(0, 5) if r == 0 else slice(5, 12)
        parts = [t.detach()[..., mine].clone().requires_grad_() for t in (x, weight)]
        out = rms_norm(*parts, EPS, 12, total)
        # the engine works off one graph at a time in a thread of its own choice: the backward is called directly
        grads = out.grad_fn.apply(grad[..., mine])
        found[r] = out.detach(), *grads[:2]

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for parts, whole in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=1e-12, atol=1e-13)


def test_only_the_input_and_one_number_a_vector_are_kept():
    x, weight, _ = inputs(40, 2, 16, dtype=torch.bfloat16)
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = rms_norm(x, weight, EPS)
    assert out.shape == x.shape
    assert sum(kept.values()) == x.nbytes + weight.nbytes + 40 * 2 * 4


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"x \(4, 6\) must be \[..., D\], its weight \(5,\) \[D\]"):
        rms_norm(torch.zeros(4, 6), torch.zeros(5), EPS)
    with pytest.raises(ValueError, match=r"must be"):
        rms_norm(torch.zeros(6), torch.zeros(6), EPS)

"""Bias and GELU: agreement with the reference in float64, and what the backward pass saves and returns."""

import pytest
import torch
import torch.nn.functional as F
from agreement import (
    TOLERANCE,
    TRITON_DEVICE,
    assert_agrees,
    assert_compiles_as_one_graph,
    assert_gradients_repeat,
    each_backend,
    each_variant,
    for_triton,
    normal,
    outputs_and_gradients,
    saved_bytes,
)

from megasora.kernels.gelu import (
    backward_triton,
    forward_triton,
    gelu,
    gelu_backward,
    gelu_forward,
    gelu_reference,
)

SHAPES = {  # tokens, width
    "several programs of the backward": (300, 24),
    "several blocks of columns": (9, 600),
    "one token, one column": (1, 1),
    "no token": (0, 24),
}


def inputs(tokens, width, scale=1.0):
    return [normal(tokens, width) * scale, normal(width, seed=1)]


@each_variant
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_the_reference(shape, backend, device, dtype):
    operation = lambda *tensors: gelu(*tensors, backend=backend)  # noqa: E731
    assert_agrees(operation, gelu_reference, inputs(*SHAPES[shape]), device, dtype)


def test_the_reference_is_the_gelu_of_pytorch():
    x, bias = inputs(5, 7)
    assert torch.equal(gelu_reference(x, bias), F.gelu(x + bias, approximate="tanh"))
    assert torch.autograd.gradcheck(gelu_reference, [x.requires_grad_(), bias.requires_grad_()])


@each_backend
def test_values_far_from_zero_give_no_nan(backend):
    """There exp is infinite or 0: h is z or 0, and its slope 1 or 0."""
    x = torch.tensor([[-1e4, -100.0, -12.0, 12.0, 100.0, 1e4]], device=TRITON_DEVICE)
    h, dx, dbias = gelu_backward(torch.full_like(x, 3.0), x, torch.zeros_like(x[0]), backend)
    assert torch.equal(h, x.clamp_min(0)) and torch.equal(dx, 3.0 * (x > 0)) and torch.equal(dbias, dx[0])
    assert torch.equal(gelu_forward(x, torch.zeros_like(x[0]), backend), h)


@each_backend
def test_the_backward_pass_returns_the_output_again_bit_by_bit(backend):
    x, bias = for_triton(inputs(40, 300, scale=3.0))
    for dtype in (torch.float32, torch.bfloat16) if backend == "torch" else (torch.float32,):
        x, bias = x.to(dtype), bias.to(dtype)
        h = gelu_forward(x, bias, backend)
        again, dx, dbias = gelu_backward(torch.ones_like(x), x, bias, backend)
        assert torch.equal(again, h) and h.dtype == dx.dtype == dbias.dtype == dtype
        assert torch.equal(gelu(x, bias, backend), h)


@each_backend
def test_gradients_repeat_bit_by_bit_and_only_the_input_is_saved(backend):
    operation = lambda *tensors: gelu(*tensors, backend=backend)  # noqa: E731
    tensors = for_triton(inputs(300, 40))
    assert_gradients_repeat(operation, tensors)
    assert saved_bytes(operation, tensors) == (300 + 1) * 40 * 4


@each_backend
def test_the_gradient_of_the_bias_is_summed_in_fp32(backend):
    """1,000 gradients of 1.0039 in bf16: summed in bf16 they would stop at 512."""
    x, grad = torch.full((1000, 3), 50.0), torch.full((1000, 3), 1.0 + 2**-7)
    x, grad, bias = (t.to(TRITON_DEVICE, torch.bfloat16) for t in (x, grad, torch.zeros(3)))
    if backend == "triton" and TRITON_DEVICE == "cpu":
        x, grad, bias = x.float(), grad.float(), bias.float()  # the interpreter is inaccurate in bf16
    dbias = gelu_backward(grad, x, bias, backend)[2]
    assert dbias.tolist() == pytest.approx([1000 * (1 + 2**-7)] * 3, rel=TOLERANCE[torch.bfloat16] / 4)


@each_backend
def test_inputs_may_be_slices_of_wider_tensors(backend):
    wide, grads, biases = for_triton([normal(20, 90), normal(20, 90, seed=2), normal(90, seed=1)])
    x, grad, bias = wide[:, 10:50], grads[:, 50:], biases[::2][:40]
    expected = outputs_and_gradients(gelu_reference, [x.contiguous(), bias.contiguous()])[0][0]
    assert torch.allclose(gelu_forward(x, bias, backend), expected, atol=1e-6)
    for a, b in zip(
        gelu_backward(grad, x, bias, backend),
        gelu_backward(grad.contiguous(), x.contiguous(), bias.contiguous(), "torch"),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    transposed = x.t().contiguous().t()
    assert torch.equal(gelu_forward(transposed, bias, backend), gelu_forward(x, bias, backend))


@each_backend
def test_it_compiles_as_one_graph(backend):
    assert_compiles_as_one_graph(lambda *tensors: gelu(*tensors, backend=backend), for_triton(inputs(40, 24)))


def test_operators_pass_opcheck():
    x, bias = for_triton(inputs(9, 24))
    torch.library.opcheck(forward_triton, (x, bias))
    torch.library.opcheck(backward_triton, (x, x, bias))


def test_invalid_arguments_raise():
    x = torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"x \(5, 4\) must be \[L, D\], its bias \(5,\) \[D\]"):
        gelu(x, x[:, 0])
    with pytest.raises(ValueError, match=r"x \(5, 2, 2\) must be \[L, D\]"):
        gelu_backward(x, x.view(5, 2, 2), x[0, :2])
    with pytest.raises(ValueError, match="x on cpu, bias on meta"):
        gelu_forward(x, torch.zeros(4, device="meta"))

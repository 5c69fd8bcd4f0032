"""The MLP: values and gradients of two linears with a GELU between them, which the backward pass computes again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megasora.kernels.linear import Float8Products
from megasora.model.block import MLP
from megasora.parallel.weight_grad_store import WeightGradStore, apply_deferred_weight_grads

TOKENS, WIDTH, HIDDEN = 10, 6, 14


def build(dtype=torch.float64):
    torch.manual_seed(0)
    mlp = MLP(WIDTH, HIDDEN, "torch").to(dtype)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    return mlp, torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)


def plain(mlp, x):
    h = F.gelu(F.linear(x, mlp.up.weight, mlp.up.bias), approximate="tanh")
    return F.linear(h, mlp.down.weight, mlp.down.bias)


def gradients(y, mlp, x):
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return dict(
        zip(["x", *dict(mlp.named_parameters())], torch.autograd.grad(y, [x, *mlp.parameters()], grad), strict=True)
    )


def test_values_and_gradients_are_those_of_two_linears_and_a_gelu():
    mlp, x = build()
    assert list(mlp.state_dict()) == ["up.weight", "up.bias", "down.weight", "down.bias"]
    torch.testing.assert_close(mlp(x), plain(mlp, x))
    expected = gradients(plain(mlp, x), mlp, x)
    for name, gradient in gradients(mlp(x), mlp, x).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_the_hidden_vector_is_saved_once_and_without_the_gelu():
    mlp, x = build()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp(x)
    hidden = [t for t in saved if t.shape == (TOKENS, HIDDEN)]
    assert len(hidden) == 1
    torch.testing.assert_close(hidden[0], x @ mlp.up.weight.t())


@pytest.mark.parametrize("recompute", [False, True])
def test_deferred_weight_gradients_are_those_computed_at_once(recompute):
    (mlp, x), store = build(), WeightGradStore()
    expected = gradients(plain(mlp, x), mlp, x)
    apply_deferred_weight_grads(mlp, store)
    y = torch.utils.checkpoint.checkpoint(mlp, x, use_reentrant=False) if recompute else mlp(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype))
    torch.testing.assert_close(x.grad, expected["x"])
    assert mlp.up.weight.grad is None and mlp.down.weight.grad is None and mlp.down.bias.grad is None
    torch.testing.assert_close(mlp.up.bias.grad, expected["up.bias"])  # a by-product of the gradient of x
    store.pop()()
    for name, parameter in mlp.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_in_fp8_the_gradients_are_near_those_of_bf16(recipe):
    mlp, x = build(torch.float32)
    expected, exact = gradients(plain(mlp, x), mlp, x), plain(mlp, x).detach()
    mlp.up.products = mlp.down.products = Float8Products(recipe)
    found, y = gradients(mlp(x), mlp, x), mlp(x).detach()
    assert 0 < float((y - exact).norm() / exact.norm()) < 0.1
    for name, gradient in found.items():
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 0.15, name
    assert not torch.equal(found["down.weight"], expected["down.weight"])

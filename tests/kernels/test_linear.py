"""The products of linears: without FP8 those of nn.Linear bit for bit, with it those of their definition."""

import copy

import pytest
import torch
from torch import nn

from megasora.kernels.float8 import E4M3, E5M2, quantize_reference
from megasora.kernels.linear import PLAIN, RECIPES, Float8Products, Linear, linear

ROUNDING = {E4M3: (2**-4, 2**-10), E5M2: (2**-3, 2**-17)}  # of an element, of its scale; see float8.py
each_recipe = pytest.mark.parametrize("recipe", RECIPES)


class Store:
    """A WeightGradStore."""

    def __init__(self):
        self.deferred = []

    def put(self, parameter, compute):
        self.deferred.append((parameter, compute))

    def grads(self):
        return {id(parameter): compute() for parameter, compute in self.deferred}


def problem(dtype=torch.float32, tokens=40, inputs=32, outputs=48):
    """(x, gradient of the output, a Linear); x and the gradient have tokens and features of very different sizes."""
    draw = torch.Generator().manual_seed(0)
    x, grad = torch.randn(tokens, inputs, generator=draw), torch.randn(tokens, outputs, generator=draw)
    x *= torch.logspace(-2, 1, tokens)[:, None]
    grad *= torch.logspace(-4, -1, outputs) * torch.logspace(1, -3, tokens)[:, None]
    module = Linear(inputs, outputs)
    with torch.no_grad():
        module.weight.copy_(torch.randn(outputs, inputs, generator=draw) * torch.logspace(-1, 0, inputs))
        module.bias.copy_(torch.randn(outputs, generator=draw))
    return x.to(dtype).requires_grad_(), grad.to(dtype), module.to(dtype)


def run(module, x, grad):
    """y, dx, dW, db"""
    module.zero_grad()
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, module.weight, module.bias], grad)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_without_fp8_it_is_torchs_linear_bit_for_bit(dtype):
    x, grad, module = problem(dtype)
    plain = nn.Linear(32, 48, dtype=dtype)
    plain.load_state_dict(module.state_dict())
    expected, store = run(plain, x, grad), Store()
    assert all(torch.equal(a, b) for a, b in zip(run(module, x, grad), expected, strict=True))
    y = linear(x, module, PLAIN, None)
    by_function = [y, *torch.autograd.grad(y, [x, module.weight, module.bias], grad)]
    assert all(torch.equal(a, b) for a, b in zip(by_function, expected, strict=True))
    module.wgrad_store = store
    y = module(x)
    dx, *rest = torch.autograd.grad(y, [x, module.weight, module.bias], grad, allow_unused=True)
    assert rest == [None, None] and torch.equal(dx, expected[1]) and torch.equal(y, expected[0])
    later = store.grads()
    assert torch.equal(later[id(module.weight)], expected[2]) and torch.equal(later[id(module.bias)], expected[3])


def fp8_numbers(x, per_row, dtype=E4M3):
    """The matrix of FP8 numbers times scales that the definition gives, in float64."""
    q = quantize_reference(x, dtype, per_row)
    return q.values.double() * q.scale.double()


@each_recipe
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_each_product_is_that_of_the_rounded_matrices(dtype, recipe):
    """Scales of rows of the left and columns of the right operand, or of matrices, for each of the three products."""
    x, grad, module = problem(dtype)
    module.products, per_row = Float8Products(recipe), recipe != "tensorwise"
    rounded = lambda matrix, fp8=E4M3: fp8_numbers(matrix.detach(), per_row, fp8)  # noqa: E731
    by_column = lambda matrix, fp8=E4M3: rounded(matrix.t(), fp8).t()  # noqa: E731
    w, of_grad = module.weight, E4M3 if per_row else E5M2
    exact = [
        rounded(x) @ rounded(w).t() + module.bias.double(),
        rounded(grad, of_grad) @ by_column(w),
        grad.double().t() @ x.double()
        if recipe == "rowwise_with_gw_hp"
        else by_column(grad, of_grad).t() @ by_column(x),
        grad.double().sum(0),
    ]
    for got, wanted in zip(run(module, x, grad), exact, strict=True):
        error, bound = (got.double() - wanted).abs().max(), wanted.abs().max()
        assert got.dtype == dtype
        assert error <= bound * {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]


@each_recipe
def test_errors_are_within_the_bound_of_the_rounding(recipe):
    """|error of sum a b| <= sum |a| db + |b| da + da db, with the largest roundings da and db of each element."""
    x, grad, module = problem(torch.float64)
    module.products, per_row, w = Float8Products(recipe), recipe != "tensorwise", module.weight.detach()
    y, dx, dw, _ = run(module, x, grad)

    def largest_error(matrix, fp8=E4M3):
        of_element, of_scale = ROUNDING[fp8]
        scale = quantize_reference(matrix, fp8, per_row).scale.double()
        return torch.maximum(of_element * matrix.abs(), of_scale * scale.expand_as(matrix))

    def check(got, a, b, fp8=E4M3, exact=False):
        """a [M, K], b [N, K]"""
        da, db = (torch.zeros_like(a), torch.zeros_like(b)) if exact else (largest_error(a, fp8), largest_error(b))
        bound = a.abs() @ db.t() + da @ b.abs().t() + da @ db.t()
        assert ((got - a @ b.t()).abs() <= bound + 1e-12).all()

    x, of_grad = x.detach(), E4M3 if per_row else E5M2
    check(y - module.bias.detach(), x, w)
    check(dx, grad, w.t(), of_grad)
    check(dw, grad.t(), x.t(), of_grad, exact=recipe == "rowwise_with_gw_hp")


@each_recipe
def test_deferred_weight_gradients_are_the_same(recipe):
    x, grad, module = problem(torch.bfloat16)
    module.products = Float8Products(recipe)
    expected, module.wgrad_store = run(module, x, grad), Store()
    y = module(x)
    (dx,) = torch.autograd.grad(y, [x], grad, retain_graph=True)
    torch.autograd.grad(y, [module.weight, module.bias], grad, allow_unused=True)
    later = module.wgrad_store.grads()
    assert torch.equal(dx, expected[1])
    assert torch.equal(later[id(module.weight)], expected[2]) and torch.equal(later[id(module.bias)], expected[3])


@pytest.mark.parametrize("recipe, size", [("tensorwise", 1), ("rowwise", 2), ("rowwise_with_gw_hp", 2)])
def test_bytes_saved_of_the_input(recipe, size):
    x, _, module = problem(torch.bfloat16)
    module.products, saved = Float8Products(recipe), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    of_input = [t for t in saved if t.data_ptr() != module.weight.data_ptr()]
    scale = 4 if recipe == "tensorwise" else 0
    assert sum(t.nbytes for t in of_input) == x.numel() * size + scale


@each_recipe
def test_a_gradient_that_is_not_finite_stays_so(recipe):
    """So that the step guard sees it."""
    for bad in (torch.inf, torch.nan):
        x, grad, module = problem(torch.bfloat16)
        module.products, grad[7, 3] = Float8Products(recipe), bad
        _, dx, dw, _ = run(module, x, grad)
        assert not dx[7].isfinite().any() and not dw[3].isfinite().any()


@each_recipe
def test_input_with_leading_dims_and_without_gradient(recipe):
    x, grad, module = problem(torch.bfloat16)
    module.products = Float8Products(recipe)
    expected = run(module, x, grad)
    folded, other = x.detach().unflatten(0, (5, 8)), copy.deepcopy(module)
    y = other(folded)
    y.backward(grad.unflatten(0, (5, 8)))
    assert torch.equal(y.flatten(0, 1), expected[0]) and torch.equal(other.weight.grad, expected[2])

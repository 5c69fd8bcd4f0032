"""One pass of AdamW with averages and a copy against the steps apart; sums of squares against float64."""

from __future__ import annotations

import pytest
import torch

from megasora.kernels.adamw import MAX_AVERAGES, AdamWRule, Averages, adamw_, adamw_reference, sum_of_squares

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])
RULE = AdamWRule(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, number=3)
SIZES = [1, 7, 1024, 1025, 5000]  # of tiles of 1024: a part of one, one, and more


def draw(size, grad_dtype=torch.float32, num_averages=1, seed=0):
    """w, m, v, grad, averages"""
    torch.manual_seed(seed)
    w, m, v, grad, *averages = torch.randn(4 + num_averages, size, device=DEVICE).unbind()
    weights = [0.1 * (1 + index) for index in range(num_averages)]
    return w, m, v.abs(), grad.to(grad_dtype), Averages([x.contiguous() for x in averages], weights)


def double(averages):
    return Averages([x.double() for x in averages.tensors], averages.weights)


@each_backend
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_averages", [0, 1, 3, MAX_AVERAGES])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_pass_is_the_steps_apart(backend, size, num_averages, grad_dtype, out_dtype):
    w, m, v, grad, averages = draw(size, grad_dtype, num_averages)
    factor, out = torch.tensor(0.3, device=DEVICE), torch.full((size,), 7.0, dtype=out_dtype, device=DEVICE)
    expected = adamw_reference(
        w.double(), m.double(), v.double(), grad, RULE, factor.double(), double(averages), torch.float64
    )
    kept = grad.clone()
    adamw_(w, m, v, grad, RULE, factor, torch.tensor(True, device=DEVICE), averages, out, backend=backend)
    for actual, exact in zip((w, m, v, *averages.tensors), expected[:-1], strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=1e-6)
    # the interpreter of Triton cuts off bits where a GPU rounds
    tolerance = 2**-7 if out_dtype == torch.bfloat16 and backend == "triton" and DEVICE == "cpu" else 0
    torch.testing.assert_close(out, w.to(out_dtype), rtol=tolerance, atol=0)
    assert torch.equal(grad, kept)


@each_backend
def test_a_step_is_that_of_torch_optim(backend):
    w, m, v, grad, _ = draw(3000)
    parameter = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=RULE.lr, betas=RULE[1:3], eps=RULE.eps, weight_decay=RULE.weight_decay
    )
    state = {"step": torch.tensor(float(RULE.number)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[parameter], parameter.grad = state, grad.clone()
    optimizer.step()
    adamw_(w, m, v, grad, RULE, backend=backend)
    for actual, expected in ((w, parameter.data), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-7)


def test_float64_is_computed_in_float64():
    w, m, v, grad, averages = draw(200, torch.float64)
    w, m, v, averages = w.double(), m.double(), v.double(), double(averages)
    expected = adamw_reference(w, m, v, grad, RULE, None, averages, torch.float64)
    adamw_(w, m, v, grad, RULE, averages=averages)
    for actual, exact in zip((w, m, v, *averages.tensors), expected[:-1], strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-14)


@each_backend
@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_where_apply_is_false_no_bit_changes(backend, value):
    w, m, v, _, averages = draw(2500, num_averages=2)
    for x in (w, m, *averages.tensors):
        x[::3], x[1::3] = -0.0, 1e-40
    grad, out = torch.full_like(w, value), torch.randn(2500, device=DEVICE).bfloat16()
    tensors = [w, m, v, out, *averages.tensors]
    before = [x.clone() for x in tensors]
    factor, flag = torch.tensor(value, device=DEVICE), torch.tensor(False, device=DEVICE)
    adamw_(w, m, v, grad, RULE, factor, flag, averages, out, backend=backend)
    for x, old in zip(tensors, before, strict=True):
        bits = torch.int16 if x.dtype == torch.bfloat16 else torch.int32
        assert torch.equal(x.view(bits), old.view(bits))


@each_backend
def test_nothing_around_a_slice_is_touched(backend):
    tensors = torch.randn(6, 4000, device=DEVICE).unbind()
    tensors[2].abs_()
    before = [x.clone() for x in tensors]
    w, m, v, grad, average, out = (x[1001:2998] for x in tensors)
    adamw_(w, m, v, grad, RULE, averages=Averages([average], [0.5]), out=out, backend=backend)
    for x, old in zip(tensors, before, strict=True):
        assert torch.equal(x[:1001], old[:1001]) and torch.equal(x[2998:], old[2998:])
    assert not torch.equal(out, before[5][1001:2998])


@each_backend
def test_a_step_repeats_bit_by_bit(backend):
    results = []
    for _ in range(2):
        w, m, v, grad, averages = draw(100_000 if backend == "torch" else 5000)
        adamw_(w, m, v, grad, RULE, averages=averages, backend=backend)
        results.append(torch.cat([w, m, v, *averages.tensors]))
    assert torch.equal(*results)


def test_no_element_is_no_step():
    empty = torch.zeros(0, device=DEVICE)
    for backend in ("torch", "triton"):
        adamw_(empty, empty, empty, empty, RULE, backend=backend)
        assert float(sum_of_squares(empty, backend)) == 0


def test_arguments_that_do_not_fit_are_refused():
    w, m, v, grad, averages = draw(10, num_averages=5)
    with pytest.raises(ValueError, match=r"grad is \[9\]; all must be \[N\], contiguous, like w, \[10\]"):
        adamw_(w, m, v, grad[:9], RULE)
    with pytest.raises(ValueError, match="m is"):
        adamw_(w, torch.zeros(20, device=DEVICE)[::2], v, grad, RULE)
    with pytest.raises(ValueError, match="5 averages; at most 4"):
        adamw_(w, m, v, grad, RULE, averages=averages)


# ---------------------------------------------------------------------- sums of squares


@each_backend
@pytest.mark.parametrize("size", [1, 1000, 2048 * 16, 2048 * 16 * 3 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_of_squares_is_that_in_float64_and_repeats_bit_by_bit(backend, size, dtype):
    torch.manual_seed(1)
    x = (torch.randn(size, device=DEVICE) * 1e-3).to(dtype)
    total = sum_of_squares(x, backend)
    assert total.shape == () and total.dtype == torch.float64
    torch.testing.assert_close(total, x.double().square().sum(), rtol=2e-6, atol=0)
    assert torch.equal(total, sum_of_squares(x, backend))


@each_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_element_that_is_not_finite_is_seen(backend, value):
    x = torch.zeros(100_000, device=DEVICE)
    x[70_001] = value
    assert not sum_of_squares(x, backend).isfinite()

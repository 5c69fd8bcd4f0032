"""Modulation and gating by rows: against the plain maths, and what they keep for the backward pass."""

import pytest
import torch

from megasora.kernels.adaln_modulate import (
    adaln_modulate,
    adaln_modulate_reference,
    gated_add,
    gated_add_reference,
)

EPS = 1e-6
PAIRS = [  # operation, reference, tensors [L, D] and [R, D] that it takes before row_L, what comes behind
    pytest.param(adaln_modulate, adaln_modulate_reference, "LRR", (EPS,), id="modulate"),
    pytest.param(gated_add, gated_add_reference, "LLR", (), id="gate"),
]
each_pair = pytest.mark.parametrize("operation, reference, shapes, rest", PAIRS)
ROWS = [  # the row of each token; row 2 of the first has no token, the last are those of one tensor-parallel rank
    pytest.param([0, 0, 0, 1, 3, 3, 3, 3], id="uneven"),
    pytest.param([0], id="one token"),
    pytest.param([0] * 7, id="one row"),
    pytest.param([1, 1, 2], id="a slice"),
    pytest.param([0] * 130 + [1] * 126 + [3] * 300, id="longer than a run of a sum"),
    pytest.param([], id="no token"),
]


def inputs(shapes, row, width=6, dtype=torch.float64, num_rows=4):
    draw = torch.Generator().manual_seed(len(row))
    sizes = [(len(row) if kind == "L" else num_rows, width) for kind in shapes]
    tensors = [torch.randn(size, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]
    return tensors, torch.tensor(row, dtype=torch.int64)


def gradients(function, tensors, row, rest):
    out = function(*tensors, row, *rest)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return out, torch.autograd.grad((out.double() * weight).sum(), tensors)


@each_pair
@pytest.mark.parametrize("row", ROWS)
def test_output_and_gradients_are_those_of_the_maths(operation, reference, shapes, rest, row):
    tensors, row_L = inputs(shapes, row)
    out, found = gradients(operation, tensors, row_L, rest)
    expected_out, expected = gradients(reference, tensors, row_L, rest)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@each_pair
def test_gradients_are_the_slopes_of_the_output(operation, reference, shapes, rest):
    tensors, row_L = inputs(shapes, [0, 0, 1, 2, 2], width=4, num_rows=3)
    assert torch.autograd.gradcheck(lambda *tensors: operation(*tensors, row_L, *rest), tensors)


@each_pair
def test_bfloat16_is_rounded_once(operation, reference, shapes, rest):
    tensors, row_L = inputs(shapes, [0] * 40 + [1] * 24, width=32, dtype=torch.bfloat16)
    exact, _ = inputs(shapes, [0] * 40 + [1] * 24, width=32, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in exact]
    out, found = gradients(operation, tensors, row_L, rest)
    expected_out, expected = gradients(reference, exact, row_L, rest)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected_out, rtol=2**-8, atol=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        # the gradient of the output comes in bfloat16 itself: errors of 2^-9 each, summed over a row
        assert float((a.double() - b).norm() / b.norm()) < 2**-7


@each_pair
def test_vectors_of_rows_are_not_kept_for_each_token(operation, reference, shapes, rest):
    tensors, row_L = inputs(shapes, [0] * 60 + [1] * 40, width=32, dtype=torch.float32, num_rows=2)
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = operation(*tensors, row_L, *rest)
    assert out.untyped_storage().data_ptr() not in kept
    tokens, rows, numbers, statistics = 100 * 32 * 4, 2 * 32 * 4, 100 * 8, 2 * 100 * 4
    assert sum(kept.values()) == tokens + rows + numbers + (statistics if operation is adaln_modulate else 0)


@each_pair
def test_gradients_of_rows_repeat_bit_by_bit(operation, reference, shapes, rest):
    tensors, row_L = inputs(shapes, [0] * 300 + [1] * 200, width=16, dtype=torch.float32)
    _, first = gradients(operation, tensors, row_L, rest)
    _, second = gradients(operation, tensors, row_L, rest)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_shapes_that_do_not_fit_are_refused():
    x, rows, row_L = torch.zeros(5, 4), torch.zeros(2, 4), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"rows \(4,\) \[L\]"):
        adaln_modulate(x, rows, rows, row_L[:4], EPS)
    with pytest.raises(ValueError, match=r"must be \[R, 4\]"):
        adaln_modulate(x, rows, rows[:1], row_L, EPS)
    with pytest.raises(ValueError, match=r"must be \[R, 4\]"):
        gated_add(x, x, rows[:, :3], row_L)
    with pytest.raises(ValueError, match=r"side by side, rows rising: \[0, 1, 0, 0, 0\]"):
        gated_add(x, x, rows, torch.tensor([0, 1, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"branch is \(4, 4\), x \(5, 4\)"):
        gated_add(x, x[:4], rows, row_L)

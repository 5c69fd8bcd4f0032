"""Gated residual: agreement with the reference in float64, and what it saves for the backward pass."""

import agreement
import pytest
import torch
from agreement import (
    TRITON_DEVICE,
    assert_agrees,
    assert_compiles_as_one_graph,
    assert_gradients_repeat,
    build_rows,
    each_backend,
    each_variant,
    for_triton,
    normal,
    outputs_and_gradients,
    saved_bytes,
)

from megasora.kernels.gated_add import backward_triton, forward_triton, gated_add, gated_add_reference

PACKS = {  # lengths of rows, tokens of padding, width
    **agreement.PACKS,
    "width 5120": ((2, 1), 1, 5120),
}


def inputs(lengths, padding, width):
    shape = sum(lengths) + padding, width
    return [normal(*shape), normal(*shape, seed=1), normal(len(lengths), width, seed=2)]


def bind(function, rows, **options):
    """A function of the tensors of `inputs`."""
    return lambda x, branch, gate: function(x, branch, gate, rows, **options)


@each_variant
@pytest.mark.parametrize("pack", PACKS)
def test_output_and_gradients_equal_the_reference(pack, backend, device, dtype):
    lengths, padding, width = PACKS[pack]
    assert_agrees(
        bind(gated_add, build_rows(lengths, padding, device), backend=backend),
        bind(gated_add_reference, build_rows(lengths, padding)),
        inputs(lengths, padding, width),
        device,
        dtype,
    )


def test_gradients_of_the_reference_equal_finite_differences():
    tensors = [x.requires_grad_() for x in inputs((2, 0, 3), 1, 4)]
    assert torch.autograd.gradcheck(bind(gated_add_reference, build_rows((2, 0, 3), 1)), tensors)


@each_backend
def test_padding_passes_through_and_its_branch_has_no_effect(backend):
    rows = build_rows((40, 9), 11, TRITON_DEVICE)
    tensors = for_triton(inputs((40, 9), 11, 24))
    tensors[1][49:] = float("nan")
    operation = bind(gated_add, rows, backend=backend)
    (y,), (dx, dbranch, dgate) = outputs_and_gradients(operation, tensors)
    assert torch.equal(y[49:], tensors[0][49:]) and not dbranch[49:].any() and bool(dgate.isfinite().all())
    assert bool(dx[49:].any())


@each_backend
def test_gradients_repeat_bit_by_bit_and_only_branch_and_gate_are_saved(backend):
    operation = bind(gated_add, build_rows((300, 200), 12, TRITON_DEVICE), backend=backend)
    tensors = for_triton(inputs((300, 200), 12, 16))
    assert_gradients_repeat(operation, tensors)
    branch, gate = 512 * 16 * 4, 2 * 16 * 4
    assert saved_bytes(operation, tensors) == branch + gate


@each_backend
@pytest.mark.parametrize("padding", [0, 3])
def test_it_compiles_as_one_graph(padding, backend):
    operation = bind(gated_add, build_rows((40, 9), padding, TRITON_DEVICE), backend=backend)
    assert_compiles_as_one_graph(operation, for_triton(inputs((40, 9), padding, 24)))


def test_operators_pass_opcheck():
    rows = build_rows((4, 0, 5), 3, TRITON_DEVICE)
    x, branch, gate = for_triton(inputs((4, 0, 5), 3, 24))
    index = rows.tile_start_Q, rows.tile_row_Q
    torch.library.opcheck(forward_triton, (x, branch, gate, *index, rows.first_tile_P))
    torch.library.opcheck(backward_triton, (x, branch, gate, *index, rows.first_tile_R, rows.first_tile_P))


def test_invalid_arguments_raise():
    x, gate, rows = torch.zeros(5, 4), torch.zeros(2, 4), build_rows((2, 3), 0)
    with pytest.raises(ValueError, match=r"branch \(4, 4\) must have the shape of x \(5, 4\)"):
        gated_add(x, x[:4], gate, rows)
    with pytest.raises(ValueError, match=r"gate \(2, 3\) must be \[R, D\] = \(2, 4\)"):
        gated_add(x, x, gate[:, :3], rows)
    with pytest.raises(ValueError, match="x on cpu, branch on meta"):
        gated_add(x, x.to("meta"), gate, rows)

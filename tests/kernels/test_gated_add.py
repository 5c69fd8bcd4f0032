"""A branch through the gate of its row: against the plain maths in float64, and what is kept for the backward pass."""

import agreement
import pytest
import torch
from agreement import TRITON_DEVICE, assert_agrees, bytes_kept, every_way, normal, outputs_and_gradients, rows_of

from megasora.kernels.gated_add import backward_triton, forward_triton, gated_add, gated_add_reference

PACKS = {  # lengths of rows, tokens of padding, width
    **agreement.PACKS,
    "width 5120": ((2, 1), 1, 5120),
}


def inputs(lengths, padding, width):
    shape = sum(lengths) + padding, width
    return [normal(*shape), normal(*shape, seed=1), normal(len(lengths), width, seed=2)]


def call(function, rows, **options):
    return lambda x, branch, gate: function(x, branch, gate, rows, **options)


@every_way
@pytest.mark.parametrize("pack", PACKS)
def test_output_and_gradients_are_those_of_the_maths(pack, via, device, dtype):
    lengths, padding, width = PACKS[pack]
    assert_agrees(
        call(gated_add, rows_of(lengths, padding, device), via=via),
        call(gated_add_reference, rows_of(lengths, padding)),
        inputs(lengths, padding, width),
        device,
        dtype,
    )


def test_gradients_of_the_reference_are_the_slopes_of_its_output():
    tensors = [x.requires_grad_() for x in inputs((2, 0, 3), 1, 4)]
    assert torch.autograd.gradcheck(call(gated_add_reference, rows_of((2, 0, 3), 1)), tensors)


@pytest.mark.parametrize("via", ["torch", "triton"])
def test_padding_passes_and_its_branch_has_no_part(via):
    rows = rows_of((40, 9), 11, TRITON_DEVICE)
    tensors = [x.float().to(TRITON_DEVICE) for x in inputs((40, 9), 11, 24)]
    tensors[1][49:] = float("nan")
    (y,), (dx, dbranch, dgate) = outputs_and_gradients(call(gated_add, rows, via=via), tensors)
    assert torch.equal(y[49:], tensors[0][49:]) and not dbranch[49:].any() and bool(dgate.isfinite().all())
    assert bool(dx[49:].any())


@pytest.mark.parametrize("via", ["torch", "triton"])
def test_gradients_repeat_bit_by_bit_and_only_the_branch_is_kept(via):
    rows = rows_of((300, 200), 12, TRITON_DEVICE)
    tensors = [x.float().to(TRITON_DEVICE) for x in inputs((300, 200), 12, 16)]
    first, second = (outputs_and_gradients(call(gated_add, rows, via=via), tensors)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    branch, gate = 512 * 16 * 4, 2 * 16 * 4
    assert sum(bytes_kept(call(gated_add, rows, via=via), tensors).values()) == branch + gate


@pytest.mark.parametrize("via", ["torch", "triton"])
def test_it_compiles_as_one_graph(via):
    rows = rows_of((40, 9), 3, TRITON_DEVICE)
    tensors = [x.float().to(TRITON_DEVICE) for x in inputs((40, 9), 3, 24)]
    plain = call(gated_add, rows, via=via)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, tensors), outputs_and_gradients(plain, tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_operators_are_registered_as_torch_wants_them():
    rows = rows_of((4, 0, 5), 3, TRITON_DEVICE)
    x, branch, gate = (x.float().to(TRITON_DEVICE) for x in inputs((4, 0, 5), 3, 24))
    torch.library.opcheck(forward_triton, (x, branch, gate, rows.start_Q, rows.row_Q))
    torch.library.opcheck(backward_triton, (x, branch, gate, rows.start_Q, rows.row_Q, rows.first_run_R))


def test_input_that_does_not_fit_is_refused():
    x, gate, rows = torch.zeros(5, 4), torch.zeros(2, 4), rows_of((2, 3), 0)
    with pytest.raises(ValueError, match=r"branch \(4, 4\) must have the shape of x \(5, 4\)"):
        gated_add(x, x[:4], gate, rows)
    with pytest.raises(ValueError, match=r"gate \(2, 3\) must be \[R, D\] = \(2, 4\)"):
        gated_add(x, x, gate[:, :3], rows)
    with pytest.raises(ValueError, match="x on cpu, branch on meta"):
        gated_add(x, x.to("meta"), gate, rows)

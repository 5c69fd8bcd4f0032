"""Residual, norm and modulation in one pass: against the plain maths, and against the two operations one by one."""

import agreement
import pytest
import torch
from agreement import TRITON_DEVICE, assert_agrees, bytes_kept, every_way, normal, outputs_and_gradients, rows_of

from megasora.kernels.adaln_modulate import adaln_modulate
from megasora.kernels.gated_add import gated_add
from megasora.kernels.gated_residual_adaln import (
    backward_triton,
    forward_triton,
    gated_residual_adaln,
    gated_residual_adaln_reference,
)

EPS = 1e-6
PACKS = {  # lengths of rows, tokens of padding, width
    **agreement.PACKS,
    "width 5120": ((2, 1), 1, 5120),
}
VECTORS = {"gate and modulation": "gts", "gate and affine": "gwb", "modulation": "ts", "none": "", "all": "gtswb"}


def inputs(lengths, padding, width, vectors="gts"):
    """x, branch, and of gate, shift, scale, weight, bias those in `vectors`."""
    tokens, rows = (sum(lengths) + padding, width), (len(lengths), width)
    shapes = {"g": rows, "t": rows, "s": rows, "w": (width,), "b": (width,)}
    of_vectors = [normal(*shapes[name], seed=2 + i) for i, name in enumerate(vectors)]
    return [normal(*tokens), normal(*tokens, seed=1), *of_vectors]


def call(function, rows, vectors="gts", norm="layer", **options):
    def of(x, branch, *given):
        g, t, s, w, b = (dict(zip(vectors, given, strict=True)).get(name) for name in "gtswb")
        return function(x, branch, g, t, s, rows, EPS, w, b, norm, **options)

    return of


@every_way
@pytest.mark.parametrize("pack", PACKS)
def test_outputs_and_gradients_are_those_of_the_maths(pack, via, device, dtype):
    lengths, padding, width = PACKS[pack]
    assert_agrees(
        call(gated_residual_adaln, rows_of(lengths, padding, device), via=via),
        call(gated_residual_adaln_reference, rows_of(lengths, padding)),
        inputs(lengths, padding, width),
        device,
        dtype,
    )


@every_way
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("vectors", VECTORS.values(), ids=VECTORS)
def test_every_norm_with_every_choice_of_vectors(vectors, norm, via, device, dtype):
    lengths, padding, width = (40, 0, 9), 5, 48
    assert_agrees(
        call(gated_residual_adaln, rows_of(lengths, padding, device), vectors, norm, via=via),
        call(gated_residual_adaln_reference, rows_of(lengths, padding), vectors, norm),
        inputs(lengths, padding, width, vectors),
        device,
        dtype,
    )


def test_gradients_of_the_reference_are_the_slopes_of_its_outputs():
    tensors = [x.requires_grad_() for x in inputs((2, 0, 3), 1, 4, "gtswb")]
    assert torch.autograd.gradcheck(call(gated_residual_adaln_reference, rows_of((2, 0, 3), 1), "gtswb"), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_the_two_operations_bit_by_bit(dtype):
    rows = rows_of((40, 0, 9), 5)
    x, branch, gate, shift, scale = (x.to(dtype) for x in inputs((40, 0, 9), 5, 48))
    y, z = gated_residual_adaln(x, branch, gate, shift, scale, rows, EPS)
    assert torch.equal(y, gated_add(x, branch, gate, rows))
    assert torch.equal(z, adaln_modulate(y, shift, scale, rows, EPS))


@pytest.mark.parametrize("via", ["torch", "triton"])
def test_gradients_repeat_bit_by_bit_and_only_y_and_the_branch_are_kept(via):
    rows = rows_of((300, 200), 12, TRITON_DEVICE)
    tensors = [x.float().to(TRITON_DEVICE) for x in inputs((300, 200), 12, 16)]
    function = call(gated_residual_adaln, rows, via=via)
    first, second = (outputs_and_gradients(function, tensors)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    y_and_branch, vectors, statistics = 2 * 512 * 16 * 4, 3 * 2 * 16 * 4, 2 * 500 * 4
    assert sum(bytes_kept(function, tensors).values()) == y_and_branch + vectors + statistics
    ungated = call(gated_residual_adaln, rows, "ts", via=via)
    kept = bytes_kept(ungated, [*tensors[:2], *tensors[3:]])
    assert sum(kept.values()) == y_and_branch // 2 + vectors * 2 // 3 + statistics


@pytest.mark.parametrize("via", ["torch", "triton"])
def test_what_stands_at_padding_has_no_part(via):
    rows = rows_of((40, 9), 11, TRITON_DEVICE)
    tensors = [x.float().to(TRITON_DEVICE) for x in inputs((40, 9), 11, 24)]
    tensors[1][49:] = float("nan")
    (y, z), (_, dbranch, *vectors) = outputs_and_gradients(call(gated_residual_adaln, rows, via=via), tensors)
    assert torch.equal(y[49:], tensors[0][49:]) and not z[49:].any() and not dbranch[49:].any()
    assert all(bool(x.isfinite().all()) for x in vectors)


@pytest.mark.parametrize("via", ["torch", "triton"])
def test_it_compiles_as_one_graph(via):
    rows = rows_of((40, 9), 3, TRITON_DEVICE)
    tensors = [x.float().to(TRITON_DEVICE) for x in inputs((40, 9), 3, 24, "gtswb")]
    plain = call(gated_residual_adaln, rows, "gtswb", via=via)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, tensors), outputs_and_gradients(plain, tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_operators_are_registered_as_torch_wants_them():
    rows = rows_of((4, 0, 5), 3, TRITON_DEVICE)
    x, branch, gate, *vectors = (x.float().to(TRITON_DEVICE) for x in inputs((4, 0, 5), 3, 24, "gtswb"))
    of_rows = rows.start_Q, rows.row_Q
    given = x, branch, gate, *vectors, *of_rows, rows.num_rows, rows.num_real, EPS, "layer"
    torch.library.opcheck(forward_triton, given)
    y, _, kept = forward_triton(*given)
    torch.library.opcheck(
        backward_triton, (x, x, y, branch, gate, vectors[1], vectors[2], kept, *of_rows, rows.first_run_R)
    )
    torch.library.opcheck(backward_triton, (x, x, y, None, None, None, None, kept, *of_rows, rows.first_run_R))


def test_input_that_does_not_fit_is_refused():
    x, vectors, rows = torch.zeros(5, 4), torch.zeros(2, 4), rows_of((2, 3), 0)
    with pytest.raises(ValueError, match=r"branch \(4, 4\) must have the shape of x \(5, 4\)"):
        gated_residual_adaln(x, x[:4], vectors, vectors, vectors, rows, EPS)
    with pytest.raises(ValueError, match=r"gate \(1, 4\) must be \[R, D\] = \(2, 4\)"):
        gated_residual_adaln(x, x, vectors[:1], vectors, vectors, rows, EPS)
    with pytest.raises(ValueError, match="give both or neither"):
        gated_residual_adaln(x, x, vectors, None, vectors, rows, EPS)

"""Norm and modulation by rows: against the plain maths in float64, and what is kept for the backward pass."""

import agreement
import pytest
import torch
from agreement import TRITON_DEVICE, assert_agrees, bytes_kept, every_way, normal, outputs_and_gradients, rows_of

from megasora.kernels.adaln_modulate import adaln_modulate, adaln_modulate_reference, backward_triton, forward_triton

EPS = 1e-6
MANY = 5000 if torch.cuda.is_available() else 100  # the interpreter takes a hundredth of a second a row
PACKS = {  # lengths of rows, tokens of padding, width
    **agreement.PACKS,
    "many rows": ((1,) * MANY, 3, 6),
    "width 1152": ((3, 2), 1, 1152),
    "width 3072": ((1, 2), 1, 3072),
    "width 5120": ((2, 1), 0, 5120),
}
VECTORS = {"modulated": "ts", "affine": "wb", "plain": "", "both": "tswb", "weight only": "w"}


def inputs(lengths, padding, width, vectors="ts"):
    """x, and of shift, scale, weight, bias those in `vectors`."""
    shapes = {"t": (len(lengths), width), "s": (len(lengths), width), "w": (width,), "b": (width,)}
    x = normal(sum(lengths) + padding, width) + 0.5
    return [x, *(normal(*shapes[name], seed=1 + i) for i, name in enumerate(vectors))]


def call(function, rows, vectors="ts", norm="layer", **options):
    """A function of the tensors of `inputs` alone."""

    def of(x, *given):
        t, s, w, b = (dict(zip(vectors, given, strict=True)).get(name) for name in "tswb")
        return function(x, t, s, rows, EPS, w, b, norm, **options)

    return of


@every_way
@pytest.mark.parametrize("pack", PACKS)
def test_output_and_gradients_are_those_of_the_maths(pack, via, device, dtype):
    lengths, padding, width = PACKS[pack]
    assert_agrees(
        call(adaln_modulate, rows_of(lengths, padding, device), via=via),
        call(adaln_modulate_reference, rows_of(lengths, padding)),
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
        call(adaln_modulate, rows_of(lengths, padding, device), vectors, norm, via=via),
        call(adaln_modulate_reference, rows_of(lengths, padding), vectors, norm),
        inputs(lengths, padding, width, vectors),
        device,
        dtype,
    )


def test_gradients_of_the_reference_are_the_slopes_of_its_output():
    tensors = [x.requires_grad_() for x in inputs((2, 0, 3), 1, 4, "tswb")]
    for norm in ("layer", "rms"):
        assert torch.autograd.gradcheck(call(adaln_modulate_reference, rows_of((2, 0, 3), 1), "tswb", norm), tensors)


@pytest.mark.parametrize("via", ["torch", "triton"])
def test_what_stands_at_padding_has_no_part(via):
    rows = rows_of((40, 9), 11, TRITON_DEVICE)
    tensors = [x.float().to(TRITON_DEVICE) for x in inputs((40, 9), 11, 24)]
    clean = outputs_and_gradients(call(adaln_modulate, rows, via=via), tensors)
    tensors[0][49:] = float("nan")
    dirty = outputs_and_gradients(call(adaln_modulate, rows, via=via), tensors)
    assert all(
        torch.equal(a, b) for ours, theirs in zip(clean, dirty, strict=True) for a, b in zip(ours, theirs, strict=True)
    )
    assert not dirty[0][0][49:].any() and not dirty[1][0][49:].any()


@pytest.mark.parametrize("via", ["torch", "triton"])
def test_gradients_repeat_bit_by_bit(via):
    rows = rows_of((300, 200), 12, TRITON_DEVICE)
    tensors = [x.float().to(TRITON_DEVICE) for x in inputs((300, 200), 12, 16)]
    first, second = (outputs_and_gradients(call(adaln_modulate, rows, via=via), tensors)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_way
def test_views_need_not_be_contiguous(via, device, dtype):
    """Tokens cut from wider ones, and vectors that lie between others, as a projection to all six gives them."""

    def of(function, rows, **options):
        def views(wide, vectors):
            return function(wide[:, 4:28], *vectors.unbind(1)[1:3], rows, EPS, **options)

        return views

    assert_agrees(
        of(adaln_modulate, rows_of((40, 9), 3, device), via=via),
        of(adaln_modulate_reference, rows_of((40, 9), 3)),
        [normal(52, 32), normal(2, 6, 24)],
        device,
        dtype,
    )
    assert_agrees(
        lambda x: adaln_modulate(x.T, None, None, rows_of((7,), 0, device), EPS, via=via),
        lambda x: adaln_modulate_reference(x.T, None, None, rows_of((7,), 0), EPS),
        [normal(16, 7)],
        device,
        dtype,
    )


@pytest.mark.parametrize("via", ["torch", "triton"])
def test_only_x_and_two_numbers_a_token_are_kept(via):
    tensors = [x.float().to(TRITON_DEVICE) for x in inputs((60, 40), 0, 32)]
    kept = bytes_kept(call(adaln_modulate, rows_of((60, 40), 0, TRITON_DEVICE), via=via), tensors)
    x, vectors, statistics = 100 * 32 * 4, 2 * 2 * 32 * 4, 2 * 100 * 4
    assert sum(kept.values()) == x + vectors + statistics


@pytest.mark.parametrize("via", ["torch", "triton"])
def test_it_compiles_as_one_graph(via):
    rows = rows_of((40, 9), 3, TRITON_DEVICE)
    tensors = [x.float().to(TRITON_DEVICE) for x in inputs((40, 9), 3, 24, "tswb")]
    plain = call(adaln_modulate, rows, "tswb", via=via)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, tensors), outputs_and_gradients(plain, tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_operators_are_registered_as_torch_wants_them():
    rows = rows_of((4, 0, 5), 3, TRITON_DEVICE)
    x, *vectors = (x.float().to(TRITON_DEVICE) for x in inputs((4, 0, 5), 3, 24, "tswb"))
    given = x, *vectors, rows.start_Q, rows.row_Q, rows.num_rows, rows.num_real, EPS, "layer"
    torch.library.opcheck(forward_triton, given)
    kept = forward_triton(*given)[1]
    torch.library.opcheck(backward_triton, (x, x, vectors[1], None, kept, rows.start_Q, rows.row_Q, rows.first_run_R))


@pytest.mark.parametrize("via", ["torch", "triton"])
def test_meta_tensors_pass_through(via):
    rows = rows_of((40, 9), 3, "meta")
    x, shift, scale = (x.to("meta", torch.bfloat16).requires_grad_() for x in inputs((40, 9), 3, 24))
    y = adaln_modulate(x, shift, scale, rows, EPS, via=via)
    y.sum().backward()
    assert (y.shape, y.dtype) == (x.shape, x.dtype) and scale.grad.shape == scale.shape


def test_input_that_does_not_fit_is_refused():
    x, vectors, rows = torch.zeros(5, 4), torch.zeros(2, 4), rows_of((2, 3), 0)
    with pytest.raises(ValueError, match=r"x \(4, 4\) must be \[L, D\], of the 5 tokens"):
        adaln_modulate(x[:4], vectors, vectors, rows, EPS)
    with pytest.raises(ValueError, match=r"scale \(1, 4\) must be \[R, D\] = \(2, 4\)"):
        adaln_modulate(x, vectors, vectors[:1], rows, EPS)
    with pytest.raises(ValueError, match=r"scale \(2, 4\) of torch.int64 must be of floating point"):
        adaln_modulate(x, vectors, vectors.long(), rows, EPS)
    with pytest.raises(ValueError, match="give both or neither"):
        adaln_modulate(x, vectors, None, rows, EPS)
    with pytest.raises(ValueError, match=r"bias \(3,\) must be \[D\], as x is \(5, 4\)"):
        adaln_modulate(x, None, None, rows, EPS, bias_D=torch.zeros(3))
    with pytest.raises(ValueError, match="norm='batch' must be one of layer, rms"):
        adaln_modulate(x, None, None, rows, EPS, norm="batch")
    with pytest.raises(ValueError, match="via='cuda' must be one of auto, triton, torch"):
        adaln_modulate(x, None, None, rows, EPS, via="cuda")
    with pytest.raises(ValueError, match="x on cpu, shift on meta"):
        adaln_modulate(x, vectors.to("meta"), vectors, rows, EPS)
    with pytest.raises(ValueError, match="takes no float64"):
        adaln_modulate(x.double(), vectors, vectors, rows, EPS, via="triton")

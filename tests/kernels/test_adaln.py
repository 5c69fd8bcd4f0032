"""adaLN, alone and after a gated branch: agreement with the reference in float64, and what it saves for backward."""

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

from megasora.kernels import adaln
from megasora.kernels.adaln import adaln_modulate, adaln_modulate_reference, gated_residual_adaln
from megasora.kernels.adaln_triton import backward_triton, forward_triton
from megasora.kernels.gated_add import gated_add

EPS = 1e-6
MANY_ROWS = 5000 if torch.cuda.is_available() else 100  # the interpreter takes a hundredth of a second per row
PACKS = {  # lengths of rows, tokens of padding, width
    **agreement.PACKS,
    "many rows": ((1,) * MANY_ROWS, 3, 6),
    "width 1152": ((3, 2), 1, 1152),
    "width 3072": ((1, 2), 1, 3072),
    "width 5120": ((2, 1), 1, 5120),
}
ARGUMENTS = {  # tensors besides x, in this order: branch, gate, shift, scale, weight, bias
    "modulated": ("shift", "scale"),
    "affine": ("weight", "bias"),
    "norm only": (),
    "modulated and affine": ("shift", "scale", "weight", "bias"),
    "weight only": ("weight",),
    "gated branch, modulated": ("branch", "gate", "shift", "scale"),
    "gated branch, affine": ("branch", "gate", "weight", "bias"),
    "branch, modulated": ("branch", "shift", "scale"),
    "branch, norm only": ("branch",),
    "all": ("branch", "gate", "shift", "scale", "weight", "bias"),
}
BOTH = "modulated", "gated branch, modulated"  # one of each operation
each_operation = pytest.mark.parametrize("names", [ARGUMENTS[name] for name in BOTH], ids=BOTH)


def inputs(lengths, padding, width, names):
    """x, and the tensors of `names`."""
    tokens, rows = (sum(lengths) + padding, width), (len(lengths), width)
    shapes = {"branch": tokens, "gate": rows, "shift": rows, "scale": rows, "weight": (width,), "bias": (width,)}
    return [normal(*tokens) + 0.5, *(normal(*shapes[name], seed=1 + i) for i, name in enumerate(names))]


def operation(names, rows, norm="layer", suffix="", **options):
    """A function of the tensors of `inputs`: the operation that takes `names`, or its reference."""
    function = getattr(adaln, ("gated_residual_adaln" if "branch" in names else "adaln_modulate") + suffix)

    def apply(x, *tensors):
        named = dict.fromkeys(ARGUMENTS["all"]) | dict(zip(names, tensors, strict=True))
        branch = (named["branch"], named["gate"]) if "branch" in names else ()
        vectors = named["shift"], named["scale"]
        return function(x, *branch, *vectors, rows, EPS, named["weight"], named["bias"], norm, **options)

    return apply


def reference(names, rows, norm="layer"):
    return operation(names, rows, norm, "_reference")


@each_variant
@each_operation
@pytest.mark.parametrize("pack", PACKS)
def test_outputs_and_gradients_equal_the_reference(pack, names, backend, device, dtype):
    lengths, padding, width = PACKS[pack]
    assert_agrees(
        operation(names, build_rows(lengths, padding, device), backend=backend),
        reference(names, build_rows(lengths, padding)),
        inputs(lengths, padding, width, names),
        device,
        dtype,
    )


@each_variant
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("names", ARGUMENTS.values(), ids=ARGUMENTS)
def test_every_norm_with_every_choice_of_arguments(names, norm, backend, device, dtype):
    lengths, padding, width = (40, 0, 9), 5, 48
    assert_agrees(
        operation(names, build_rows(lengths, padding, device), norm, backend=backend),
        reference(names, build_rows(lengths, padding), norm),
        inputs(lengths, padding, width, names),
        device,
        dtype,
    )


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("name", ["modulated and affine", "all"])
def test_gradients_of_the_reference_equal_finite_differences(name, norm):
    names, rows = ARGUMENTS[name], build_rows((2, 0, 3), 1)
    tensors = [x.requires_grad_() for x in inputs((2, 0, 3), 1, 4, names)]
    assert torch.autograd.gradcheck(reference(names, rows, norm), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_operation_equals_the_two_operations_bit_by_bit(dtype):
    rows, names = build_rows((40, 0, 9), 5), ARGUMENTS["gated branch, modulated"]
    x, branch, gate, shift, scale = (x.to(dtype) for x in inputs((40, 0, 9), 5, 48, names))
    y, z = gated_residual_adaln(x, branch, gate, shift, scale, rows, EPS)
    assert torch.equal(y, gated_add(x, branch, gate, rows))
    assert torch.equal(z, adaln_modulate(y, shift, scale, rows, EPS))


@each_backend
def test_values_of_x_at_padding_have_no_effect(backend):
    rows = build_rows((40, 9), 11, TRITON_DEVICE)
    tensors = for_triton(inputs((40, 9), 11, 24, ARGUMENTS["modulated"]))
    expected = outputs_and_gradients(operation(ARGUMENTS["modulated"], rows, backend=backend), tensors)
    tensors[0][49:] = float("nan")
    actual = outputs_and_gradients(operation(ARGUMENTS["modulated"], rows, backend=backend), tensors)
    assert all(torch.equal(a, b) for pair in zip(actual, expected, strict=True) for a, b in zip(*pair, strict=True))
    assert not actual[0][0][49:].any() and not actual[1][0][49:].any()


@each_backend
def test_values_of_the_branch_at_padding_have_no_effect(backend):
    rows, names = build_rows((40, 9), 11, TRITON_DEVICE), ARGUMENTS["gated branch, modulated"]
    tensors = for_triton(inputs((40, 9), 11, 24, names))
    tensors[1][49:] = float("nan")
    (y, z), (_, dbranch, *dvectors) = outputs_and_gradients(operation(names, rows, backend=backend), tensors)
    assert torch.equal(y[49:], tensors[0][49:]) and not z[49:].any() and not dbranch[49:].any()
    assert all(bool(x.isfinite().all()) for x in dvectors)


@each_backend
@each_operation
def test_gradients_repeat_bit_by_bit(names, backend):
    rows = build_rows((300, 200), 12, TRITON_DEVICE)
    tensors = for_triton(inputs((300, 200), 12, 16, names))
    assert_gradients_repeat(operation(names, rows, backend=backend), tensors)


@each_variant
def test_inputs_need_not_be_contiguous(backend, device, dtype):
    """Tokens that are slices of wider ones, and vectors that are slices of a projection to all six."""

    def of_slices(function, rows, **options):
        return lambda wide, vectors: function(wide[:, 4:28], *vectors.unbind(1)[1:3], rows, EPS, **options)

    assert_agrees(
        of_slices(adaln_modulate, build_rows((40, 9), 3, device), backend=backend),
        of_slices(adaln_modulate_reference, build_rows((40, 9), 3)),
        [normal(52, 32), normal(2, 6, 24)],
        device,
        dtype,
    )
    assert_agrees(
        lambda x: adaln_modulate(x.T, None, None, build_rows((7,), 0, device), EPS, backend=backend),
        lambda x: adaln_modulate_reference(x.T, None, None, build_rows((7,), 0), EPS),
        [normal(16, 7)],
        device,
        dtype,
    )


@each_backend
@pytest.mark.parametrize(
    ("name", "num_activations", "num_vectors"),
    [("modulated", 1, 2), ("gated branch, modulated", 2, 3), ("branch, modulated", 1, 2)],
)
def test_only_y_the_gated_branch_and_two_statistics_per_token_are_saved(name, num_activations, num_vectors, backend):
    names, tokens, width = ARGUMENTS[name], 100, 32
    tensors = for_triton(inputs((60, 40), 0, width, names))
    activations, vectors, stats = num_activations * tokens * width, num_vectors * 2 * width, 2 * tokens
    nbytes = saved_bytes(operation(names, build_rows((60, 40), 0, TRITON_DEVICE), backend=backend), tensors)
    assert nbytes == 4 * (activations + vectors + stats)


@each_backend
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", ["modulated and affine", "branch, norm only", "all"])
def test_it_compiles_as_one_graph(name, padding, backend):
    names, rows = ARGUMENTS[name], build_rows((40, 9), padding, TRITON_DEVICE)
    tensors = for_triton(inputs((40, 9), padding, 24, names))
    assert_compiles_as_one_graph(operation(names, rows, backend=backend), tensors)


@pytest.mark.parametrize("has_branch", [False, True])
def test_operators_pass_opcheck(has_branch):
    rows = build_rows((4, 0, 5), 3, TRITON_DEVICE)
    x, branch, gate, shift, scale, *affine = for_triton(inputs((4, 0, 5), 3, 24, ARGUMENTS["all"]))
    branch, gate = (branch, gate) if has_branch else (None, None)
    index = rows.tile_start_Q, rows.tile_row_Q
    arguments = (
        x,
        branch,
        gate,
        shift,
        scale,
        *affine,
        *index,
        rows.first_tile_P,
        rows.num_rows,
        rows.num_real,
        EPS,
        "layer",
    )
    torch.library.opcheck(forward_triton, arguments)
    stats, grad_y = forward_triton(*arguments)[1], x if has_branch else None
    index = *index, rows.first_tile_R, rows.first_tile_P
    torch.library.opcheck(backward_triton, (x, grad_y, x, branch, gate, scale, affine[0], stats, *index))
    torch.library.opcheck(backward_triton, (x, grad_y, x, None, None, None, None, stats, *index))


@each_backend
@each_operation
def test_meta_tensors_give_shapes_and_dtypes(names, backend):
    rows = build_rows((40, 9), 3, "meta")
    tensors = [x.to("meta", torch.bfloat16).requires_grad_() for x in inputs((40, 9), 3, 24, names)]
    outputs = operation(names, rows, backend=backend)(*tensors)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    assert all((y.shape, y.dtype) == (tensors[0].shape, torch.bfloat16) for y in outputs)
    sum(y.sum() for y in outputs).backward()
    assert all(x.grad.shape == x.shape for x in tensors)


def test_invalid_arguments_raise():
    x, vectors, rows = torch.zeros(5, 4), torch.zeros(2, 4), build_rows((2, 3), 0)
    with pytest.raises(ValueError, match=r"x \(4, 4\) must be \[L, D\] with L = 5"):
        adaln_modulate(x[:4], vectors, vectors, rows, EPS)
    with pytest.raises(ValueError, match=r"scale \(1, 4\) must be \[R, D\] = \(2, 4\)"):
        adaln_modulate(x, vectors, vectors[:1], rows, EPS)
    with pytest.raises(ValueError, match=r"scale \(2, 4\) of torch.int64 must be floating point"):
        adaln_modulate(x, vectors, vectors.long(), rows, EPS)
    with pytest.raises(ValueError, match="give both or neither"):
        adaln_modulate(x, vectors, None, rows, EPS)
    with pytest.raises(ValueError, match=r"bias \(3,\) must be \[D\], as x is \(5, 4\)"):
        adaln_modulate(x, None, None, rows, EPS, bias_D=torch.zeros(3))
    with pytest.raises(ValueError, match="norm='batch' must be one of layer, rms"):
        adaln_modulate(x, None, None, rows, EPS, norm="batch")
    with pytest.raises(ValueError, match="backend='cuda' must be one of auto, triton, torch"):
        adaln_modulate(x, None, None, rows, EPS, backend="cuda")
    with pytest.raises(ValueError, match="x on cpu, shift on meta"):
        adaln_modulate(x, vectors.to("meta"), vectors, rows, EPS)
    with pytest.raises(ValueError, match="takes no float64"):
        adaln_modulate(x.double(), vectors, vectors, rows, EPS, backend="triton")
    with pytest.raises(ValueError, match=r"branch \(4, 4\) must have the shape of x \(5, 4\)"):
        gated_residual_adaln(x, x[:4], vectors, vectors, vectors, rows, EPS)
    with pytest.raises(ValueError, match=r"gate \(1, 4\) must be \[R, D\] = \(2, 4\)"):
        gated_residual_adaln(x, x, vectors[:1], vectors, vectors, rows, EPS)
    with pytest.raises(ValueError, match="give both or neither"):
        gated_residual_adaln(x, x, vectors, None, vectors, rows, EPS)

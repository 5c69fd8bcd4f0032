"""QK-norm and 3D RoPE: agreement with the reference in float64, what is saved, and which operators run."""

import pytest
import torch
from agreement import (
    TRITON_DEVICE,
    assert_agrees,
    assert_compiles_as_one_graph,
    assert_gradients_repeat,
    build_rope,
    each_backend,
    each_variant,
    for_triton,
    normal,
    outputs_and_gradients,
    saved_bytes,
)
from guard_zones import guard_zones
from torch.utils._python_dispatch import TorchDispatchMode

from megasora.kernels.qk_norm_rope3d import (
    backward_triton,
    forward_triton,
    operator_arguments,
    qk_norm_rope3d,
    qk_norm_rope3d_reference,
)

EPS = 1e-6
SIZES = {  # L, N, K
    "head dim 64, longer than a tile": (35, 3, 64),
    "head dim 96": (3, 3, 96),
    "head dim 128": (2, 5, 128),
    "heads in five chunks, the last partly filled": (3, 17, 8),
    "one token": (1, 2, 12),
    "no token": (0, 2, 16),
}
each_norm = pytest.mark.parametrize("norm", ["per_head", "across_heads", "none"])


def weights_of(num_heads, head_dim, norm):
    width = {"per_head": head_dim, "across_heads": num_heads * head_dim}.get(norm)
    return [] if width is None else [normal(width, seed=1), normal(width, seed=2)]


def inputs(num_tokens, num_heads, head_dim, norm):
    return [normal(num_tokens, 3, num_heads, head_dim), *weights_of(num_heads, head_dim, norm)]


def bind(function, rope, norm, **options):
    """A function of the tensors of `inputs`."""
    return lambda qkv, *weights: function(qkv, *(weights or (None, None)), rope, EPS, norm, **options)


@each_variant
@each_norm
@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients_equal_the_reference(size, norm, backend, device, dtype):
    num_tokens, _, head_dim = SIZES[size]
    assert_agrees(
        bind(qk_norm_rope3d, build_rope(num_tokens, head_dim, device), norm, backend=backend),
        bind(qk_norm_rope3d_reference, build_rope(num_tokens, head_dim), norm),
        inputs(*SIZES[size], norm),
        device,
        dtype,
    )


@each_variant
@each_norm
def test_without_rope_nothing_is_rotated(norm, backend, device, dtype):
    operation, reference = bind(qk_norm_rope3d, None, norm, backend=backend), bind(qk_norm_rope3d_reference, None, norm)
    assert_agrees(operation, reference, inputs(5, 3, 10, norm), device, dtype)


@each_variant
@each_norm
def test_inputs_need_not_be_contiguous(norm, backend, device, dtype):
    """A slice of [q, k, v, ...]; a slice of heads; heads before q, k, v; every second element."""
    rope, cpu_rope = build_rope(5, 12, device), build_rope(5, 12)
    views = {
        (5, 4, 3, 12): lambda wide: wide[:, 1:],
        (5, 3, 4, 12): lambda wide: wide[:, :, :3],
        (5, 3, 3, 12): lambda wide: wide.transpose(1, 2),
        (5, 3, 3, 24): lambda wide: wide[..., ::2],
    }

    def sliced(view, wide, *weights):
        return view(wide), *(w[:, 1] for w in weights)

    for shape, view in views.items():
        assert_agrees(
            lambda *tensors, view=view: bind(qk_norm_rope3d, rope, norm, backend=backend)(*sliced(view, *tensors)),
            lambda *tensors, view=view: bind(qk_norm_rope3d_reference, cpu_rope, norm)(*sliced(view, *tensors)),
            [normal(*shape), *(torch.stack((w, w), 1) for w in weights_of(3, 12, norm))],
            device,
            dtype,
        )


@each_variant
@pytest.mark.parametrize("norm", ["per_head", "none"])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_a_bias_that_was_added_before_gets_its_gradient_too(size, rotated, norm, backend, device, dtype):
    num_tokens, num_heads, head_dim = SIZES[size]

    def with_bias(qkv, bias, *weights):
        rope = build_rope(num_tokens, head_dim, device) if rotated else None
        return bind(qk_norm_rope3d, rope, norm, backend=backend, bias=bias)(qkv, *weights)

    def reference(qkv, bias, *weights):
        added = (bias - bias.detach()).view(1, 3, num_heads, head_dim)  # zeros
        rope = build_rope(num_tokens, head_dim) if rotated else None
        return bind(qk_norm_rope3d_reference, rope, norm)(qkv + added, *weights)

    qkv, *weights = inputs(*SIZES[size], norm)
    assert_agrees(with_bias, reference, [qkv, normal(3 * num_heads * head_dim, seed=5), *weights], device, dtype)


@each_norm
def test_gradients_of_the_reference_equal_finite_differences(norm):
    tensors = [x.requires_grad_() for x in inputs(2, 2, 6, norm)]
    assert torch.autograd.gradcheck(bind(qk_norm_rope3d_reference, build_rope(2, 6), norm), tensors)


@each_variant
@each_norm
@pytest.mark.parametrize("used", ["q", "v", "qk"])
def test_outputs_that_are_not_used_contribute_no_gradient(used, norm, backend, device, dtype):
    def used_outputs(function, rope, **options):
        operation = bind(function, rope, norm, **options)
        return lambda *tensors: [x for name, x in zip("qkv", operation(*tensors), strict=True) if name in used]

    def with_inputs(operation):  # so that every tensor has a gradient
        return lambda *tensors: [*operation(*tensors), *(x * 2 for x in tensors)]

    assert_agrees(
        with_inputs(used_outputs(qk_norm_rope3d, build_rope(4, 12, device), backend=backend)),
        with_inputs(used_outputs(qk_norm_rope3d_reference, build_rope(4, 12))),
        inputs(4, 2, 12, norm),
        device,
        dtype,
    )


@each_backend
@each_norm
def test_v_is_a_view(norm, backend):
    qkv, *weights = for_triton(inputs(5, 2, 12, norm))
    *_, v = bind(qk_norm_rope3d, build_rope(5, 12, TRITON_DEVICE), norm, backend=backend)(qkv, *weights)
    assert v.data_ptr() == qkv[:, 2].data_ptr() and v.stride() == qkv[:, 2].stride()


class Calls(TorchDispatchMode):
    """Records the names of the operators that run, without views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view:
            self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


@each_norm
def test_one_operator_writes_the_gradients_of_q_k_and_v(norm):
    qkv, *weights = (x.requires_grad_() for x in for_triton(inputs(5, 2, 12, norm)))
    outputs = bind(qk_norm_rope3d, build_rope(5, 12, TRITON_DEVICE), norm, backend="triton")(qkv, *weights)
    grads = [torch.ones_like(x) for x in outputs]
    with Calls() as calls:
        torch.autograd.grad(outputs, [qkv, *weights], grads)
    assert [name for name in calls.names if name != "aten::detach"] == ["megasora::qk_norm_rope3d_backward"]


@each_backend
@each_norm
def test_only_qkv_and_weights_are_saved_and_nothing_without_a_norm(norm, backend):
    tensors = for_triton(inputs(40, 2, 16, norm))
    operation = bind(qk_norm_rope3d, build_rope(40, 16, TRITON_DEVICE), norm, backend=backend)
    assert saved_bytes(operation, tensors) == (0 if norm == "none" else sum(x.nbytes for x in tensors))


@each_backend
@each_norm
def test_gradients_repeat_bit_by_bit(norm, backend):
    operation = bind(qk_norm_rope3d, build_rope(40, 12, TRITON_DEVICE), norm, backend=backend)
    assert_gradients_repeat(operation, for_triton(inputs(40, 2, 12, norm)))


@each_backend
@each_norm
def test_tokens_do_not_depend_on_each_other(norm, backend):
    """The value of a token, such as padding, changes no other; a zero vector gives zeros."""
    operation = bind(qk_norm_rope3d, build_rope(9, 12, TRITON_DEVICE), norm, backend=backend)
    tensors = for_triton(inputs(9, 2, 12, norm))
    before, gradients = outputs_and_gradients(operation, tensors)
    tensors[0][7], tensors[0][8] = 0, 1e4
    after, changed = outputs_and_gradients(operation, tensors)
    for a, b in zip([*before, gradients[0]], [*after, changed[0]], strict=True):
        assert torch.equal(a[:7], b[:7]) and b.isfinite().all()
    assert not any(x[7].any() for x in after)


@each_norm
@pytest.mark.parametrize("size", SIZES)
def test_kernels_write_all_of_their_outputs_and_nothing_else(size, norm):
    num_tokens, num_heads, head_dim = SIZES[size]
    qkv, *weights = for_triton(inputs(*SIZES[size], norm))
    rest = *(weights or [None, None]), *operator_arguments(build_rope(num_tokens, head_dim, TRITON_DEVICE)), EPS, norm
    grads = for_triton([normal(num_tokens, num_heads, head_dim)] * 3)
    with guard_zones():
        forward_triton(qkv, *rest)
        backward_triton(*grads, None if norm == "none" else qkv, *rest, norm != "across_heads")


@each_backend
@pytest.mark.parametrize("norm", ["per_head", "none"])
def test_it_compiles_as_one_graph(norm, backend):
    rope = build_rope(9, 12, TRITON_DEVICE)

    def operation(qkv, *weights):
        q, k, v = bind(qk_norm_rope3d, rope, norm, backend=backend)(qkv * 2, *weights)
        return q.sin() * k, v

    assert_compiles_as_one_graph(operation, for_triton(inputs(9, 2, 12, norm)))


@each_norm
def test_operators_pass_opcheck(norm):
    parts = operator_arguments(build_rope(5, 12, TRITON_DEVICE))
    qkv, *weights = for_triton(inputs(5, 2, 12, norm))
    weights = weights or [None, None]
    torch.library.opcheck(forward_triton, (qkv, *weights, *parts, EPS, norm))
    grads = for_triton(normal(3, 5, 2, 12)[[0, 2, 1]])
    arguments = *grads, None if norm == "none" else qkv, *weights, *parts, EPS, norm, norm != "across_heads"
    torch.library.opcheck(backward_triton, arguments)


@each_backend
@each_norm
def test_meta_tensors_give_shapes_and_dtypes(norm, backend):
    tensors = [x.to("meta", torch.bfloat16).requires_grad_() for x in inputs(9, 2, 12, norm)]
    outputs = bind(qk_norm_rope3d, build_rope(9, 12, "meta"), norm, backend=backend)(*tensors)
    assert all(x.shape == (9, 2, 12) and x.dtype == torch.bfloat16 for x in outputs)
    sum(x.sum() for x in outputs).backward()
    assert all(x.grad.shape == x.shape and x.grad.dtype == x.dtype for x in tensors)


def test_invalid_arguments_raise():
    qkv, weight, rope = torch.zeros(5, 3, 2, 12), torch.zeros(12), build_rope(5, 12)
    with pytest.raises(ValueError, match="norm='layer' must be one of per_head, across_heads, none"):
        qk_norm_rope3d(qkv, weight, weight, rope, EPS, "layer")
    with pytest.raises(ValueError, match=r"qkv \(5, 2, 2, 12\) of torch.float32 must be floating point \[L, 3, N, K\]"):
        qk_norm_rope3d(qkv[:, :2], weight, weight, rope, EPS)
    with pytest.raises(ValueError, match=r"qkv \(5, 3, 2, 12\) of torch.int64 must be"):
        qk_norm_rope3d(qkv.long(), weight, weight, rope, EPS)
    with pytest.raises(
        ValueError, match=r"q_weight \(12,\) must be \(24,\) for norm='across_heads', as qkv is \(5, 3, 2, 12\)"
    ):
        qk_norm_rope3d(qkv, weight, weight, rope, EPS, "across_heads")
    with pytest.raises(ValueError, match=r"k_weight None must be \(12,\) for norm='per_head'"):
        qk_norm_rope3d(qkv, weight, None, rope, EPS)
    with pytest.raises(ValueError, match=r"q_weight \(12,\) must be None for norm='none'"):
        qk_norm_rope3d(qkv, weight, weight, rope, EPS, "none")
    with pytest.raises(ValueError, match=r"qkv \(4, 3, 2, 12\) must have the 5 tokens of coords \(5, 3\)"):
        qk_norm_rope3d(qkv[:4], weight, weight, rope, EPS)
    with pytest.raises(ValueError, match="qkv on cpu, q_weight on meta"):
        qk_norm_rope3d(qkv, weight.to("meta"), weight, rope, EPS)
    with pytest.raises(ValueError, match="takes no float64"):
        qk_norm_rope3d(qkv.double(), weight, weight, rope, EPS, backend="triton")

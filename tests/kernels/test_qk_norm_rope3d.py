"""q and k normed and turned, v as it is: against the plain maths in float64, and what is kept and computed for it."""

import pytest
import torch
import torch._dynamo
from agreement import TRITON_DEVICE, assert_agrees, bytes_kept, every_way, normal, outputs_and_gradients
from guarded import walls
from torch.utils._python_dispatch import TorchDispatchMode

from megasora.kernels.qk_norm_rope3d import (
    backward_triton,
    forward_triton,
    parts_of,
    qk_norm_rope3d,
    qk_norm_rope3d_reference,
)
from megasora.kernels.rope3d import Rope

EPS = 1e-6
BASE = 10_000.0
SIZES = {  # L, N, K
    "head dim 64, longer than a run": (35, 3, 64),
    "head dim 96": (3, 3, 96),
    "head dim 128": (2, 5, 128),
    "heads in five chunks, the last not full": (3, 17, 8),
    "one token": (1, 2, 12),
    "no token": (0, 2, 16),
}
each_via = pytest.mark.parametrize("via", ["torch", "triton"])
each_norm = pytest.mark.parametrize("norm", ["per_head", "across_heads", "none"])


def rope_of(num_tokens, head_dim, device="cpu"):
    coords = torch.randint(0, 40, (num_tokens, 3), generator=torch.Generator().manual_seed(0))
    return Rope.build(coords, head_dim, BASE, device=device)


def weights_of(num_heads, head_dim, norm):
    width = {"per_head": head_dim, "across_heads": num_heads * head_dim}.get(norm)
    return [] if width is None else [normal(width, seed=1), normal(width, seed=2)]


def inputs(num_tokens, num_heads, head_dim, norm):
    return [normal(num_tokens, 3, num_heads, head_dim), *weights_of(num_heads, head_dim, norm)]


def on_device(tensors):
    return [x.float().to(TRITON_DEVICE) for x in tensors]


def call(function, rope, norm, **options):
    """A function of the tensors of `inputs` alone."""
    return lambda qkv, *weights: function(qkv, *(weights or (None, None)), rope, EPS, norm, **options)


@every_way
@each_norm
@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients_are_those_of_the_maths(size, norm, via, device, dtype):
    num_tokens, _, head_dim = SIZES[size]
    assert_agrees(
        call(qk_norm_rope3d, rope_of(num_tokens, head_dim, device), norm, via=via),
        call(qk_norm_rope3d_reference, rope_of(num_tokens, head_dim), norm),
        inputs(*SIZES[size], norm),
        device,
        dtype,
    )


@every_way
@each_norm
def test_without_angles_nothing_turns(norm, via, device, dtype):
    ours, theirs = call(qk_norm_rope3d, None, norm, via=via), call(qk_norm_rope3d_reference, None, norm)
    assert_agrees(ours, theirs, inputs(5, 3, 10, norm), device, dtype)


@every_way
@each_norm
def test_views_need_not_be_contiguous(norm, via, device, dtype):
    """Tokens and parts that lie apart; heads before parts; every second number."""
    ours, theirs = rope_of(5, 12, device), rope_of(5, 12)
    views = {
        (5, 4, 3, 12): lambda wide: wide[:, 1:],
        (5, 3, 4, 12): lambda wide: wide[:, :, :3],
        (5, 3, 3, 12): lambda wide: wide.transpose(1, 2),
        (5, 3, 3, 24): lambda wide: wide[..., ::2],
    }

    def cut(view, wide, *weights):
        return view(wide), *(w[:, 1] for w in weights)

    for shape, view in views.items():
        assert_agrees(
            lambda *given, view=view: call(qk_norm_rope3d, ours, norm, via=via)(*cut(view, *given)),
            lambda *given, view=view: call(qk_norm_rope3d_reference, theirs, norm)(*cut(view, *given)),
            [normal(*shape), *(torch.stack((w, w), 1) for w in weights_of(3, 12, norm))],
            device,
            dtype,
        )


@each_norm
def test_gradients_of_the_reference_are_the_slopes_of_its_outputs(norm):
    tensors = [x.requires_grad_() for x in inputs(2, 2, 6, norm)]
    assert torch.autograd.gradcheck(call(qk_norm_rope3d_reference, rope_of(2, 6), norm), tensors)


@every_way
@each_norm
@pytest.mark.parametrize("used", ["q", "v", "qk"])
def test_what_is_not_used_gets_no_gradient(used, norm, via, device, dtype):
    def those(function, rope, **options):
        of = call(function, rope, norm, **options)
        return lambda *given: [x for name, x in zip("qkv", of(*given), strict=True) if name in used]

    def and_a_little_of_all(operation):  # so that every tensor has a gradient
        return lambda *given: [*operation(*given), *(x * 2 for x in given)]

    assert_agrees(
        and_a_little_of_all(those(qk_norm_rope3d, rope_of(4, 12, device), via=via)),
        and_a_little_of_all(those(qk_norm_rope3d_reference, rope_of(4, 12))),
        inputs(4, 2, 12, norm),
        device,
        dtype,
    )


@each_via
@each_norm
def test_v_is_a_view(norm, via):
    qkv, *weights = on_device(inputs(5, 2, 12, norm))
    *_, v = call(qk_norm_rope3d, rope_of(5, 12, TRITON_DEVICE), norm, via=via)(qkv, *weights)
    assert v.data_ptr() == qkv[:, 2].data_ptr() and v.stride() == qkv[:, 2].stride()


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view:
            self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


@each_norm
def test_gradients_of_q_k_and_v_are_written_side_by_side_at_once(norm):
    qkv, *weights = (x.requires_grad_() for x in on_device(inputs(5, 2, 12, norm)))
    outputs = call(qk_norm_rope3d, rope_of(5, 12, TRITON_DEVICE), norm, via="triton")(qkv, *weights)
    grads = [torch.ones_like(x) for x in outputs]
    with Calls() as calls:
        torch.autograd.grad(outputs, [qkv, *weights], grads)
    assert [name for name in calls.names if name != "aten::detach"] == ["megasora::qk_norm_rope3d_backward"]


@each_via
@each_norm
def test_only_qkv_is_kept_and_not_even_that_where_nothing_is_normed(norm, via):
    tensors = on_device(inputs(40, 2, 16, norm))
    kept = bytes_kept(call(qk_norm_rope3d, rope_of(40, 16, TRITON_DEVICE), norm, via=via), tensors)
    assert sum(kept.values()) == (0 if norm == "none" else sum(x.nbytes for x in tensors))


@each_via
@each_norm
def test_gradients_repeat_bit_by_bit(norm, via):
    operation = call(qk_norm_rope3d, rope_of(40, 12, TRITON_DEVICE), norm, via=via)
    first, second = (outputs_and_gradients(operation, on_device(inputs(40, 2, 12, norm)))[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_via
@each_norm
def test_tokens_do_not_see_each_other(norm, via):
    """What stands at one, as at padding, changes no other, and a zero vector comes out as zero."""
    operation = call(qk_norm_rope3d, rope_of(9, 12, TRITON_DEVICE), norm, via=via)
    tensors = on_device(inputs(9, 2, 12, norm))
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
    qkv, *weights = on_device(inputs(*SIZES[size], norm))
    rest = *(weights or [None, None]), *parts_of(rope_of(num_tokens, head_dim, TRITON_DEVICE)), EPS, norm
    grads = on_device([normal(num_tokens, num_heads, head_dim)] * 3)
    with walls():
        forward_triton(qkv, *rest)
        backward_triton(*grads, None if norm == "none" else qkv, *rest)


@each_via
@pytest.mark.parametrize("norm", ["per_head", "none"])
def test_it_compiles_as_one_graph(norm, via):
    torch._dynamo.reset()
    rope, tensors = rope_of(9, 12, TRITON_DEVICE), on_device(inputs(9, 2, 12, norm))

    def plain(qkv, *weights):
        q, k, v = call(qk_norm_rope3d, rope, norm, via=via)(qkv * 2, *weights)
        return q.sin() * k, v

    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, tensors), outputs_and_gradients(plain, tensors), strict=True):
        torch.testing.assert_close(a, b)


@each_norm
def test_operators_are_registered_as_torch_wants_them(norm):
    parts = parts_of(rope_of(5, 12, TRITON_DEVICE))
    qkv, *weights = on_device(inputs(5, 2, 12, norm))
    weights = weights or [None, None]
    torch.library.opcheck(forward_triton, (qkv, *weights, *parts, EPS, norm))
    grads = on_device(normal(3, 5, 2, 12)[[0, 2, 1]])
    given = *grads, None if norm == "none" else qkv, *weights, *parts, EPS, norm
    torch.library.opcheck(backward_triton, given)


@each_via
@each_norm
def test_meta_tensors_pass_through(norm, via):
    tensors = [x.to("meta", torch.bfloat16).requires_grad_() for x in inputs(9, 2, 12, norm)]
    outputs = call(qk_norm_rope3d, rope_of(9, 12, "meta"), norm, via=via)(*tensors)
    assert all(x.shape == (9, 2, 12) and x.dtype == torch.bfloat16 for x in outputs)
    sum(x.sum() for x in outputs).backward()
    assert all(x.grad.shape == x.shape and x.grad.dtype == x.dtype for x in tensors)


def test_input_that_does_not_fit_is_refused():
    qkv, weight, rope = torch.zeros(5, 3, 2, 12), torch.zeros(12), rope_of(5, 12)
    with pytest.raises(ValueError, match="norm='layer' must be one of per_head, across_heads, none"):
        qk_norm_rope3d(qkv, weight, weight, rope, EPS, "layer")
    with pytest.raises(ValueError, match=r"qkv \(5, 2, 2, 12\) of torch.float32 must be \[L, 3, N, K\]"):
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
        qk_norm_rope3d(qkv.double(), weight, weight, rope, EPS, via="triton")

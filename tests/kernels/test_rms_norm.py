"""RMSNorm: against the plain maths in float64, whole and in parts, and what it keeps for the backward pass."""

import threading

import pytest
import torch
import torch._dynamo
from agreement import TRITON_DEVICE, assert_agrees, bytes_kept, every_way, normal, outputs_and_gradients
from guarded import walls

from megasora.kernels.rms_norm import backward_triton, forward_triton, rms_norm, rms_norm_reference, sums_triton

EPS = 1e-6
SHAPES = {
    "heads": (7, 3, 8),
    "head dim 96": (5, 2, 96),
    "one vector": (1, 2),
    "no vector": (4, 0, 6),
    "longer than a run": (75, 40),
    "width 1152": (3, 1152),
    "width 5120": (2, 5120),
}
each_via = pytest.mark.parametrize("via", ["torch", "triton"])


def inputs(*shape):
    return [normal(*shape), normal(shape[-1], seed=1)]


def call(function, *rest, **options):
    return lambda x, weight: function(x, weight, EPS, *rest, **options)


@every_way
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_the_maths(shape, via, device, dtype):
    assert_agrees(call(rms_norm, via=via), call(rms_norm_reference), inputs(*SHAPES[shape]), device, dtype)


def test_gradients_of_the_reference_are_the_slopes_of_its_output():
    assert torch.autograd.gradcheck(call(rms_norm_reference), [x.requires_grad_() for x in inputs(3, 2, 4)])


@every_way
def test_views_need_not_be_contiguous(via, device, dtype):
    """Heads and widths between others, as a fused projection gives them; every second number; turned round."""
    views = {
        (6, 3, 2, 8): lambda wide: wide[:, 1],
        (6, 3, 8): lambda wide: wide[:, 1],
        (6, 16): lambda wide: wide[:, ::2],
        (8, 6): lambda wide: wide.T,
    }
    for shape, view in views.items():
        assert_agrees(
            lambda wide, weights, view=view: rms_norm(view(wide), weights[:, 1], EPS, via=via),
            lambda wide, weights, view=view: rms_norm_reference(view(wide), weights[:, 1], EPS),
            [normal(*shape), normal(8, 2, seed=1)],
            device,
            dtype,
        )


def test_parts_of_a_vector_on_two_ranks_are_normed_as_one():
    """Two threads stand for the ranks; what they exchange is the sum of their parts alone."""
    x, weight = inputs(9, 12)
    grad = normal(9, 12, seed=2)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    whole = rms_norm_reference(*leaves, EPS)
    expected = whole.detach(), *torch.autograd.grad(whole, leaves, grad)
    meeting, given, found = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def rank(r):
        def total(part):
            given[r] = part
            meeting.wait()
            whole = given[0] + given[1]
            meeting.wait()
            return whole

        mine = slice(0, 5) if r == 0 else slice(5, 12)
        parts = [t[..., mine].clone().requires_grad_() for t in (x, weight)]
        out = rms_norm(*parts, EPS, 12, total)
        # the engine works off one graph at a time in a thread of its own choice: the backward is called directly
        grads = out.grad_fn.apply(grad[..., mine])
        found[r] = out.detach(), *grads[:2]

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for parts, whole in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=1e-12, atol=1e-13)


@every_way
@pytest.mark.parametrize("shape", [(9, 12), (3, 2, 24)], ids=str)
def test_a_part_with_the_sums_of_the_others_is_that_part_of_the_whole(shape, via, device, dtype):
    """The others' sums are known beforehand; each is asked for once, in the order of the passes."""
    cut, asked = 5, []
    x, weight = (t.to(dtype) for t in inputs(*shape))
    x_rest, weight_rest = x[..., cut:].double(), weight[cut:].double()
    grad_rest = normal(*shape, seed=100).bfloat16()[..., cut:].double()  # as outputs_and_gradients has it
    inverse = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    sums = [x_rest.square(), grad_rest * weight_rest * x_rest * inverse]

    def total(part):
        assert part.shape == (*shape[:-1], 1)
        asked.append(sums[len(asked)].sum(-1, keepdim=True).to(part))
        return part + asked[-1]

    def ours(x, weight):
        y = rms_norm(x, weight, EPS, shape[-1], total, via)
        return torch.cat((y, x_rest.to(y) * 0), -1)

    def theirs(x, weight):
        whole = rms_norm_reference(torch.cat((x, x_rest), -1), torch.cat((weight, weight_rest)), EPS)
        y, rest = whole.tensor_split([cut], -1)
        return torch.cat((y, rest - rest.detach()), -1)  # of the rest the gradient alone

    assert_agrees(ours, theirs, [x[..., :cut], weight[:cut]], device, dtype)
    assert len(asked) == 2


@each_via
def test_gradients_repeat_bit_by_bit(via):
    tensors = [x.float().to(TRITON_DEVICE) for x in inputs(100, 24)]
    first, second = (outputs_and_gradients(call(rms_norm, via=via), tensors)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_via
def test_only_the_input_and_one_number_a_vector_are_kept(via):
    x, weight = (t.to(TRITON_DEVICE, torch.float32) for t in inputs(40, 2, 16))
    assert sum(bytes_kept(call(rms_norm, via=via), [x, weight]).values()) == x.nbytes + weight.nbytes + 40 * 2 * 4


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_write_all_of_their_outputs_and_nothing_else(shape):
    x, weight = (t.float().to(TRITON_DEVICE) for t in inputs(*SHAPES[shape]))
    with walls():
        _, inverse = forward_triton(x, weight, None, x.shape[-1], EPS)
        backward_triton(x, x, weight, inverse, None, x.shape[-1])
        sums_triton(x, x, weight, inverse)


@each_via
def test_it_compiles_as_one_graph(via):
    torch._dynamo.reset()
    tensors = [x.float().to(TRITON_DEVICE) for x in inputs(9, 2, 12)]
    plain = call(rms_norm, via=via)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, tensors), outputs_and_gradients(plain, tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_operators_are_registered_as_torch_wants_them():
    x, weight = (t.float().to(TRITON_DEVICE) for t in inputs(5, 2, 12))
    _, inverse = forward_triton(x, weight, None, 12, EPS)
    torch.library.opcheck(forward_triton, (x, weight, inverse, 12, EPS))
    torch.library.opcheck(sums_triton, (x, None, None, None))
    torch.library.opcheck(backward_triton, (x, x, weight, inverse, None, 12))


@each_via
def test_meta_tensors_pass_through(via):
    x, weight = (t.to("meta", torch.bfloat16).requires_grad_() for t in inputs(9, 2, 12))
    y = rms_norm(x, weight, EPS, 24, lambda sums: sums, via)
    y.sum().backward()
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (x.grad.shape, weight.grad.shape, weight.grad.dtype) == (x.shape, weight.shape, weight.dtype)


def test_input_that_does_not_fit_is_refused():
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"x \(4, 6\) must be \[..., D\], its weight \(5,\) \[D\]"):
        rms_norm(x, torch.zeros(5), EPS)
    with pytest.raises(ValueError, match=r"x \(6,\) must be"):
        rms_norm(x[0], torch.zeros(6), EPS)
    with pytest.raises(ValueError, match=r"x \(4, 6\) of torch.int64 must be of floating point"):
        rms_norm(x.long(), torch.zeros(6), EPS)
    with pytest.raises(ValueError, match="x on cpu, weight on meta"):
        rms_norm(x, torch.zeros(6, device="meta"), EPS)
    with pytest.raises(ValueError, match="takes no float64"):
        rms_norm(x.double(), torch.zeros(6), EPS, via="triton")

"""RMSNorm: agreement with the reference in float64, unsharded and sharded, and what it saves for the backward pass."""

import threading

import pytest
import torch
from agreement import (
    assert_agrees,
    assert_compiles_as_one_graph,
    assert_gradients_repeat,
    each_backend,
    each_variant,
    for_triton,
    normal,
    saved_bytes,
)
from guard_zones import guard_zones

from megasora.kernels.rms_norm import backward_triton, forward_triton, rms_norm, rms_norm_reference, sums_triton

EPS = 1e-6
SHAPES = {
    "heads": (7, 3, 8),
    "head dim 96": (5, 2, 96),
    "one vector": (1, 2),
    "no vector": (4, 0, 6),
    "longer than a tile": (75, 40),
    "width 1152": (3, 1152),
    "width 5120": (2, 5120),
}


def inputs(*shape):
    return [normal(*shape), normal(shape[-1], seed=1)]


def bind(function, *rest, **options):
    return lambda x, weight: function(x, weight, EPS, *rest, **options)


@each_variant
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_the_reference(shape, backend, device, dtype):
    assert_agrees(bind(rms_norm, backend=backend), bind(rms_norm_reference), inputs(*SHAPES[shape]), device, dtype)


def test_gradients_of_the_reference_equal_finite_differences():
    assert torch.autograd.gradcheck(bind(rms_norm_reference), [x.requires_grad_() for x in inputs(3, 2, 4)])


@each_variant
def test_inputs_need_not_be_contiguous(backend, device, dtype):
    """Heads and widths of a fused projection; every second element; transposed."""
    views = {
        (6, 3, 2, 8): lambda wide: wide[:, 1],
        (6, 3, 8): lambda wide: wide[:, 1],
        (6, 16): lambda wide: wide[:, ::2],
        (8, 6): lambda wide: wide.T,
    }
    for shape, view in views.items():
        assert_agrees(
            lambda wide, weights, view=view: rms_norm(view(wide), weights[:, 1], EPS, backend=backend),
            lambda wide, weights, view=view: rms_norm_reference(view(wide), weights[:, 1], EPS),
            [normal(*shape), normal(8, 2, seed=1)],
            device,
            dtype,
        )


def test_vectors_sharded_over_two_ranks_equal_the_full_ones():
    """Two threads simulate the ranks; they exchange their local sums only."""
    x, weight = inputs(9, 12)
    grad = normal(9, 12, seed=2)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = rms_norm_reference(*leaves, EPS)
    expected = out.detach(), *torch.autograd.grad(out, leaves, grad)
    barrier, local_sums, results = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def rank(r):
        def all_reduce(local_sum):
            local_sums[r] = local_sum
            barrier.wait()
            full_sum = local_sums[0] + local_sums[1]
            barrier.wait()
            return full_sum

        shard = slice(0, 5) if r == 0 else slice(5, 12)
        tensors = [t[..., shard].clone().requires_grad_() for t in (x, weight)]
        out = rms_norm(*tensors, EPS, 12, all_reduce)
        # called directly: autograd would run the backward passes of both threads in one thread
        grads = out.grad_fn.apply(grad[..., shard])
        results[r] = out.detach(), *grads[:2]

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for shards, full in zip(zip(*results, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(shards, -1), full, rtol=1e-12, atol=1e-13)


@each_variant
@pytest.mark.parametrize("shape", [(9, 12), (3, 2, 24)], ids=str)
def test_a_shard_with_the_sums_of_the_others_equals_that_shard_of_the_full_vector(shape, backend, device, dtype):
    """The sums of the other shard are computed beforehand; each pass calls all_reduce once."""
    size, added = 5, []
    x, weight = (t.to(dtype) for t in inputs(*shape))
    x_rest, weight_rest = x[..., size:].double(), weight[size:].double()
    grad_rest = normal(*shape, seed=100).bfloat16()[..., size:].double()  # that of outputs_and_gradients
    inverse = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    sums = [x_rest.square(), grad_rest * weight_rest * x_rest * inverse]

    def all_reduce(local_sum):
        assert local_sum.shape == (*shape[:-1], 1)
        added.append(sums[len(added)].sum(-1, keepdim=True).to(local_sum))
        return local_sum + added[-1]

    def operation(x, weight):
        y = rms_norm(x, weight, EPS, shape[-1], all_reduce, backend)
        return torch.cat((y, x_rest.to(y) * 0), -1)

    def reference(x, weight):
        full = rms_norm_reference(torch.cat((x, x_rest), -1), torch.cat((weight, weight_rest)), EPS)
        y, rest = full.tensor_split([size], -1)
        return torch.cat((y, rest - rest.detach()), -1)  # the other shard contributes only to gradients

    assert_agrees(operation, reference, [x[..., :size], weight[:size]], device, dtype)
    assert len(added) == 2


@each_backend
def test_gradients_repeat_bit_by_bit(backend):
    assert_gradients_repeat(bind(rms_norm, backend=backend), for_triton(inputs(100, 24)))


@each_backend
def test_only_the_inputs_and_one_statistic_per_vector_are_saved(backend):
    x, weight = for_triton(inputs(40, 2, 16))
    assert saved_bytes(bind(rms_norm, backend=backend), [x, weight]) == x.nbytes + weight.nbytes + 40 * 2 * 4


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_write_all_of_their_outputs_and_nothing_else(shape):
    x, weight = for_triton(inputs(*SHAPES[shape]))
    with guard_zones():
        _, inverse = forward_triton(x, weight, None, x.shape[-1], EPS)
        backward_triton(x, x, weight, inverse, None, x.shape[-1])
        sums_triton(x, x, weight, inverse)


@each_backend
def test_it_compiles_as_one_graph(backend):
    assert_compiles_as_one_graph(bind(rms_norm, backend=backend), for_triton(inputs(9, 2, 12)))


def test_operators_pass_opcheck():
    x, weight = for_triton(inputs(5, 2, 12))
    _, inverse = forward_triton(x, weight, None, 12, EPS)
    torch.library.opcheck(forward_triton, (x, weight, inverse, 12, EPS))
    torch.library.opcheck(sums_triton, (x, None, None, None))
    torch.library.opcheck(backward_triton, (x, x, weight, inverse, None, 12))


@each_backend
def test_meta_tensors_give_shapes_and_dtypes(backend):
    x, weight = (t.to("meta", torch.bfloat16).requires_grad_() for t in inputs(9, 2, 12))
    y = rms_norm(x, weight, EPS, 24, lambda sums: sums, backend)
    y.sum().backward()
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (x.grad.shape, weight.grad.shape, weight.grad.dtype) == (x.shape, weight.shape, weight.dtype)


def test_invalid_arguments_raise():
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"x \(4, 6\) must be \[..., D\], its weight \(5,\) \[D\]"):
        rms_norm(x, torch.zeros(5), EPS)
    with pytest.raises(ValueError, match=r"x \(6,\) must be"):
        rms_norm(x[0], torch.zeros(6), EPS)
    with pytest.raises(ValueError, match=r"x \(4, 6\) of torch.int64 must be floating point"):
        rms_norm(x.long(), torch.zeros(6), EPS)
    with pytest.raises(ValueError, match="x on cpu, weight on meta"):
        rms_norm(x, torch.zeros(6, device="meta"), EPS)
    with pytest.raises(ValueError, match="takes no float64"):
        rms_norm(x.double(), torch.zeros(6), EPS, backend="triton")

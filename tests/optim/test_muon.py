"""Muon's maths: orthogonal steps of matrices, of several matrices in one parameter and of convolutions."""

import pytest
import torch

from megasora.optim import muon
from megasora.optim.muon import orthogonalize


def steps_of(*updates, num_matrices=None):
    """The steps of copies of the updates."""
    copies = [update.clone() for update in updates]
    orthogonalize(copies, num_matrices or [1] * len(copies))
    return copies


def polynomial_of_singular_values(matrix, iterations=5):
    """The reference: U p(p(...(S / |S|))) V^T from an SVD in float64, p the odd polynomial of Muon."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


def random_matrices(*shapes):
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator) * 10.0 ** (i - 2) for i, shape in enumerate(shapes)]


def test_a_step_is_the_polynomial_of_the_singular_values_times_the_scale_of_the_shape():
    shapes = [(24, 24), (16, 48), (48, 16), (24, 24), (1, 8), (8, 1)]
    matrices = random_matrices(*shapes)
    for matrix, step in zip(matrices, steps_of(*matrices), strict=True):
        expected = polynomial_of_singular_values(matrix) * 0.2 * max(matrix.shape) ** 0.5
        torch.testing.assert_close(step.double(), expected, rtol=1e-3, atol=1e-5)


def test_all_singular_values_of_a_step_are_near_1_and_the_singular_vectors_are_kept():
    matrix = random_matrices((64, 256))[0]
    step = steps_of(matrix)[0] / (0.2 * 256**0.5)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ step @ vh.T
    assert values.diagonal().min() > 0.65 and values.diagonal().max() < 1.25
    assert (values - torch.diag(values.diagonal())).abs().max() < 1e-4


def test_elements_of_a_step_are_as_large_as_those_of_adamw():
    """Root mean square 0.2 times the singular values, which are 0.7 to 1.2."""
    for step in steps_of(*random_matrices((32, 256), (256, 32), (16, 16 * 27))):
        assert 0.14 < step.square().mean().sqrt() < 0.24


def test_the_size_of_the_gradient_does_not_matter():
    matrix = random_matrices((12, 20))[0]
    for factor in (1e-8, 1e8):
        torch.testing.assert_close(steps_of(matrix * factor)[0], steps_of(matrix)[0], rtol=1e-4, atol=1e-5)


def test_matrices_in_one_parameter_are_orthogonalised_one_by_one():
    qkv = random_matrices((3 * 16, 16))[0]
    expected = torch.cat(steps_of(*qkv.split(16)))
    torch.testing.assert_close(steps_of(qkv, num_matrices=[3])[0], expected)
    assert not torch.allclose(steps_of(qkv)[0], expected, rtol=0.1)


def test_a_convolution_is_the_matrix_of_all_inputs_of_each_output():
    kernel = random_matrices((8, 4, 3, 3, 3))[0]
    torch.testing.assert_close(steps_of(kernel)[0], steps_of(kernel.flatten(1))[0].view_as(kernel))


def test_zeros_stay_zero_and_change_no_other_matrix_of_their_batch():
    matrix = random_matrices((8, 8))[0]
    zero, tiny, step = steps_of(torch.zeros(8, 8), torch.full((8, 8), 1e-25), matrix)
    assert not zero.any() and tiny.isfinite().all() and tiny.abs().max() < 1e-3
    torch.testing.assert_close(step, steps_of(matrix)[0])


def test_small_batches_give_the_same_steps(monkeypatch):
    matrices = random_matrices((8, 16), (16, 8), (8, 16), (8, 16), (16, 16))
    expected = steps_of(*matrices)
    monkeypatch.setitem(muon.MAX_BATCH_ELEMENTS, "cpu", 2 * 8 * 16 + 1)
    for step, reference in zip(steps_of(*matrices), expected, strict=True):
        torch.testing.assert_close(step, reference)


def train_a_linear_map(lr, uses_muon, steps=60):
    """The last loss of fitting y = A x, where x has variances of 1 to 1e-4 in 32 random directions."""
    generator = torch.Generator().manual_seed(0)
    target, directions = (torch.randn(32, 32, generator=generator) for _ in range(2))
    directions = torch.linalg.qr(directions)[0]
    weight = torch.zeros(32, 32, requires_grad=True)
    adamw, momentum = torch.optim.AdamW([weight], lr=lr, betas=(0.9, 0.95), weight_decay=0.0), torch.zeros(32, 32)
    for step in range(steps):
        x = torch.randn(64, 32, generator=generator) * torch.logspace(0, -2, 32) @ directions
        loss = ((weight - target) @ x.T).square().mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        step_lr = lr * (1 - step / steps)
        if uses_muon:
            momentum.lerp_(gradient, 0.1)
            update = gradient.lerp(momentum, 0.9)
            orthogonalize([update], [1])
            weight.data -= step_lr * update
        else:
            weight.grad, adamw.param_groups[0]["lr"] = gradient, step_lr
            adamw.step()
    return float(loss.detach())


def test_it_converges_faster_than_adamw_where_directions_have_different_scales():
    rates = [0.1, 0.2, 0.5, 1.0]
    muon_loss, adamw_loss = (min(train_a_linear_map(lr, uses_muon) for lr in rates) for uses_muon in (True, False))
    assert muon_loss < 0.2 * adamw_loss


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_in_bf16_steps_are_close_to_those_of_the_cpu():
    matrices = random_matrices((64, 256), (128, 64), (64, 64))
    for on_gpu, step in zip(steps_of(*(m.cuda() for m in matrices)), steps_of(*matrices), strict=True):
        assert (on_gpu.cpu() - step).norm() / step.norm() < 0.1

"""The latents of kl, vq and fsq against their definitions."""

import math

import numpy as np
import pytest
import torch

from megasora.codec.vae.quantizers import INITIAL_LOGVAR, build_quantizer, perplexity
from megasora.config import VAEConfig
from megasora.errors import MegaSoraError
from megasora.testing.codecs import normal, vector_quantizer


def test_kl_is_the_divergence_from_the_standard_normal():
    moments, noise = 2 * normal(2, 8, 3, 2, 2), normal(2, 4, 3, 2, 2, seed=1)
    latents = build_quantizer(VAEConfig(), 4)(moments, noise)
    mean, logvar = moments.chunk(2, 1)
    posterior = torch.distributions.Normal(mean, ((logvar + INITIAL_LOGVAR) / 2).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(posterior, standard).sum()
    torch.testing.assert_close(latents.penalty_sum, expected)
    torch.testing.assert_close(latents.z, mean + posterior.stddev * noise)
    assert torch.equal(build_quantizer(VAEConfig(), 4).mode(moments), mean)


def test_kl_of_an_extreme_variance_is_finite_and_bf16_moments_are_computed_in_fp32():
    moments = torch.cat([torch.zeros(1, 4, 1, 1, 1), torch.full((1, 4, 1, 1, 1), 1e4)], 1).bfloat16()
    latents = build_quantizer(VAEConfig(), 4)(moments, torch.ones(1, 4, 1, 1, 1))
    assert latents.penalty_sum.isfinite() and latents.penalty_sum.dtype == torch.float32
    assert latents.z.dtype == torch.bfloat16 and latents.z.isfinite().all()


@pytest.mark.parametrize("kind", ["kl", "vq", "fsq"])
def test_latents_are_pointwise_and_penalties_add_up(kind):
    quantizer = build_quantizer(VAEConfig(kind=kind, codebook_size=5, fsq_levels=[5, 4, 3, 2]), 4).double()
    if kind == "vq":
        quantizer.codebook.codes.copy_(normal(5, 4, seed=9))
    x, noise = normal(2, quantizer.in_channels, 5, 3, 4), normal(2, 4, 5, 3, 4, seed=1)
    whole = quantizer(x, noise)
    parts = [quantizer(a, b) for a, b in zip(x.split([2, 3], 2), noise.split([2, 3], 2), strict=True)]
    torch.testing.assert_close(torch.cat([part.z for part in parts], 2), whole.z, rtol=0, atol=1e-14)
    torch.testing.assert_close(sum(part.penalty_sum for part in parts), whole.penalty_sum)
    if kind != "kl":
        assert torch.equal(sum(part.counts for part in parts), whole.counts)
        assert torch.equal(whole.z, quantizer.mode(x))  # what is trained with is what ingest stores


def test_vq_takes_the_nearest_code_and_pulls_the_encoder_to_it():
    quantizer = vector_quantizer()
    x = normal(2, 4, 3, 2, 2, seed=1).requires_grad_()
    latents = quantizer(x, normal(2, 4, 3, 2, 2, seed=2))
    vectors, codes = x.detach().movedim(1, -1).numpy(), quantizer.codebook.codes.numpy()
    distances = ((vectors[..., None, :] - codes) ** 2).sum(-1)
    np.testing.assert_array_equal(latents.codes.numpy(), distances.argmin(-1))
    np.testing.assert_allclose(latents.penalty_sum.item(), distances.min(-1).sum(), rtol=1e-12)
    np.testing.assert_array_equal(latents.z.detach().movedim(1, -1).numpy(), codes[latents.codes.numpy()])
    np.testing.assert_array_equal(latents.counts[0].numpy(), np.bincount(latents.codes.numpy().ravel(), minlength=6))
    weight = normal(*x.shape, seed=3)
    torch.testing.assert_close(torch.autograd.grad((latents.z * weight).sum(), x, retain_graph=True)[0], weight)
    pull = torch.autograd.grad(latents.penalty_sum, x)[0]
    torch.testing.assert_close(pull, 2 * (x - latents.z).detach())


def test_a_vector_that_is_not_finite_gives_latents_that_are_not():
    quantizer, x = vector_quantizer(), normal(1, 4, 1, 2, 2)
    x[0, 1, 0, 0, 0] = math.nan
    assert quantizer(x, normal(*x.shape)).z.isnan().any()


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8])
def test_fsq_rounds_to_equidistant_levels_from_minus_one_to_one(levels):
    quantizer = build_quantizer(VAEConfig(kind="fsq", fsq_levels=[levels] * 4), 4)
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64).view(1, 1, 1, 1, -1).expand(-1, 4, -1, -1, -1)
    z = quantizer.mode(x)[0, 0, 0, 0]
    expected = np.linspace(-1, 1, levels)
    np.testing.assert_allclose(z.unique().numpy(), expected, atol=1e-15)
    np.testing.assert_allclose((z - x[0, 0, 0, 0].tanh()).abs().max().item(), 1 / (levels - 1), rtol=0.02)
    np.testing.assert_array_equal(quantizer.mode(-x).numpy(), -quantizer.mode(x).numpy())


def test_fsq_codes_number_the_combinations_of_levels():
    levels = [3, 2, 4, 2]
    quantizer = build_quantizer(VAEConfig(kind="fsq", fsq_levels=levels), 4)
    axes = [(0.99 * torch.linspace(-1, 1, count, dtype=torch.float64)).atanh() for count in levels]
    x = torch.cartesian_prod(*axes).T.reshape(1, 4, 1, 6, 8).requires_grad_()
    latents = quantizer(x, torch.zeros_like(x))
    assert latents.codes.flatten().unique().tolist() == list(range(48)) and quantizer.num_codes == 48
    digits = np.unravel_index(latents.codes.numpy(), levels, order="F")
    for channel, count in enumerate(levels):
        values = np.linspace(-1, 1, count)[digits[channel]]
        np.testing.assert_allclose(latents.z[:, channel].detach().numpy(), values, atol=1e-15)
        assert latents.counts[channel].tolist() == [48 // count] * count + [0] * (4 - count)
    assert perplexity(latents.counts).item() == pytest.approx(48) and latents.penalty_sum == 0
    (gradient,) = torch.autograd.grad(latents.z.sum(), x)
    torch.testing.assert_close(gradient, 1 - x.detach().tanh() ** 2)  # that of tanh, as if nothing was rounded


def test_too_many_codes_of_fsq_are_an_error():
    with pytest.raises(MegaSoraError, match="vae.fsq_levels=.* use fewer levels"):
        build_quantizer(VAEConfig(kind="fsq", fsq_levels=[8] * 32), 32)


def test_perplexity_of_known_frequencies():
    assert perplexity(torch.tensor([[5, 5, 0, 5, 5]])).item() == pytest.approx(4)
    assert perplexity(torch.tensor([[7, 0]])).item() == 1
    p = np.array([0.5, 0.3, 0.2])
    assert perplexity(torch.tensor([[50, 30, 20]])).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()))

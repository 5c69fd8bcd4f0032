"""PSNR, SSIM and flicker against loops over pixels, and totals that do not depend on the pieces of a clip."""

import math

import numpy as np
import pytest
import torch

from megasora.codec.metrics import MAX_PSNR, Metrics, flicker, psnr, ssim


def random_frames(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=dtype) * 2 - 1


def pair(count, height, width, dtype=torch.float64):
    """Frames, and the same with noise."""
    x = random_frames(count, 3, height, width, dtype=dtype)
    return x, (x + 0.3 * random_frames(*x.shape, seed=1, dtype=dtype)).clamp(-1, 1)


def ssim_of_plane(x, y, stride=1):
    """The definition for values in [0, 1], position by position, with a two-dimensional window and centred moments."""
    x, y = (x + 1) / 2, (y + 1) / 2
    sides = [min(11, n if n % 2 else n - 1) for n in x.shape]
    rows, columns = np.meshgrid(*(np.arange(n) - n // 2 for n in sides), indexing="ij")
    window = np.exp(-(rows**2 + columns**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(0, x.shape[0] - sides[0] + 1, stride):
        for j in range(0, x.shape[1] - sides[1] + 1, stride):
            a, b = x[i : i + sides[0], j : j + sides[1]], y[i : i + sides[0], j : j + sides[1]]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
            values.append(luminance * (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2))
    return np.mean(values)


def test_psnr_of_a_constant_error_is_known():
    x = random_frames(2, 3, 4, 5)
    shifted = x + torch.tensor([0.1, 0.02], dtype=x.dtype).view(2, 1, 1, 1)
    expected = [20 * math.log10(2 / 0.1), 20 * math.log10(2 / 0.02)]
    torch.testing.assert_close(psnr(shifted, x), torch.tensor(expected, dtype=x.dtype))


def test_psnr_of_equal_frames_is_finite_and_of_nan_is_nan():
    x = random_frames(1, 3, 2, 2)
    assert psnr(x, x).tolist() == [MAX_PSNR]
    assert psnr(x * math.nan, x).isnan().all()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(13, 16), (11, 11), (12, 5), (4, 20), (2, 3), (1, 1), (1, 12)])
def test_ssim_equals_its_definition(size, stride):
    x, y = pair(2, *size)
    expected = [np.mean([ssim_of_plane(a, b, stride) for a, b in zip(*planes, strict=True)])
                for planes in zip(x.numpy(), y.numpy(), strict=True)]  # fmt: skip
    torch.testing.assert_close(ssim(x, y, stride), torch.tensor(expected, dtype=x.dtype), rtol=0, atol=1e-12)


def test_ssim_is_one_for_equal_frames_and_negative_for_inverted_ones():
    x = random_frames(1, 3, 16, 16)
    torch.testing.assert_close(ssim(x, x), torch.ones(1, dtype=x.dtype))
    assert ssim(-x, x).item() < -0.5


def test_flicker_is_the_error_of_changes_and_not_of_frames():
    x, y = pair(4, 3, 5)
    expected = [np.abs((x[t + 1] - x[t]).numpy() - (y[t + 1] - y[t]).numpy()).mean() for t in range(3)]
    torch.testing.assert_close(flicker(x, y), torch.tensor(expected, dtype=x.dtype))
    assert flicker(x + 0.5, x).max() < 1e-15


@pytest.mark.parametrize("pieces", [[7], [1, 3, 3], [1] * 7, [6, 1]])
def test_totals_do_not_depend_on_the_pieces_of_a_clip(pieces):
    x, y = pair(7, 12, 14, dtype=torch.float32)
    image_x, image_y = pair(1, 5, 3, dtype=torch.float32)
    metrics = Metrics()
    metrics.add(image_y, image_x)
    for index, (a, b) in enumerate(zip(y.split(pieces), x.split(pieces), strict=True)):
        metrics.add(a, b, starts_clip=index == 0)
    totals = metrics.totals()
    assert totals["frames"] == 8
    for name, measure in (("psnr", psnr), ("ssim", ssim)):
        expected = torch.cat([measure(y, x), measure(image_y, image_x)]).double().mean().item()
        assert totals[name] == pytest.approx(expected, rel=1e-6)
    assert totals["flicker"] == pytest.approx(flicker(y, x).double().mean().item(), rel=1e-6)
    assert totals["mse"] == pytest.approx(
        (7 * (x - y).square().mean().item() + (image_x - image_y).square().mean().item()) / 8, rel=1e-6
    )


def test_sums_of_ranks_add_up():
    clips = [pair(count, 6, 6, dtype=torch.float32) for count in (3, 1, 4)]
    together, ranks = Metrics(), [Metrics(), Metrics()]
    for index, (x, y) in enumerate(clips):
        for metrics in (together, ranks[index % 2]):
            metrics.add(y, x)
    added = Metrics()
    added.sums = ranks[0].sums + ranks[1].sums
    assert added.totals() == pytest.approx(together.totals(), rel=1e-12)


def test_images_have_no_flicker_and_no_frames_no_psnr():
    metrics = Metrics()
    assert math.isnan(metrics.totals()["psnr"])
    metrics.add(*pair(1, 4, 4))
    metrics.add(*pair(1, 4, 4))
    assert metrics.totals()["flicker"] == 0.0 and metrics.sums[4] == 0


def test_the_state_is_that_of_one_frame():
    metrics = Metrics()
    for index in range(3):
        metrics.add(*pair(5, 4, 6), starts_clip=index == 0)
    assert metrics.last_error.untyped_storage().nbytes() == 3 * 4 * 6 * 4

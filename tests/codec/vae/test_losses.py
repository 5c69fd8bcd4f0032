"""The terms of the reconstruction loss against loops over pixels; LPIPS against torchvision's arrangement of VGG16."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from megasora.codec.metrics import psnr, ssim
from megasora.codec.vae.losses import frame_terms, gradient_error, reconstruction_loss
from megasora.codec.vae.lpips import expected_shapes, load_lpips
from megasora.config import ReconstructionConfig
from megasora.errors import MegaSoraError

VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
STAGE_ENDS = (3, 8, 15, 22, 29)  # indices of the last ReLU of each stage in torchvision's `features`


def clips(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=generator, dtype=dtype) * 2 - 1).requires_grad_()


def block_means(plane):
    """Means over 2 x 2 pixels, of fewer at the lower and right border."""
    height, width = plane.shape
    return np.array([[plane[i : i + 2, j : j + 2].mean() for j in range(0, width, 2)] for i in range(0, height, 2)])


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 6), (2, 1), (1, 1), (3, 3)])
def test_gradient_equals_differences_of_the_images_at_three_scales(size):
    x, y = clips(2, 3, *size).detach(), clips(2, 3, *size, seed=1).detach()
    expected = []
    for images in zip(x.numpy(), y.numpy(), strict=True):
        total, planes = 0.0, [list(image) for image in images]
        for _ in range(3):
            for axis in (0, 1):
                if planes[0][0].shape[axis] > 1:
                    changes = [np.stack([np.diff(plane, axis=axis) for plane in image]) for image in planes]
                    total += np.abs(changes[0] - changes[1]).mean()
            planes = [[block_means(plane) for plane in image] for image in planes]
        expected.append(total / 3)
    torch.testing.assert_close(gradient_error(x - y), torch.tensor(expected, dtype=x.dtype))


def test_terms_are_those_of_each_frame():
    x, y = clips(2, 3, 4, 12, 14), clips(2, 3, 4, 12, 14, seed=1)
    terms = frame_terms(x, y)
    for b in range(2):
        for t in range(4):
            frame, target = x[b : b + 1, :, t], y[b : b + 1, :, t]
            expected = {
                "l1": (frame - target).abs().mean()[None], "mse": (frame - target).square().mean()[None],
                "gradient": gradient_error(frame - target), "ssim": ssim(frame, target, stride=2),
                "psnr": psnr(frame, target).detach(),
            }  # fmt: skip
            for name, values in terms.items():
                torch.testing.assert_close(values[b, t], expected[name][0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_over_parts_of_a_clip_are_those_of_the_clip(layout):
    x, y = clips(2, 3, 5, 9, 10), clips(2, 3, 5, 9, 10, seed=1)
    weights = ReconstructionConfig()
    whole = reconstruction_loss(frame_terms(x, y), weights).sum()
    (expected,) = torch.autograd.grad(whole, x)
    z = x.detach()
    if layout == "channels_last":
        z = z.contiguous(memory_format=torch.channels_last_3d)
    z.requires_grad_()
    parts = [
        reconstruction_loss(frame_terms(a, b), weights).sum()
        for a, b in zip(z.split([2, 3], 2), y.split([2, 3], 2), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), z)[0], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (12, 2)])
def test_gradients_are_right_at_the_smallest_sizes(size):
    x, y = clips(1, 3, 2, *size), clips(1, 3, 2, *size, seed=1).detach()
    weights = ReconstructionConfig(l1=0.7, mse=0.4, gradient=0.5, ssim=0.3)
    assert torch.autograd.gradcheck(lambda x: reconstruction_loss(frame_terms(x, y), weights), (x,))


def test_equal_frames_have_no_loss_and_a_finite_gradient():
    x = clips(1, 3, 2, 6, 6)
    terms = frame_terms(x, x.detach())
    loss = reconstruction_loss(terms, ReconstructionConfig(l1=1, gradient=1, ssim=1))
    assert loss.abs().max() < 1e-12 and not terms["psnr"].requires_grad
    loss.sum().backward()
    assert x.grad.isfinite().all()


def test_weights_multiply_their_terms():
    x, y = clips(1, 3, 1, 6, 6), clips(1, 3, 1, 6, 6, seed=1)
    terms = frame_terms(x, y) | {"lpips": x.new_tensor([[0.25]])}
    for name, value in (("l1", terms["l1"]), ("mse", terms["mse"]), ("gradient", terms["gradient"]),
                        ("ssim", 1 - terms["ssim"]), ("lpips", terms["lpips"])):  # fmt: skip
        only = ReconstructionConfig(**{"l1": 0, "gradient": 0, "ssim": 0, "lpips": 0} | {name: 2.5})
        torch.testing.assert_close(reconstruction_loss(terms, only), 2.5 * value)


def test_terms_of_bf16_clips_are_computed_in_fp32():
    x, y = (clips(1, 3, 2, 12, 12, seed=seed).bfloat16() for seed in (0, 1))
    for name, values in frame_terms(x, y).items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, frame_terms(x.float(), y.float())[name])


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory):
    """Random weights; each stage keeps the scale of its input."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    tensors = {}
    for name, shape in expected_shapes().items():
        values = torch.randn(shape, generator=generator)
        fan_in = values[0].numel()
        tensors[name] = (
            values.abs() if name.startswith("lin") else values * ((2 / fan_in) ** 0.5 if len(shape) > 1 else 0.1)
        )
    save_file(tensors | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    return path, tensors


def test_lpips_equals_the_modules_of_torchvision_and_lpips(lpips_file):
    path, tensors = lpips_file
    layers, channels = [], 3
    for width in VGG16:
        layers += [nn.MaxPool2d(2, 2)] if width == "M" else [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = channels if width == "M" else width
    vgg = nn.Sequential(*layers)
    vgg.load_state_dict({n.removeprefix("features."): w for n, w in tensors.items() if n.startswith("features.")})
    x, y = clips(2, 3, 35, 20, dtype=torch.float32), clips(2, 3, 35, 20, seed=1, dtype=torch.float32)
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    with torch.no_grad():
        a, b = (x - shift) / scale, (y - shift) / scale
        expected = torch.zeros(2)
        for index, layer in enumerate(vgg):
            a, b = layer(a), layer(b)
            if index in STAGE_ENDS:
                u, v = (z / (z.norm(dim=1, keepdim=True) + 1e-10) for z in (a, b))
                weights = tensors[f"lin{STAGE_ENDS.index(index)}.model.1.weight"].flatten()
                expected += torch.einsum("nchw,c->nhw", (u - v) ** 2, weights).mean((1, 2))
    lpips = load_lpips(str(path))
    torch.testing.assert_close(lpips(x, y).detach(), expected, rtol=1e-4, atol=0)
    assert lpips(x, x).abs().max() == 0 and not list(lpips.parameters())
    terms = frame_terms(x[:, :, None], y[:, :, None], lpips)
    torch.testing.assert_close(terms["lpips"][:, 0].detach(), expected, rtol=1e-4, atol=0)


def test_lpips_of_one_pixel_and_of_black_features_is_finite(lpips_file):
    lpips = load_lpips(str(lpips_file[0]))
    for index in (0, 2):
        getattr(lpips, f"features_{index}_bias").fill_(-100)  # all features of the first stage are 0
    x, y = clips(2, 3, 1, 1, dtype=torch.float32), clips(2, 3, 1, 1, seed=1, dtype=torch.float32)
    distance = lpips(x, y).sum()
    distance.backward()
    assert distance.isfinite() and x.grad.isfinite().all()


def test_lpips_names_the_file_and_the_tensor_that_is_wrong(lpips_file, tmp_path):
    _, tensors = lpips_file
    small = {name: torch.zeros(shape) for name, shape in expected_shapes().items() if shape[0] < 128}
    with pytest.raises(MegaSoraError, match="reconstruction.lpips_path=none.safetensors is not a file"):
        load_lpips("none.safetensors")
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(MegaSoraError, match=r"w\.safetensors cannot be read.*reconstruction.lpips=0"):
        load_lpips(str(path))
    save_file(small, path)
    with pytest.raises(MegaSoraError, match="has no tensor features.5.weight"):
        load_lpips(str(path))
    save_file(small | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, path)
    with pytest.raises(MegaSoraError, match=r"features.0.weight has shape \[64, 1, 3, 3\], not \[64, 3, 3, 3\]"):
        load_lpips(str(path))
    save_file(tensors | {"lin2.model.1.weight": torch.full((1, 256, 1, 1), torch.nan)}, path)
    with pytest.raises(MegaSoraError, match="lin2.model.1.weight has values that are not finite"):
        load_lpips(str(path))

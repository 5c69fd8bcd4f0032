"""VideoVAE: shapes, causality, memory format."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megasora.codec.vae.boundary import ClipBoundary
from megasora.codec.vae.layers import (
    CausalConv3d,
    ChannelNorm,
    Downsample,
    Upsample,
    average_channels,
    depth_to_space,
    space_to_depth,
)
from megasora.codec.vae.network import Strides, VideoVAE, init_weights, strides
from megasora.config import VAEConfig

WHOLE = ClipBoundary()


def init(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    init_weights(model, lambda name, shape: torch.randn(shape, generator=generator))
    return model.requires_grad_(False)


def make_vae(factors: list[int], patch: int = 2, time: str = "causal", **settings) -> VideoVAE:
    """A stage for each halving of the sides below the patch."""
    stages = (factors[1] // patch).bit_length()
    defaults = {"width": 4, "multipliers": [1, 2, 2, 2, 2, 2][:stages], "blocks": 1}
    vae = VAEConfig(**{**defaults, "patch": patch, "time": time, **settings})
    return init(VideoVAE(vae, factors, channels=4))


def random_clip(frames: int, height: int, width: int, count: int = 1) -> Tensor:
    return torch.rand(count, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


# ---- shapes


@pytest.mark.parametrize("fs", [4, 8, 16, 32])
@pytest.mark.parametrize("ft", [1, 2, 4, 8])
def test_all_factors_give_one_latent_for_the_first_frame_and_one_for_every_ft_more(ft, fs):
    vae = make_vae([ft, fs, fs])
    for k in (0, 1, 3):
        clip = random_clip(1 + k * ft, 2 * fs, 3 * fs)
        latents = vae.encode(clip)
        assert latents.shape == (1, 4, 1 + k, 2, 3)
        assert vae.decode(latents).shape == clip.shape
        result = vae(clip, torch.zeros_like(latents))
        torch.testing.assert_close(result.latents.z, latents, rtol=0, atol=0)
        torch.testing.assert_close(result.frames, vae.decode(latents), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("patch", "stages", "factors", "expected"),
    [
        (1, 4, [4, 8, 8], Strides((1, 1), [(1, 2), (2, 2), (2, 2)])),  # as Wan 2.1
        (2, 4, [4, 16, 16], Strides((1, 2), [(1, 2), (2, 2), (2, 2)])),  # as Wan 2.2
        (4, 2, [4, 8, 8], Strides((2, 4), [(2, 2)])),
        (8, 1, [8, 8, 8], Strides((8, 8), [])),
        (1, 3, [1, 4, 4], Strides((1, 1), [(1, 2), (1, 2)])),
    ],
)
def test_the_factors_are_divided_over_the_stages_and_the_patch(patch, stages, factors, expected):
    plan = strides(VAEConfig(patch=patch, multipliers=[1] * stages), factors)
    assert plan == expected
    times, sides = zip(plan.patch, *plan.stages, strict=True)
    assert [torch.tensor(times).prod(), torch.tensor(sides).prod()] == factors[:2]


# ---- causality


@pytest.mark.parametrize("ft", [1, 2, 4, 8])
def test_a_latent_frame_depends_on_the_frames_of_its_chunk_and_before_only(ft):
    vae, clip = make_vae([ft, 4, 4]), random_clip(1 + 3 * ft, 8, 8)
    latents = vae.encode(clip)
    for frame in range(1 + 3 * ft):
        changed = clip.clone()
        changed[:, :, frame] += 1
        own = -(-frame // ft)  # the latent frame of this frame
        different = (vae.encode(changed) != latents).amax((0, 1, 3, 4))
        assert not different[:own].any() and different[own]


@pytest.mark.parametrize("ft", [1, 2, 4, 8])
def test_a_decoded_frame_depends_on_its_latent_frame_and_those_before_only(ft):
    vae = make_vae([ft, 4, 4])
    latents = torch.randn(1, 4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    frames = vae.decode(latents)
    for own in range(4):
        changed = latents.clone()
        changed[:, :, own] += 1
        first = 0 if own == 0 else 1 + (own - 1) * ft
        different = (vae.decode(changed) != frames).amax((0, 1, 3, 4))
        assert not different[:first].any() and different[first : 1 + own * ft].all()


@pytest.mark.parametrize("ft", [1, 4])
def test_the_first_frame_of_a_clip_is_encoded_and_decoded_as_an_image(ft):
    vae, clip = make_vae([ft, 8, 8]), random_clip(1 + 2 * ft, 16, 24)
    latents = vae.encode(clip)
    image = vae.encode(clip[:, :, :1])
    torch.testing.assert_close(latents[:, :, :1], image, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vae.decode(latents)[:, :, :1], vae.decode(image), rtol=1e-5, atol=1e-6)


def test_without_time_each_frame_is_an_image():
    vae, clip = make_vae([1, 8, 8], time="none"), random_clip(4, 16, 24)
    latents = vae.encode(clip)
    frames = vae.decode(latents)
    for t in range(4):
        image = clip[:, :, t : t + 1]
        torch.testing.assert_close(vae.encode(image), latents[:, :, t : t + 1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(vae.decode(latents[:, :, t : t + 1]), frames[:, :, t : t + 1], rtol=1e-5, atol=1e-6)
    causal = make_vae([1, 8, 8])
    assert not torch.allclose(causal.encode(clip[:, :, 1:2]), causal.encode(clip)[:, :, 1:2], atol=1e-2)


# ---- resampling


@pytest.mark.parametrize("starts_clip", [True, False])
@pytest.mark.parametrize("stride", [(1, 2), (2, 2), (4, 8), (2, 1)])
def test_depth_to_space_inverts_space_to_depth(stride, starts_clip):
    st, s = stride
    x = torch.randn(2, 3, 3 * st + starts_clip, 2 * s, 3 * s)
    blocks = space_to_depth(x, stride, starts_clip)
    assert blocks.shape == (2, 3 * st * s * s, 3 + starts_clip, 2, 3)
    assert torch.equal(depth_to_space(blocks, stride, starts_clip), x)
    t, h, w = 1, 1, 2  # one block, in the order channel, frame, row, column
    first = t * st - (st - 1) * starts_clip
    block = x[0, :, first : first + st, h * s : (h + 1) * s, w * s : (w + 1) * s]
    assert torch.equal(blocks[0, :, t, h, w], block.flatten())


@pytest.mark.parametrize("channels", [(8, 4), (4, 8)])
def test_resampling_begins_as_the_mean_and_the_repetition_of_channels(channels):
    """With weights of zero, the shortcuts of DC-AE remain; of a constant input, they keep the value."""
    down, up = Downsample(channels[0], channels[1], (2, 2)), Upsample(channels[1], channels[0], (2, 2))
    for layer in (down, up):
        for parameter in layer.parameters():
            parameter.data.zero_()
    x = torch.full((1, channels[0], 5, 4, 4), 0.7)
    low = down(x, WHOLE)
    torch.testing.assert_close(low, torch.full((1, channels[1], 3, 2, 2), 0.7))
    torch.testing.assert_close(up(low, WHOLE), x)
    y = torch.randn(1, 8, 2, 3, 4)
    expected = torch.stack([y[:, 0:2].mean(1), y[:, 2:4].mean(1), y[:, 4:6].mean(1), y[:, 6:8].mean(1)], dim=1)
    torch.testing.assert_close(average_channels(y, 4), expected)
    z = torch.randn(1, channels[1], 3, 2, 2)
    repeats = channels[0] * 8 // channels[1]
    torch.testing.assert_close(up(z, WHOLE), depth_to_space(z.repeat_interleave(repeats, dim=1), (2, 2), True))


def test_the_norm_divides_by_the_root_mean_square_of_the_channels():
    norm = ChannelNorm(6)
    norm.weight.data = torch.arange(1.0, 7.0)
    x = torch.randn(2, 6, 3, 4, 5)
    expected = torch.nn.functional.rms_norm(x.movedim(1, -1), (6,), norm.weight.data, 1e-6).movedim(-1, 1)
    torch.testing.assert_close(norm(x), expected)


# ---- memory format


class Operations(TorchDispatchMode):
    """Counts copies, and notes the convolutions whose input or result is not channels last."""

    def __init__(self):
        super().__init__()
        self.copies: Counter[str] = Counter()
        self.convolutions, self.other_formats = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if name in ("clone", "copy_", "_to_copy", "contiguous", "repeat_interleave", "constant_pad_nd", "cat"):
            self.copies[name] += 1
        if "convolution" in name:
            self.convolutions += 1
            for x in (args[0], result):
                if not x.is_contiguous(memory_format=torch.channels_last_3d):
                    self.other_formats.append((name, tuple(x.shape), x.stride()))
        return result


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("planar", [False, True])
def test_convolutions_are_channels_last_and_nothing_is_copied_without_need(count, planar):
    """One copy pads the input of each 3x3 convolution, one rearranges at each change of resolution, and the first frame
    is repeated before each stride in time; whatever the memory format of the clip."""
    vae = make_vae([4, 8, 8])  # patch (1, 2), strides (2, 2), (2, 2)
    clip = random_clip(9, 32, 40, count)
    clip = clip if planar else clip.to(memory_format=torch.channels_last_3d)
    with Operations() as operations:
        vae.decode(vae.encode(clip))
    blocks = 3 + 3 * 2
    assert operations.other_formats == []
    assert operations.convolutions == 2 + 2 * blocks + 2 + 4  # first and last, blocks, proj of four resamplings
    assert operations.copies == {"constant_pad_nd": 2 + 2 * blocks + 2, "clone": 6, "cat": 2}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (1, 1)])
def test_a_convolution_and_its_gradients_are_those_of_float64(kernel, count):
    """Small inputs, for which PyTorch's own choice on the CPU is another implementation."""
    layer = init(CausalConv3d(8, 4, kernel)).requires_grad_(True)
    layer.bias.data.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(count, 8, 3, 6, 5, generator=torch.Generator().manual_seed(2), requires_grad=True)
    weights = torch.randn(count, 4, 3, 6, 5, generator=torch.Generator().manual_seed(3))

    def run(x: Tensor) -> list[Tensor]:
        y = layer(x, WHOLE)
        return [y, *torch.autograd.grad((y * weights).sum(), (x, *layer.parameters()))]

    single = run(x)
    layer.double()
    for value, reference in zip(single, run(x.double()), strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)

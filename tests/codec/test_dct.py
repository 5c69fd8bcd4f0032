"""The `dct` codec: an orthonormal change of basis, causal in time, with latents of about unit variance."""

import math

import numpy as np
import pytest
import torch

from megasora.codec import build_codec
from megasora.codec.dct import DCTCodec
from megasora.codec.dct_encoder import dct_basis
from megasora.config import CodecConfig
from megasora.data.patches import frames_to_float
from megasora.errors import MegaSoraError
from megasora.testing import clips


def make(factors=(2, 4, 4), channels=24) -> DCTCodec:
    return build_codec(CodecConfig(factors=list(factors), channels=channels))


def random_frames(count, height=8, width=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 3, height, width, generator=generator, dtype=dtype) * 2 - 1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_basis_is_orthonormal_and_starts_with_the_mean(n):
    basis = torch.from_numpy(dct_basis(n))
    torch.testing.assert_close(basis @ basis.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(basis[0], torch.full((n,), n**-0.5, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("factors", [(1, 8, 8), (2, 4, 4), (4, 8, 8)])
def test_selected_coefficients_are_orthonormal_over_time_space_and_colour(factors):
    basis = make(factors, channels=48).basis.double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 4, 4), (4, 2, 4)])
@pytest.mark.parametrize("count", [1, 5, 9, 13])
def test_all_coefficients_reconstruct_the_frames(factors, count):
    codec = make(factors, channels=3 * math.prod(factors))
    frames = random_frames(count, 8, 12)
    torch.testing.assert_close(codec.decode(codec.encode(frames)), frames, rtol=0, atol=2e-6)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_frames_that_do_not_fill_the_last_block_are_reconstructed(count):
    codec = make((4, 2, 2), channels=48)
    frames = random_frames(count)
    decoded = codec.decode(codec.encode(frames))
    assert len(decoded) == 5
    torch.testing.assert_close(decoded[:count], frames, rtol=0, atol=2e-6)
    torch.testing.assert_close(decoded[count:], frames[-1:].expand(5 - count, -1, -1, -1), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("factors", "channels"), [((2, 4, 4), 24), ((4, 8, 8), 96), ((4, 8, 8), 5)])
def test_encoding_inverts_decoding(factors, channels):
    codec = make(factors, channels)
    z = torch.randn(channels, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    z[~codec.is_static, 0] = 0  # the first latent frame is constant over time
    torch.testing.assert_close(codec.encode(codec.decode(z)), z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("factors", "channels"), [((4, 8, 8), 48), ((2, 4, 4), 96), ((1, 2, 2), 7)])
def test_latents_are_the_product_of_the_blocks_with_the_basis(factors, channels):
    """The separable transform equals its definition."""
    codec = make(factors, channels)
    pt, ph, pw = factors
    frames = random_frames(1 + 2 * pt, 16, 24)
    repeated = torch.cat([frames[:1]] * (pt - 1) + [frames])
    blocks = repeated.view(3, pt, 3, 16 // ph, ph, 24 // pw, pw).permute(0, 3, 5, 2, 1, 4, 6).flatten(3)
    expected = (blocks.double() @ codec.basis.double().T / codec.scale.double()).permute(3, 0, 1, 2)
    torch.testing.assert_close(codec.encode(frames).double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("size", [(16, 24), (104, 2400)])  # the second in several chunks
def test_the_stream_encoder_gives_the_bits_of_the_whole_clip(count, size):
    codec = make((4, 8, 8), 48)
    frames = random_frames(count, *size)
    whole = codec.encode(frames).permute(1, 2, 3, 0).contiguous()
    streamed = list(codec.frame_encoder.encode(frame.permute(1, 2, 0).numpy() for frame in frames))
    assert len(streamed) == codec.latent_frames(count)
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(streamed, whole, strict=True))


def test_uint8_frames_are_encoded_as_the_equivalent_float_frames():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 24, 3), dtype=np.uint8)
    codec = make((4, 8, 8), 192)
    from_floats = codec.encode(frames_to_float(torch.from_numpy(pixels))).permute(1, 2, 3, 0)
    from_bytes = torch.from_numpy(np.stack(list(codec.frame_encoder.encode(pixels))))
    torch.testing.assert_close(from_bytes, from_floats, rtol=1e-5, atol=5e-6)
    mirrored = list(codec.frame_encoder.encode(pixels[:, :, ::-1]))  # not contiguous
    assert np.array_equal(mirrored, list(codec.frame_encoder.encode(np.ascontiguousarray(pixels[:, :, ::-1]))))


def test_an_image_is_a_clip_of_one_frame():
    codec = make()
    frames = random_frames(5)
    image = codec.encode(frames[:1])
    assert image.shape == (24, 1, 2, 3)
    torch.testing.assert_close(image, codec.encode(frames)[:, :1], rtol=0, atol=1e-6)
    assert codec.decode(image).shape == (1, 3, 8, 12)


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (2, 2), (5, 2), (6, 3), (9, 3), (33, 9), (1441, 361)])
def test_one_latent_frame_for_the_first_frame_and_one_for_every_four_rounded_up(frames, latents):
    codec = make((4, 8, 8))
    assert codec.latent_frames(frames) == latents
    assert codec.num_frames(latents) == 1 + 4 * (latents - 1)
    assert codec.latent_frames(codec.num_frames(latents)) == latents


@pytest.mark.parametrize(("changed", "latent"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_frame_affects_only_its_own_latent_frame(changed, latent):
    codec = make((4, 4, 4), 48)
    frames = random_frames(9)
    before = codec.encode(frames)
    frames[changed] = -frames[changed]
    same = (before == codec.encode(frames)).all(dim=(0, 2, 3))
    assert same.tolist() == [i != latent for i in range(3)]


def test_a_grey_clip_is_one_coefficient():
    codec = make((4, 8, 8), 96)
    z = codec.encode(torch.full((9, 3, 16, 16), 0.25))
    # the mean coefficient is 0.25 sqrt(768), its divisor 0.5 sqrt(768)
    torch.testing.assert_close(z[0], torch.full_like(z[0], 0.5))
    assert z[1:].abs().max() < 1e-5


@pytest.mark.parametrize(("factors", "channels"), [((2, 4, 4), 24), ((4, 8, 8), 96)])
def test_latents_of_rendered_clips_have_about_unit_variance(factors, channels):
    codec = make(factors, channels)
    latents = []
    for index in range(30):
        spec, _ = clips.clip_at(0, "train", index)
        latents.append(codec.encode(frames_to_float(torch.from_numpy(clips.render(spec)))).flatten(1))
    z = torch.cat(latents, 1)
    assert 0.3 < float(z.std()) < 1.0
    sizes = z.square().mean(1).sqrt()  # of each channel
    assert 0.04 < float(sizes.min()) and float(sizes.max()) < 2.5


def test_fingerprints_of_different_codecs_differ():
    codecs = [make(), make(channels=25), make((4, 4, 4)), make((2, 4, 8)), make((2, 8, 4))]
    assert len({codec.fingerprint for codec in codecs}) == len(codecs)
    assert make().fingerprint == make().fingerprint


def test_sizes_that_are_not_multiples_of_the_factors_are_an_error():
    with pytest.raises(MegaSoraError, match=r"frames of 8x10 pixels are not multiples of codec.factors=4x4"):
        make().encode(random_frames(1, 8, 10))

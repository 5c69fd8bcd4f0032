"""Tiles: exact with twice the receptive field as overlap, and close to the whole frame with less."""

import random

import pytest
import torch
import torch.nn.functional as F

from megasora.codec.vae.boundary import ClipBoundary
from megasora.codec.vae.network import VideoVAE, init_weights
from megasora.codec.vae.stream import decode_stream, encode_stream
from megasora.codec.vae.tiles import Tiling, build_decoder, build_encoder, receptive_field, split_side
from megasora.config import CodecConfig, VAEConfig
from megasora.errors import MegaSoraError

VAE = VAEConfig(width=16, patch=4, multipliers=[1, 2], blocks=1)
FACTORS, CHANNELS = [4, 8, 8], 8
CHUNK = 4  # frames


def make_vae(vae: VAEConfig, factors: list[int], channels: int = CHANNELS) -> VideoVAE:
    model = VideoVAE(vae, factors, channels)
    generator = torch.Generator().manual_seed(0)
    init_weights(model, lambda name, shape: torch.randn(shape, generator=generator))
    return model


def textures(count: int, frames: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """[count, 3, frames, height, width]: smooth noise at several scales, moving."""
    clips = torch.zeros(count, 3, frames, height, width)
    for cell in (4, 8, 16, 32):
        grid = (count, 3, frames // 4 + 1, height // cell + 2, width // cell + 2)
        noise = torch.randn(grid, generator=generator) * 0.5 * (cell / 32) ** 0.5
        clips += F.interpolate(noise, (frames, height, width), mode="trilinear")
    return clips.tanh()


@pytest.fixture(scope="module")
def trained() -> VideoVAE:
    """A small network after two seconds of training on textures."""
    model, generator, steps = make_vae(VAE, FACTORS), torch.Generator().manual_seed(1), 100
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        clips = textures(4, 5, 32, 32, generator)
        result = model(clips, torch.randn(4, CHANNELS, 2, 4, 4, generator=generator))
        loss = (result.frames - clips).abs().mean() + 1e-6 * result.latents.penalty_sum / clips.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.33  # 0.48 at the start
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def whole(trained) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A clip of 9 frames [3, 9, 192, 264], its latents, and these decoded; in one pass each."""
    clip = textures(1, 9, 192, 264, torch.Generator().manual_seed(2))
    latents = trained.encode(clip)
    return clip[0], latents[0], trained.decode(latents)[0]


def settings(tile: list[int], overlap: int) -> CodecConfig:
    return CodecConfig(name="vae", factors=FACTORS, channels=CHANNELS, tile=tile, tile_overlap=overlap)


def tiled_encode(vae: VideoVAE, frames: torch.Tensor, codec: CodecConfig) -> torch.Tensor:
    coder = build_encoder(vae.encode, VAE, FACTORS, codec)
    return torch.cat(list(encode_stream(coder, frames.unbind(1), FACTORS[0], CHUNK)), dim=1)


def tiled_decode(vae: VideoVAE, latents: torch.Tensor, codec: CodecConfig) -> torch.Tensor:
    coder = build_decoder(vae.decode, VAE, FACTORS, codec)
    return torch.cat(list(decode_stream(coder, [latents], FACTORS[0], CHUNK)), dim=1)


def psnr(x: torch.Tensor, reference: torch.Tensor, peak: float) -> float:
    return (10 * torch.log10(peak**2 / (x - reference).square().mean())).item()


# ---- the whole frame


@pytest.mark.parametrize(("overlap", "decibels"), [(32, 50), (48, 60)])
def test_frames_decoded_in_tiles_and_chunks_are_close_to_the_whole(trained, whole, overlap, decibels):
    """The overlap is less than twice the receptive field, 60 pixels."""
    _, latents, expected = whole
    decoded = tiled_decode(trained, latents, settings([112, 112], overlap))
    assert not torch.equal(decoded, expected)
    assert psnr(decoded, expected, peak=2) >= decibels


@pytest.mark.parametrize(("overlap", "decibels"), [(32, 50), (48, 60)])
def test_latents_encoded_in_tiles_and_chunks_are_close_to_the_whole(trained, whole, overlap, decibels):
    """Peak: four standard deviations of the latents. The receptive field is 36 pixels."""
    frames, expected, _ = whole
    latents = tiled_encode(trained, frames, settings([112, 112], overlap))
    assert not torch.equal(latents, expected)
    assert psnr(latents, expected, peak=4 * expected.std().item()) >= decibels


def test_more_overlap_gives_less_difference(trained, whole):
    _, latents, expected = whole
    values = [psnr(tiled_decode(trained, latents, settings([112, 112], v)), expected, 2) for v in (0, 16, 32, 64)]
    assert values == sorted(values) and values[0] < 45 < values[-1]


def test_the_difference_is_at_the_seams_and_nowhere_else(trained, whole):
    """Columns of 264 pixels in tiles of 152 that share 40, [112, 152): those of one tile alone are exact."""
    _, latents, expected = whole
    difference = tiled_decode(trained, latents, settings([0, 152], 40)) - expected
    error_X = difference.abs().amax((0, 1, 2))
    margin, ramp = 15, 10  # 3/8 and 1/4 of 40
    radius = receptive_field(VAE, FACTORS).decoder
    seam = slice(112 + margin, 152 - margin)
    assert error_X[seam].min() > 1e-5 and len(error_X[seam]) == ramp
    assert error_X[: 152 - radius].max() < 1e-5 and error_X[112 + radius :].max() < 1e-5
    step_X = difference.diff(dim=-1).abs().mean((0, 1, 2))
    picture = expected.diff(dim=-1).abs().mean()  # mean difference of neighbouring columns
    assert step_X.max() < 0.1 * picture
    assert psnr(difference[..., seam], torch.zeros(()), peak=2) > 45


def test_with_twice_the_receptive_field_as_overlap_tiles_are_exact(trained, whole):
    frames, latents, decoded = whole
    codec = settings([144, 144], 2 * receptive_field(VAE, FACTORS).decoder)
    torch.testing.assert_close(tiled_decode(trained, latents, codec), decoded, rtol=1e-5, atol=1e-5)
    codec = settings([112, 112], 2 * 8 * 5)  # 36 pixels are 5 latents
    torch.testing.assert_close(tiled_encode(trained, frames, codec), latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [[0, 0], [192, 264], [1024, 1024]])
def test_a_frame_within_a_tile_is_computed_whole(trained, whole, tile):
    frames, latents, decoded = whole
    codec = settings(tile, 32)
    torch.testing.assert_close(tiled_encode(trained, frames, codec), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tiled_decode(trained, latents, codec), decoded, rtol=1e-5, atol=1e-5)


def test_chunks_change_no_value_of_tiles(trained, whole):
    frames, _, _ = whole
    codec = settings([112, 112], 32)
    one_chunk = build_encoder(trained.encode, VAE, FACTORS, codec)(frames[None])[0]
    torch.testing.assert_close(tiled_encode(trained, frames, codec), one_chunk, rtol=1e-5, atol=1e-5)


# ---- the receptive field


@pytest.mark.parametrize(
    ("vae", "factors"),
    [
        (VAE, FACTORS),
        (VAEConfig(width=4, patch=1, multipliers=[1, 1, 1], blocks=2), [1, 4, 4]),
        (VAEConfig(width=4, patch=2, multipliers=[1, 2, 2], blocks=1, time="none"), [1, 8, 8]),
    ],
)
def test_the_receptive_field_is_the_farthest_pixel_that_changes_a_value(vae, factors):
    """Positive weights and inputs: what depends on a value changes with it."""
    model, side = make_vae(vae, factors).double(), factors[1]
    for parameter in model.parameters():
        parameter.data.abs_()
    field = receptive_field(vae, factors)
    reach = -(-max(field.encoder, field.decoder) // side) + 1  # in latents
    width = (2 * reach + 1) * side
    frames = torch.ones(1, 3, 1, side, width, dtype=torch.float64)
    middle = model.encoder(frames.requires_grad_(), ClipBoundary())[..., reach].sum()
    touched = torch.autograd.grad(middle, frames)[0][0].abs().amax((0, 1, 2)).nonzero().flatten()
    assert touched.min() == reach * side - field.encoder
    assert touched.max() == (reach + 1) * side - 1 + field.encoder

    latents = torch.ones(1, CHANNELS, 1, 1, 2 * reach + 1, dtype=torch.float64).requires_grad_()
    decoded = model.decoder(latents, ClipBoundary())
    for pixel in (reach * side + field.decoder - 1, reach * side + field.decoder):
        gradient = torch.autograd.grad(decoded[..., pixel].sum(), latents, retain_graph=True)[0]
        first = gradient[0].abs().amax((0, 1, 2)).nonzero().min()
        assert (first < reach) == (pixel < reach * side + field.decoder)  # whether it sees beyond the edge at `reach`


# ---- the plan


def test_tiles_cover_every_position_with_weights_that_sum_to_1():
    draw = random.Random(0)
    for _ in range(300):
        length, tile, scale, radius = draw.randint(1, 80), draw.randint(1, 40), draw.choice([1, 4]), draw.randint(0, 40)
        overlap = draw.randint(0, tile - 1)
        spans = split_side(length, tile, overlap, scale, radius)
        total = torch.zeros(length * scale, dtype=torch.float64)
        for span in spans:
            assert span.stop - span.start <= tile and len(span.weights) == (span.stop - span.start) * scale
            assert span.weights.min() >= 0
            total[span.slice(scale)] += span.weights
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
        assert spans[0].start == 0 and spans[-1].stop == length
        for left, right in zip(spans, spans[1:], strict=False):
            assert left.stop - right.start >= overlap
            if (left.stop - right.start) * scale >= 2 * radius:
                assert not left.weights[len(left.weights) - radius :].any() and not right.weights[:radius].any()


def test_tiles_have_one_size_and_no_more_than_are_needed():
    spans = split_side(length=100, tile=40, overlap=8, scale=1, radius=4)
    assert [(span.start, span.stop) for span in spans] == [(0, 39), (30, 69), (61, 100)]
    assert len(split_side(40, 40, 8, 1, 4)) == 1 and len(split_side(41, 40, 8, 1, 4)) == 2


def test_a_tile_is_rounded_down_to_whole_latents_and_the_overlap_up():
    assert Tiling.of(settings([511, 0], 65), 8) == Tiling((63, 0), 9)
    assert Tiling.of(settings([5, 8], 0), 8) == Tiling((1, 1), 0)


def test_an_overlap_as_large_as_a_tile_is_an_error():
    message = r"codec.tile_overlap=60 must be less than codec.tile=\[128, 64\].* 8 of 8; use at most 56$"
    with pytest.raises(MegaSoraError, match=message):
        Tiling.of(settings([128, 64], 60), 8)
    assert Tiling.of(settings([128, 64], 56), 8) == Tiling((16, 8), 7)

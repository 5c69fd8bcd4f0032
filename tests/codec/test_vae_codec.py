"""VAECodec: the network of a codec folder with normalised latents, for clips of any length, in chunks and tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megasora.codec import build_codec
from megasora.codec.vae.codec import VAECodec
from megasora.config import CodecConfig
from megasora.data.patches import frames_to_float
from megasora.errors import MegaSoraError
from megasora.testing.codecs import write_random_codec

FACTORS = {"kl": (2, 4, 4), "image": (1, 4, 4), "long": (8, 4, 4), "fsq": (2, 4, 4), "vq": (2, 4, 4)}
SETTINGS = {"image": {"time": "none"}, "fsq": {"kind": "fsq", "fsq_levels": [8, 8, 5, 5]},
            "vq": {"kind": "vq", "codebook_size": 16}}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("codecs")
    for name, factors in FACTORS.items():
        write_random_codec(root / name, factors, 4, **SETTINGS.get(name, {}))
    return root


@pytest.fixture(scope="module")
def codec(folders) -> VAECodec:
    return build_codec(CodecConfig(name="vae", path=str(folders / "kl")))


def random_bytes(count: int, height: int = 12, width: int = 8) -> np.ndarray:
    """uint8 [F, H, W, 3]"""
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8)


def whole_clip(codec: VAECodec, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction by the network alone: the whole clip at once, its last frame repeated."""
    missing = -(len(frames) - 1) % codec.factors[0]
    clip = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]).transpose(0, 1)[None]
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (codec.manifest.mean, codec.manifest.std))
    z = codec.network.encode(clip)
    return ((z - mean) / std)[0], codec.network.decode(z)[0].transpose(0, 1)


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("chunk_frames", [1, 4, 1000])
def test_chunks_of_any_length_give_what_the_network_makes_of_the_whole_clip(name, chunk_frames, folders):
    codec = build_codec(CodecConfig(name="vae", path=str(folders / name), chunk_frames=chunk_frames))
    for count in (1, 2, 6, 9, 13):
        frames = frames_to_float(torch.from_numpy(random_bytes(count)))
        expected, reconstruction = whole_clip(codec, frames)
        latents = codec.encode(frames)
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(codec.decode(latents), reconstruction, rtol=0, atol=1e-5)
        assert latents.shape[1] == codec.latent_frames(count)
        assert len(reconstruction) == codec.num_frames(codec.latent_frames(count)) >= count


def test_latents_are_normalised_by_mean_and_std_of_each_channel(codec):
    frames = frames_to_float(torch.from_numpy(random_bytes(5)))
    raw = codec.network.encode(frames.transpose(0, 1)[None])[0]
    for channel, z in enumerate(codec.encode(frames)):
        torch.testing.assert_close(z * (0.5 + 0.25 * channel) + 0.1 * channel, raw[channel], rtol=0, atol=1e-5)


def test_streams_of_frames_and_latents_are_those_of_the_whole_clip(codec):
    pixels = random_bytes(20)
    frames = frames_to_float(torch.from_numpy(pixels))
    latents = codec.encode(frames)
    for source in (pixels, frames.permute(0, 2, 3, 1).contiguous().numpy()):
        streamed = list(codec.encode_frames(source))
        assert streamed[0].dtype == np.float32 and len(streamed) == codec.latent_frames(20)
        np.testing.assert_allclose(np.stack(streamed), latents.permute(1, 2, 3, 0), rtol=0, atol=1e-5)
    decoded = np.stack(list(codec.decode_latents(streamed)))
    np.testing.assert_allclose(decoded, codec.decode(latents).permute(0, 2, 3, 1), rtol=0, atol=1e-5)


def test_frames_and_latents_are_read_a_chunk_at_a_time(folders):
    codec = build_codec(CodecConfig(name="vae", path=str(folders / "kl"), chunk_frames=4))
    read = []

    def recorded(items):
        for item in items:
            read.append(item)
            yield item

    latents = codec.encode_frames(recorded(random_bytes(60)))
    next(latents)
    assert len(read) == 5  # 1 + 4
    first = [next(latents) for _ in range(9)]
    assert len(read) <= 5 + 5 * 4
    read.clear()
    next(codec.decode_latents(recorded(first)))
    assert len(read) == 3  # 1 + 4 / 2


def test_tiles_differ_little_from_the_whole_frame_and_only_where_a_frame_is_larger_than_a_tile(folders):
    settings = {"name": "vae", "path": str(folders / "kl")}
    whole = build_codec(CodecConfig(**settings, tile=[0, 0]))
    tiled = build_codec(CodecConfig(**settings, tile=[64, 64], tile_overlap=16))
    large, small = (frames_to_float(torch.from_numpy(random_bytes(3, *size))) for size in ((96, 64), (64, 64)))
    assert torch.equal(tiled.encode(small), whole.encode(small))
    expected = whole.encode(large)
    error = (tiled.encode(large) - expected).abs()
    assert error.max() > 0 and error.square().mean().sqrt() < 0.1 * expected.std()
    z = torch.randn(4, 2, 24, 16, generator=torch.Generator().manual_seed(0))
    frames = whole.decode(z)
    error = (tiled.decode(z) - frames).square().mean().sqrt()
    assert 0 < error < 0.1 * frames.std()


def test_a_frame_that_is_not_whole_latents_is_an_error(codec):
    for size in ((13, 8), (12, 9)):
        with pytest.raises(MegaSoraError, match=rf"frames of {size[0]}x{size[1]} pixels are not multiples of .*=4x4"):
            codec.encode(frames_to_float(torch.from_numpy(random_bytes(1, *size))))
        with pytest.raises(MegaSoraError, match="not multiples"):
            list(codec.encode_frames(random_bytes(1, *size)))


def test_the_dtype_is_that_of_the_input_and_read_only_frames_are_accepted(codec):
    frames = frames_to_float(torch.from_numpy(random_bytes(3))).double()
    assert codec.encode(frames).dtype == codec.decode(codec.encode(frames)).dtype == torch.float64
    pixels = random_bytes(3)
    expected = np.stack(list(codec.encode_frames(pixels)))
    pixels.flags.writeable = False
    assert np.array_equal(np.stack(list(codec.encode_frames(pixels[:, ::-1][:, ::-1]))), expected)


def test_the_network_is_frozen(codec):
    assert not any(parameter.requires_grad for parameter in codec.network.parameters())
    assert not codec.network.training and not codec.encode(torch.zeros(1, 3, 8, 8)).requires_grad


def test_streams_of_dct_are_those_of_the_whole_clip():
    codec = build_codec(CodecConfig(factors=[2, 4, 4], channels=24))
    pixels = random_bytes(6)
    latents = codec.encode(frames_to_float(torch.from_numpy(pixels)))
    streamed = list(codec.encode_frames(pixels))
    np.testing.assert_allclose(np.stack(streamed), latents.permute(1, 2, 3, 0), rtol=0, atol=1e-5)
    decoded = np.stack(list(codec.decode_latents(streamed)))
    np.testing.assert_allclose(decoded, codec.decode(latents).permute(0, 2, 3, 1), rtol=0, atol=1e-5)

"""Encoding and decoding in chunks gives what the whole clip gives, with memory for one chunk."""

import gc
import random
import weakref

import pytest
import torch
from torch import nn

from megasora.codec.vae.boundary import ClipBoundary
from megasora.codec.vae.layers import CausalConv3d
from megasora.codec.vae.network import VideoVAE
from megasora.codec.vae.stream import ChunkBoundary, ChunkCoder, decode_stream, encode_stream, groups
from megasora.config import VAEConfig

FT, FS = (1, 2, 4, 8), (4, 8, 16, 32)


def draw_weights(model: nn.Module, seed: int = 0) -> None:
    """Weights that keep the variance, whatever the initial values of training are."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1)


def make_vae(vae: VAEConfig, factors: list[int], channels: int = 4, seed: int = 0) -> VideoVAE:
    model = VideoVAE(vae, factors, channels).eval()
    draw_weights(model, seed)
    return model


def draw_network(draw: random.Random, ft: int, fs: int) -> VideoVAE:
    """Any patch, widths and number of blocks that the factors allow."""
    patch = draw.choice([p for p in (1, 2, 4, 8) if p <= fs])
    steps = (fs // patch).bit_length() - 1
    multipliers = [1]
    for _ in range(steps):
        multipliers.append(multipliers[-1] * draw.choice([1, 2]) if multipliers[-1] < 4 else 4)
    vae = VAEConfig(
        time="none" if ft == 1 and draw.random() < 0.5 else "causal",
        patch=patch,
        width=4,
        decoder_width=draw.choice([0, 8]),
        multipliers=multipliers,
        blocks=draw.choice([1, 2]),
    )
    return make_vae(vae, [ft, fs, fs], seed=draw.randrange(1000))


def random_frames(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, count, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def assert_equal(x: torch.Tensor, reference: torch.Tensor) -> None:
    """Up to 1e-5 of the largest value."""
    torch.testing.assert_close(x, reference, rtol=0, atol=1e-5 * reference.abs().max().item())


def encode(vae: VideoVAE, frames: torch.Tensor, chunk_frames: int) -> torch.Tensor:
    coder = ChunkCoder(vae.encode)
    return torch.cat(list(encode_stream(coder, frames.unbind(1), vae.factors[0], chunk_frames)), dim=1)


def decode(vae: VideoVAE, latents: torch.Tensor, chunk_frames: int) -> torch.Tensor:
    return torch.cat(list(decode_stream(ChunkCoder(vae.decode), [latents], vae.factors[0], chunk_frames)), dim=1)


@pytest.mark.parametrize("fs", FS)
@pytest.mark.parametrize("ft", FT)
def test_any_chunk_gives_the_latents_and_frames_of_the_whole_clip(ft, fs):
    """Random networks, lengths and sizes; chunks of one latent frame, of a random number, and the whole clip."""
    draw = random.Random(100 * ft + fs)
    for _ in range(2):
        vae = draw_network(draw, ft, fs)
        latent_frames = draw.randint(1, 5)
        frames = random_frames(1 + (latent_frames - 1) * ft, fs * draw.randint(1, 2), fs * draw.randint(1, 2))
        with torch.no_grad():
            expected = vae.encode(frames[None])[0]
            decoded = vae.decode(expected[None])[0]
        assert expected.shape[1] == latent_frames and decoded.shape == frames.shape
        assert expected.std() > 0.1 and decoded.std() > 0.1
        for chunk_frames in {1, ft * draw.randint(1, 3), frames.shape[1] + 1}:
            assert_equal(encode(vae, frames, chunk_frames), expected)
            assert_equal(decode(vae, expected, chunk_frames), decoded)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 12])
@pytest.mark.parametrize("chunk_frames", [4, 8])
def test_the_last_frame_is_repeated_to_fill_its_latent_frame(count, chunk_frames):
    vae = make_vae(VAEConfig(width=4, patch=2, multipliers=[1, 2], blocks=1), [4, 4, 4])
    frames = random_frames(count, 8, 12)
    filled = torch.cat([frames, frames[:, -1:].expand(-1, (1 - count) % 4, -1, -1)], dim=1)
    with torch.no_grad():
        expected = vae.encode(filled[None])[0]
    assert_equal(encode(vae, frames, chunk_frames), expected)


def test_latents_may_come_in_pieces_of_any_length():
    vae = make_vae(VAEConfig(width=4, patch=2, multipliers=[1, 2], blocks=1), [4, 4, 4])
    latents = torch.randn(4, 7, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents[None])[0]
    pieces = latents.split([2, 1, 4], dim=1)
    decoded = torch.cat(list(decode_stream(ChunkCoder(vae.decode), pieces, 4, 8)), dim=1)
    assert_equal(decoded, expected)


def test_the_first_chunk_has_one_more_than_the_others():
    items = [torch.tensor(i) for i in range(12)]
    assert [len(group) for group in groups(iter(items), 4)] == [5, 4, 3]
    assert [len(group) for group in groups(iter(items[:5]), 4)] == [5]
    assert [len(group) for group in groups(iter(items[:1]), 4)] == [1]
    assert list(groups(iter([]), 4)) == []


@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (1, 1)])
def test_a_chunk_of_fewer_frames_than_the_kernel_looks_back(kernel):
    """One convolution, chunks of one frame: the frames kept come from several chunks."""
    layer = CausalConv3d(2, 3, kernel)
    draw_weights(layer)
    x = torch.randn(1, 2, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    boundary, results = ChunkBoundary(), []
    for chunk in x.split([1, 1, 3, 1], dim=2):
        results.append(layer(chunk, boundary).detach())
        boundary.next_chunk()
    assert_equal(torch.cat(results, dim=2), layer(x, ClipBoundary()).detach())


def test_two_clips_do_not_share_frames():
    vae = make_vae(VAEConfig(width=4, patch=2, multipliers=[1, 2], blocks=1), [2, 4, 4])
    frames = random_frames(5, 8, 8)
    first = encode(vae, frames, 2)
    encode(vae, random_frames(5, 8, 8, seed=1), 2)
    assert torch.equal(encode(vae, frames, 2), first)


def test_what_is_kept_of_a_chunk_is_the_last_frames_of_each_convolution_and_nothing_else():
    """Its bytes are counted, and no storage of a chunk outlives it."""
    vae = make_vae(VAEConfig(width=4, patch=2, multipliers=[1, 2], blocks=1), [2, 4, 4])
    coder, storages = ChunkCoder(vae.encode), []
    for size in (9, 8, 16, 2):
        chunk = random_frames(size, 8, 12)[None]
        storages.append(weakref.ref(chunk.untyped_storage()))
        coder(chunk)
        del chunk
        kept = coder.boundary.last_frames
        half, quarter = 4 * 6, 2 * 3  # positions
        inputs = [3 * 4 * half, *[4 * half] * 2, *[8 * quarter] * 3]  # conv_in; stages of 4 and 8 channels; conv_out
        assert sorted(x.untyped_storage().nbytes() for x in kept.values()) == sorted(2 * 4 * n for n in inputs)
        assert not any(x.requires_grad for x in kept.values())
    gc.collect()
    assert all(ref() is None for ref in storages)


def test_frames_are_taken_from_the_iterator_only_when_their_chunk_is_due():
    vae = make_vae(VAEConfig(width=4, patch=4, multipliers=[1], blocks=1), [2, 4, 4])
    taken = []

    def frames():
        for index in range(20):
            taken.append(index)
            yield torch.zeros(3, 4, 4)

    stream = encode_stream(ChunkCoder(vae.encode), frames(), 2, 4)
    for expected in (5, 9, 13):
        next(stream)
        assert len(taken) == expected


def test_the_frames_of_a_chunk_are_in_memory_once():
    """While the network runs, the chunk is, and the frames that it was made of are not."""
    frames, alive = [], []

    def source():
        for _ in range(9):
            frame = torch.zeros(3, 4, 4)
            frames.append(weakref.ref(frame))
            yield frame
            del frame

    def coder(chunk):
        alive.append(sum(ref() is not None for ref in frames))
        return chunk

    list(encode_stream(coder, source(), 2, 4))
    assert alive == [1, 1]  # the last one, which the iteration holds

"""Pixels to floats, latents to patches, and their inverses."""

import pytest
import torch

from megasora.batch import grid_coords
from megasora.data.patches import frames_to_float, frames_to_uint8, pad_frames, patchify, unpatchify


def test_every_byte_survives_the_conversion_to_float_and_back():
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    floats = frames_to_float(frames)
    assert floats.shape == (2, 3, 16, 16) and float(floats.min()) == -1 and float(floats.max()) == 1
    assert torch.equal(frames_to_uint8(floats), frames)


def test_values_outside_of_the_range_are_clamped():
    values = torch.tensor([-3.0, -1.001, 1.001, 7.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert frames_to_uint8(values)[0, ..., 0].flatten().tolist() == [0, 0, 255, 255]


def test_padding_repeats_the_last_row_and_column_and_changes_nothing_else():
    frames = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    padded = pad_frames(frames, (4, 8))
    assert padded.shape == (2, 3, 8, 8)
    assert torch.equal(padded[..., :5, :6], frames)
    assert torch.equal(padded[..., 5:, :6], frames[..., 4:5, :].expand(2, 3, 3, 6))
    assert torch.equal(padded[..., 6:], padded[..., 5:6].expand(2, 3, 8, 2))


def test_sizes_that_are_multiples_are_not_padded():
    frames = torch.rand(1, 3, 8, 16)
    assert pad_frames(frames, (4, 8)) is frames


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 1, 3), (1, 4, 6)])
def test_unpatchify_is_the_inverse_of_patchify(patch):
    latents = torch.randn(5, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    patches, grid = patchify(latents, patch)
    assert grid == (4 // patch[0], 8 // patch[1], 12 // patch[2])
    assert patches.shape == (grid[0] * grid[1] * grid[2], 5 * patch[0] * patch[1] * patch[2])
    assert torch.equal(unpatchify(patches, grid, patch), latents)


def test_a_patch_is_the_block_of_latents_at_its_coords():
    patch = (1, 2, 3)
    latents = torch.randn(5, 3, 4, 9, generator=torch.Generator().manual_seed(0))
    patches, grid = patchify(latents, patch)
    for values, (t, h, w) in zip(patches, grid_coords(grid).tolist(), strict=True):
        assert torch.equal(values.view(5, 1, 2, 3), latents[:, t : t + 1, 2 * h : 2 * h + 2, 3 * w : 3 * w + 3])


def test_a_latent_frame_is_contiguous():
    patches, (t, h, w) = patchify(torch.arange(3.0).view(1, 3, 1, 1).expand(2, 3, 4, 6), (1, 2, 2))
    assert (patches == torch.arange(3.0).repeat_interleave(h * w)[:, None]).all() and t == 3

"""3D rotary embedding: turns pairs by angles that are linear in the coords."""

import pytest
import torch

from megasora.model.rope import apply_rope, rope_angles, rope_split

BASE = 10_000.0


def rotate(x_LNK, coords_L3):
    angles = rope_angles(coords_L3, x_LNK.shape[-1], BASE)[:, None]
    return apply_rope(x_LNK, angles.cos(), angles.sin())


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("head_dim", [*range(6, 66, 2), 72, 80, 96, 104, 112, 128, 192, 256])
def test_split_is_even_and_whole_for_every_even_head_dim(head_dim):
    split = rope_split(head_dim)
    assert sum(split) == head_dim
    assert all(dim > 0 and dim % 2 == 0 for dim in split)
    assert rope_angles(torch.zeros(1, 3), head_dim, BASE).shape == (1, head_dim // 2)


def test_split_of_128_is_the_one_of_wan():
    assert rope_split(128) == (44, 42, 42)


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, 5, 0), (0, 0, 9), (7, 3, 20)])
def test_rotation_depends_only_on_relative_position(shift):
    coords = torch.randint(0, 40, (10, 3), generator=torch.Generator().manual_seed(0))
    q, k = random(10, 2, 24), random(10, 2, 24, seed=1)

    def products(c):
        return torch.einsum("qnk,snk->nqs", rotate(q, c), rotate(k, c))

    torch.testing.assert_close(products(coords), products(coords + torch.tensor(shift)), rtol=0, atol=2e-4)
    assert not torch.allclose(products(coords), products(coords * 2), atol=1e-1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_axis_turns_its_own_part_of_the_head(axis):
    coords = torch.zeros(1, 3, dtype=torch.int32)
    coords[0, axis] = 3
    split = rope_split(24)
    angles = rope_angles(coords, 24, BASE)[0]
    first = sum(split[:axis]) // 2
    own = slice(first, first + split[axis] // 2)
    expected = torch.zeros(12)
    expected[own] = 3 * BASE ** -(torch.arange(0, split[axis], 2) / split[axis])
    torch.testing.assert_close(angles, expected)


def test_one_step_in_time_turns_the_first_pair_by_one_radian():
    x = torch.zeros(1, 1, 24, dtype=torch.float64)
    x[..., 0] = 1
    turned = rotate(x, torch.tensor([[1, 0, 0]]))[0, 0]
    expected = torch.tensor([0.5403023058681398, 0.8414709848078965], dtype=torch.float64)
    torch.testing.assert_close(turned[:2], expected, rtol=1e-7, atol=0)
    assert (turned[2:] == 0).all()


def test_length_is_kept_and_the_origin_does_not_turn():
    x = random(10, 2, 24)
    coords = torch.randint(0, 1000, (10, 3), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x, coords).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(rotate(x, torch.zeros(10, 3)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_products_are_at_least_fp32(dtype):
    x, coords = random(4, 1, 12).to(dtype), torch.tensor([[0, 1, 2], [3, 1, 0], [9, 9, 9], [1, 0, 0]])
    out = rotate(x, coords)
    assert out.dtype == dtype
    torch.testing.assert_close(out, rotate(x.double(), coords).to(dtype), rtol=1e-6, atol=1e-6)

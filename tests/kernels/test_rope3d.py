"""3D rotary embedding: properties of the rotation, and agreement with the reference in float64."""

import pytest
import torch
from agreement import (
    ROPE_BASE,
    TRITON_DEVICE,
    assert_agrees,
    build_rope,
    each_backend,
    each_variant,
    normal,
    outputs_and_gradients,
    random_coords,
    saved_bytes,
)
from guard_zones import guard_zones

from megasora.kernels.rope3d import Rope, rope3d, rope3d_reference, rope_split, rotate_triton

SIZES = {  # L, N, K
    "head dim 64": (9, 6, 64),
    "head dim 96": (5, 3, 96),
    "head dim 128": (3, 5, 128),
    "heads in five chunks, the last partly filled": (3, 17, 12),
    "one token": (1, 1, 12),
    "tokens of several programs": (70, 2, 16),
    "no token": (0, 2, 16),
    "no head": (4, 0, 16),
}


def rotated(x_LNK, coords_L3, **options):
    return rope3d(x_LNK, Rope.build(coords_L3, x_LNK.shape[-1], ROPE_BASE, **options))


@pytest.mark.parametrize("head_dim", [*range(6, 66, 2), 72, 80, 96, 104, 112, 128, 192, 256])
def test_split_is_even_and_complete_for_every_even_head_dim(head_dim):
    split = rope_split(head_dim)
    assert sum(split) == head_dim
    assert all(size > 0 and size % 2 == 0 for size in split)
    assert build_rope(1, head_dim).rotation.shape == (1, 1, head_dim // 2)


def test_split_of_128_is_that_of_wan():
    assert rope_split(128) == (44, 42, 42)


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, 5, 0), (0, 0, 9), (7, 3, 20), (0.25, 0.5, -3.0)], ids=str)
def test_rotation_depends_only_on_relative_position(shift):
    coords = random_coords(10)
    q, k = normal(10, 2, 24), normal(10, 2, 24, seed=1)

    def products(c):
        return torch.einsum("qnk,snk->nqs", rotated(q, c), rotated(k, c))

    torch.testing.assert_close(products(coords), products(coords + torch.tensor(shift)), rtol=0, atol=2e-4)
    assert not torch.allclose(products(coords), products(coords * 2), atol=1e-1)


@pytest.mark.parametrize("split", [None, (12, 6, 6), (0, 12, 12), (4, 18, 2)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_axis_rotates_its_own_pairs(axis, split):
    coords = torch.zeros(1, 3, dtype=torch.int32)
    coords[0, axis] = 3
    rope = Rope.build(coords, 24, ROPE_BASE, split)
    first, size = sum(rope.split[:axis]) // 2, rope.split[axis]
    expected = torch.zeros(12)
    expected[first : first + size // 2] = 3 * ROPE_BASE ** -(torch.arange(0, size, 2) / max(size, 1))
    torch.testing.assert_close(rope.rotation[0, 0].angle(), expected)


@each_backend
def test_one_step_in_time_rotates_the_first_pair_by_one_radian(backend):
    x = torch.zeros(1, 1, 24, device=TRITON_DEVICE)
    x[..., 0] = 1
    out = rope3d(x, Rope.build(torch.tensor([[1, 0, 0]]), 24, ROPE_BASE, device=TRITON_DEVICE), backend).cpu()[0, 0]
    torch.testing.assert_close(out[:2], torch.tensor([0.5403023058681398, 0.8414709848078965]), rtol=1e-6, atol=0)
    assert (out[2:] == 0).all()


@each_backend
def test_rotation_preserves_length_and_leaves_the_origin_unchanged(backend):
    x = normal(10, 2, 24).float().to(TRITON_DEVICE)
    far, origin = (
        Rope.build(c, 24, ROPE_BASE, device=TRITON_DEVICE) for c in (random_coords(10, 1000), torch.zeros(10, 3))
    )
    torch.testing.assert_close(rope3d(x, far, backend).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(rope3d(x, origin, backend), x)


@pytest.mark.parametrize("far, tolerance", [(100, 3e-7), (10_000, 3e-7), (100_000, 2e-6)])
def test_kernel_is_accurate_for_large_angles(far, tolerance):
    """Positive and negative positions, against cos and sin in float64 of the fp32 angle."""
    position = (torch.rand(64, generator=torch.Generator().manual_seed(0)) * 2 - 1) * far
    coords = torch.stack((position, torch.zeros(64), torch.zeros(64)), 1)
    rope = Rope.build(coords, 64, ROPE_BASE, (64, 0, 0), device=TRITON_DEVICE)
    ones = torch.zeros(64, 1, 32, 2)
    ones[..., 0] = 1
    actual = rope3d(ones.flatten(-2).to(TRITON_DEVICE), rope, "triton").cpu().view(64, 32, 2)
    angle = (position[:, None] * rope.frequency_P.cpu()).double()
    torch.testing.assert_close(actual.double(), torch.stack((angle.cos(), angle.sin()), -1), rtol=0, atol=tolerance)


def test_the_ntk_factor_keeps_the_fastest_pair_and_divides_the_frequency_of_the_slowest():
    unscaled, scaled = (build_rope(1, 24, split=(12, 10, 2), scale=s).frequency_P for s in ((1, 1, 1), (4, 1.5, 3)))
    ratio = unscaled / scaled
    torch.testing.assert_close(ratio[[0, 5, 6, 10, 11]], torch.tensor([1, 4, 1, 1.5, 3]))
    assert (ratio[:6].diff() > 0).all() and (ratio[6:11].diff() > 0).all()


def test_the_ntk_factor_equals_a_larger_base():
    scaled = build_rope(1, 24, split=(24, 0, 0), scale=(4, 1, 1)).frequency_P
    larger = Rope.build(torch.zeros(1, 3), 24, ROPE_BASE * 4 ** (24 / 22), (24, 0, 0)).frequency_P
    torch.testing.assert_close(scaled, larger)


@each_variant
@pytest.mark.parametrize("size", SIZES)
def test_output_and_gradient_equal_the_reference(size, backend, device, dtype):
    num_tokens, num_heads, head_dim = SIZES[size]
    rope, cpu_rope = build_rope(num_tokens, head_dim, device), build_rope(num_tokens, head_dim)
    assert_agrees(
        lambda x: rope3d(x, rope, backend),
        lambda x: rope3d_reference(x, cpu_rope),
        [normal(num_tokens, num_heads, head_dim)],
        device,
        dtype,
    )


@each_variant
def test_fractional_positions_and_any_split_equal_the_reference(backend, device, dtype):
    coords = torch.rand(9, 3, generator=torch.Generator().manual_seed(0)) * 30 - 10
    options = 24, ROPE_BASE, (2, 22, 0), (2.0, 1.5, 1.0)
    rope, cpu_rope = Rope.build(coords, *options, device=device), Rope.build(coords, *options)
    x = normal(9, 2, 24)
    assert_agrees(lambda x: rope3d(x, rope, backend), lambda x: rope3d_reference(x, cpu_rope), [x], device, dtype)


@each_variant
def test_inputs_need_not_be_contiguous(backend, device, dtype):
    """Heads of a fused projection; heads before tokens; every second element."""
    rope, cpu_rope = build_rope(7, 24, device), build_rope(7, 24)
    views = {
        (7, 3, 2, 24): lambda wide: wide[:, 1],
        (2, 7, 24): lambda wide: wide.transpose(0, 1),
        (7, 2, 48): lambda wide: wide[..., 1::2],
    }
    for shape, view in views.items():
        assert_agrees(
            lambda wide, view=view: rope3d(view(wide), rope, backend),
            lambda wide, view=view: rope3d_reference(view(wide), cpu_rope),
            [normal(*shape)],
            device,
            dtype,
        )


def test_gradient_of_the_reference_equals_finite_differences():
    rope = build_rope(3, 12)
    assert torch.autograd.gradcheck(lambda x: rope3d_reference(x, rope), normal(3, 2, 12).requires_grad_())


@each_backend
def test_nothing_is_saved(backend):
    rope = build_rope(40, 16, TRITON_DEVICE)
    x = normal(40, 2, 16).float().to(TRITON_DEVICE)
    assert not saved_bytes(lambda x: rope3d(x, rope, backend), [x])


@pytest.mark.parametrize("size", SIZES)
def test_kernel_writes_all_of_its_output_and_nothing_else(size):
    num_tokens, num_heads, head_dim = SIZES[size]
    rope, x = build_rope(num_tokens, head_dim, TRITON_DEVICE), normal(num_tokens, num_heads, head_dim).float()
    with guard_zones():
        rotate_triton(x.to(TRITON_DEVICE), rope.coords_L3, rope.frequency_P, rope.split, False)


@each_backend
def test_it_compiles_as_one_graph(backend):
    torch._dynamo.reset()
    x = normal(9, 2, 12).float().to(TRITON_DEVICE)

    def eager(x, rope):
        return rope3d(x * 2, rope, backend).sin()

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for seed in range(2):  # the second with other angles
        rope = Rope.build(random_coords(9, seed=seed), 12, ROPE_BASE, device=TRITON_DEVICE)
        actual, expected = (outputs_and_gradients(lambda x, f=f, r=rope: f(x, r), [x]) for f in (compiled, eager))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_operator_passes_opcheck():
    rope = build_rope(5, 12, TRITON_DEVICE)
    x = normal(5, 2, 12).float().to(TRITON_DEVICE)
    torch.library.opcheck(rotate_triton, (x, rope.coords_L3, rope.frequency_P, rope.split, False))


@each_backend
def test_meta_tensors_give_shapes_and_dtypes(backend):
    x = torch.empty(9, 2, 12, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = rope3d(x, build_rope(9, 12, "meta"), backend)
    y.sum().backward()
    assert (y.shape, y.dtype, x.grad.shape) == (x.shape, x.dtype, x.shape)


def test_invalid_arguments_raise():
    coords, x = torch.zeros(5, 3), torch.zeros(5, 2, 12)
    rope = Rope.build(coords, 12, ROPE_BASE)
    with pytest.raises(ValueError, match=r"coords \(5, 2\) of torch.float32 must be real, \[L, 3\]"):
        Rope.build(coords[:, :2], 12, ROPE_BASE)
    with pytest.raises(ValueError, match=r"split=\(4, 4, 2\) must be three even numbers that add up to head_dim=12"):
        Rope.build(coords, 12, ROPE_BASE, (4, 4, 2))
    with pytest.raises(ValueError, match=r"split=\(3, 3, 6\) must be three even"):
        Rope.build(coords, 12, ROPE_BASE, (3, 3, 6))
    with pytest.raises(ValueError, match=r"head_dim=13"):
        Rope.build(coords, 13, ROPE_BASE)
    with pytest.raises(ValueError, match=r"scale=\(1.0, 0.0, 1.0\) must be three numbers above 0"):
        Rope.build(coords, 12, ROPE_BASE, scale=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="base=0 must be above 0"):
        Rope.build(coords, 12, 0)
    with pytest.raises(ValueError, match=r"x \(4, 2, 12\) must have the 5 tokens of coords \(5, 3\)"):
        rope3d(x[:4], rope)
    with pytest.raises(ValueError, match=r"x \(5, 2, 10\) must have .* head dim 12 = 4 \+ 4 \+ 4"):
        rope3d(x[..., :10], rope)
    with pytest.raises(ValueError, match=r"x \(5, 24\) of torch.float32 must be floating point \[L, N, K\]"):
        rope3d(x.flatten(1), rope)
    with pytest.raises(ValueError, match="of torch.int64 must be"):
        rope3d(x.long(), rope)
    with pytest.raises(ValueError, match="x on meta, rope on cpu"):
        rope3d(x.to("meta"), rope)
    with pytest.raises(ValueError, match="takes no float64"):
        rope3d(x.double(), rope, backend="triton")

"""Keys of clips: equal to a computation with unbounded integers, and their noise is independent."""

import pytest
import torch

from megasora.diffusion.noise import clip_keys
from megasora.random_numbers import normal, uniform

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
N = 200_000


def splitmix(z: int) -> int:
    """The finaliser as published, on unbounded integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def elements(seed=0, step=0, sample=0, stream=0, count=N):
    """The first `count` normals of one clip."""
    keys = clip_keys(seed, step, torch.tensor([sample]), stream)
    return normal(keys, torch.zeros(1, dtype=torch.int64), count)[0]


def test_keys_and_uniforms_equal_a_computation_with_unbounded_integers():
    seed, step, stream, samples = 5, -2, 3, [0, 7, 2**40]
    keys = clip_keys(seed, step, torch.tensor(samples), stream)
    for key, u, sample in zip(keys.tolist(), uniform(keys).tolist(), samples, strict=True):
        expected = 0
        for part in (stream, seed, step, sample):
            expected = splitmix((expected + (part + 1) * GOLDEN) & MASK)
        assert key & MASK == expected
        assert u == ((splitmix(expected) >> 11) + 0.5) * 2.0**-53


def test_keys_of_different_uses_differ():
    parts = [(s, t, i, u) for s in range(4) for t in (-2, -1, 0, 1, 2) for i in range(20) for u in range(5)]
    keys = {int(clip_keys(s, t, torch.tensor([i]), u)) for s, t, i, u in parts}
    assert len(keys) == len(parts)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"step": 1}, {"step": -1}, {"sample": 1}, {"sample": 1 << 33}, {"stream": 1}]
)
def test_noise_of_another_clip_step_stream_or_seed_is_independent(other):
    a, b = elements().double(), elements(**other).double()
    for x, y in ((a, b), (a[1:], b[:-1]), (a[:-1], b[1:]), (a**2 - 1, b**2 - 1)):
        correlation = (x * y).mean() / (x.std() * y.std())
        assert abs(float(correlation)) < 4 / N**0.5

"""Counter-based random numbers: bit-exact SplitMix64, statistics of a normal, and any slice without the rest."""

import pytest
import torch

from megasora.diffusion import noise

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
N = 200_000


def splitmix(z: int) -> int:
    """The finaliser as published, on unbounded integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def unsigned(values: torch.Tensor) -> list[int]:
    return [int(v) & MASK for v in values.flatten()]


def elements(seed=0, step=0, sample=0, stream=0, count=N):
    """The first `count` normals of one clip."""
    keys = noise.clip_keys(seed, step, torch.tensor([sample]), stream)
    return noise.normal(keys, torch.zeros(1, dtype=torch.int64), count)[0]


def test_finaliser_equals_the_published_one():
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**63), 2**63 - 1, (500,), generator=generator).tolist()
    values = [0, 1, -1, 2**63 - 1, -(2**63), 2**62, *random]
    assert unsigned(noise.mix(torch.tensor(values))) == [splitmix(v & MASK) for v in values]


def test_sequence_of_state_zero_is_the_published_one():
    states = torch.tensor([signed((i * GOLDEN) & MASK) for i in (1, 2, 3)])
    assert unsigned(noise.mix(states)) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_keys_and_uniforms_equal_a_computation_with_unbounded_integers():
    seed, step, stream, samples = 5, -2, 3, [0, 7, 2**40]
    keys = noise.clip_keys(seed, step, torch.tensor(samples), stream)
    for key, u, sample in zip(unsigned(keys), noise.uniform(keys).tolist(), samples, strict=True):
        expected = 0
        for part in (stream, seed, step, sample):
            expected = splitmix((expected + (part + 1) * GOLDEN) & MASK)
        assert key == expected
        assert u == ((splitmix(key) >> 11) + 0.5) * 2.0**-53


def test_keys_of_different_uses_differ():
    parts = [(s, t, i, u) for s in range(4) for t in (-2, -1, 0, 1, 2) for i in range(20) for u in range(5)]
    keys = {int(noise.clip_keys(s, t, torch.tensor([i]), u)) for s, t, i, u in parts}
    assert len(keys) == len(parts)


def test_uniforms_are_uniform_on_the_open_interval():
    u = noise.uniform(noise.clip_keys(0, 0, torch.arange(N), 1))
    assert u.dtype == torch.float64 and 0 < float(u.min()) < 1e-4 and 1 - 1e-4 < float(u.max()) < 1
    counts = torch.histc(u, 20, 0, 1)
    chi_square = float(((counts - N / 20) ** 2 / (N / 20)).sum())
    assert chi_square < 43.8  # 99.9 % of 19 degrees of freedom


def test_noise_has_the_moments_and_the_distribution_of_a_normal():
    x = elements().double()
    assert abs(float(x.mean())) < 4 / N**0.5
    assert abs(float(x.var()) - 1) < 4 * (2 / N) ** 0.5
    assert abs(float((x**3).mean())) < 4 * (15 / N) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 4 * (96 / N) ** 0.5
    distance = (torch.special.ndtr(x.sort().values) - torch.arange(1, N + 1) / N).abs().max()
    assert float(distance) < 1.95 / N**0.5  # Kolmogorov-Smirnov at 99.9 %


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"step": 1}, {"step": -1}, {"sample": 1}, {"sample": 1 << 33}, {"stream": 1}]
)
def test_noise_of_another_clip_step_stream_or_seed_is_independent(other):
    a, b = elements().double(), elements(**other).double()
    for x, y in ((a, b), (a[1:], b[:-1]), (a[:-1], b[1:]), (a**2 - 1, b**2 - 1)):
        correlation = (x * y).mean() / (x.std() * y.std())
        assert abs(float(correlation)) < 4 / N**0.5


def test_neighbouring_elements_are_independent():
    x = elements().double()
    for lag in (1, 2, 3, 64):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 4 / N**0.5
        assert abs(float(((x[lag:] ** 2 - 1) * (x[:-lag] ** 2 - 1)).mean())) < 4 * 2 / N**0.5


def test_a_slice_drawn_alone_equals_the_slice_of_the_whole():
    dim, tokens = 10, 37
    key = noise.clip_keys(0, 3, torch.tensor([11]), 0)
    whole = noise.normal(key, torch.zeros(1, dtype=torch.int64), tokens * dim)[0]
    by_token = noise.normal(key.expand(tokens), torch.arange(tokens) * dim, dim)
    assert torch.equal(by_token.flatten(), whole)
    for start, end in ((0, 1), (5, 9), (30, 37), (36, 37)):
        part = noise.normal(key.expand(end - start), torch.arange(start, end) * dim, dim)
        assert torch.equal(part, by_token[start:end])
    assert torch.equal(noise.normal(key, torch.tensor([6]), 4)[0], whole[6:10])


def test_an_odd_number_of_elements_is_a_prefix_of_the_even_one():
    key = noise.clip_keys(0, 0, torch.tensor([1, 2]), 0)
    first = torch.tensor([0, 40])
    assert torch.equal(noise.normal(key, first, 7), noise.normal(key, first, 8)[:, :7])


def test_noise_is_finite_for_extreme_random_bits(monkeypatch):
    # halves of all zeros and all ones: the extremes of Box-Muller
    monkeypatch.setattr(noise, "mix", lambda z: torch.tensor([[0, -1, 0xFFFFFFFF, -(1 << 32)]]))
    x = noise.normal(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 8)
    assert torch.isfinite(x).all() and float(x.abs().max()) < 6.8

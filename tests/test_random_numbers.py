"""Counter-based random numbers: bit-exact SplitMix64, their distributions, and any slice without the rest."""

import pytest
import torch

from megasora import random_numbers
from megasora.random_numbers import fill_normal, fill_uniform, mix, normal, text_key, uniform

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
N = 200_000


def splitmix(z: int) -> int:
    """The finaliser as published, on unbounded integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def signed(z: int, bits: int = 64) -> int:
    return z - (1 << bits) if z >> (bits - 1) else z


def unsigned(values: torch.Tensor) -> list[int]:
    return [int(v) & MASK for v in values.flatten()]


# ---------------------------------------------------------------------- SplitMix64


def test_finaliser_equals_the_published_one():
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**63), 2**63 - 1, (500,), generator=generator).tolist()
    values = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**62, *random])
    before = values.clone()
    assert unsigned(mix(values)) == [splitmix(v & MASK) for v in values.tolist()]
    assert torch.equal(values, before)


def test_sequence_of_state_zero_is_the_published_one():
    states = torch.tensor([signed((i * GOLDEN) & MASK) for i in (1, 2, 3)])
    assert unsigned(mix(states)) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_uniforms_are_uniform_on_the_open_interval():
    u = uniform(mix(torch.arange(N)))
    assert u.dtype == torch.float64 and 0 < float(u.min()) < 1e-4 and 1 - 1e-4 < float(u.max()) < 1
    assert chi_square(u, 0, 1) < 43.8


def chi_square(x: torch.Tensor, low: float, high: float) -> float:
    """Of 20 equal intervals; 43.8 is the 99.9 % quantile of 19 degrees of freedom."""
    counts, expected = torch.histc(x, 20, low, high), len(x) / 20
    return float(((counts - expected) ** 2 / expected).sum())


def ks_distance(cdf: torch.Tensor) -> float:
    """Kolmogorov-Smirnov, from the distribution function at each value; times sqrt(n): 1.95 at 99.9 %."""
    n = len(cdf)
    return float((cdf.double().sort().values - torch.arange(1, n + 1) / n).abs().max()) * n**0.5


# ---------------------------------------------------------------------- normals by key


def elements(key: int, count: int = N) -> torch.Tensor:
    return normal(torch.tensor([key]), torch.zeros(1, dtype=torch.int64), count)[0]


def test_normals_have_the_moments_and_the_distribution_of_a_normal():
    x = elements(text_key("a")).double()
    assert abs(float(x.mean())) < 4 / N**0.5
    assert abs(float(x.var()) - 1) < 4 * (2 / N) ** 0.5
    assert abs(float((x**3).mean())) < 4 * (15 / N) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 4 * (96 / N) ** 0.5
    assert ks_distance(torch.special.ndtr(x)) < 1.95


def test_neighbouring_elements_are_independent():
    x = elements(text_key("a")).double()
    for lag in (1, 2, 3, 64):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 4 / N**0.5
        assert abs(float(((x[lag:] ** 2 - 1) * (x[:-lag] ** 2 - 1)).mean())) < 4 * 2 / N**0.5


def test_a_slice_drawn_alone_equals_the_slice_of_the_whole():
    dim, tokens = 10, 37
    key = torch.tensor([text_key("b")])
    whole = normal(key, torch.zeros(1, dtype=torch.int64), tokens * dim)[0]
    by_token = normal(key.expand(tokens), torch.arange(tokens) * dim, dim)
    assert torch.equal(by_token.flatten(), whole)
    for start, end in ((0, 1), (5, 9), (30, 37), (36, 37)):
        part = normal(key.expand(end - start), torch.arange(start, end) * dim, dim)
        assert torch.equal(part, by_token[start:end])
    assert torch.equal(normal(key, torch.tensor([6]), 4)[0], whole[6:10])


def test_an_odd_number_of_elements_is_a_prefix_of_the_even_one():
    keys, first = torch.tensor([text_key("c"), text_key("d")]), torch.tensor([0, 40])
    assert torch.equal(normal(keys, first, 7), normal(keys, first, 8)[:, :7])


def test_normals_are_finite_for_extreme_random_bits(monkeypatch):
    # halves of all zeros and all ones: the extremes of Box-Muller
    monkeypatch.setattr(random_numbers, "mix", lambda z: torch.tensor([[0, -1, 0xFFFFFFFF, -(1 << 32)]]))
    x = normal(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 8)
    assert torch.isfinite(x).all() and float(x.abs().max()) < 6.8


# ---------------------------------------------------------------------- tensors


def filled(fill, count, length, first, stride, key, device="cpu") -> torch.Tensor:
    out = torch.full((count, length), torch.nan, device=device)
    fill(out, key, first, stride, 1.0)
    return out


@pytest.mark.parametrize("count", [1, 2, 25])
def test_uniforms_of_a_tensor_equal_a_computation_with_unbounded_integers(count):
    key, bound = text_key("e"), 0.0123
    out = torch.empty(1, count)
    fill_uniform(out, key, 0, count, bound)
    for i, value in enumerate(out[0].tolist()):
        word = splitmix((key + (i // 2 + 1) * GOLDEN) & MASK)
        half = signed(word >> 32 if i % 2 else word & 0xFFFFFFFF, 32)
        scale = torch.tensor(bound * 2.0**-24, dtype=torch.float32).double()  # then one rounding
        assert value == float((float(half >> 7 | 1) * scale).float())


def test_normals_of_a_tensor_are_those_of_the_key():
    key = text_key("f")
    assert torch.equal(filled(fill_normal, 1, 999, 0, 999, key)[0], elements(key, 999))


@pytest.mark.parametrize("chunk", [4, 64, 1 << 17])
@pytest.mark.parametrize("fill", [fill_uniform, fill_normal])
def test_runs_of_elements_drawn_alone_equal_those_of_the_whole(fill, chunk, monkeypatch):
    """Also where runs begin with the second half of a word, are one element, or longer than a chunk."""
    key, total = text_key("g"), 3000
    monkeypatch.setitem(random_numbers.CHUNK_WORDS, "cpu", 1 << 17)
    whole = filled(fill, 1, total, 0, total, key)[0]
    monkeypatch.setitem(random_numbers.CHUNK_WORDS, "cpu", chunk)
    for count, length, first, stride in (
        (1, 3000, 0, 3000), (1, 999, 7, 1), (1, 1, 5, 1), (10, 100, 200, 300), (10, 33, 101, 299), (7, 1, 3, 5),
        (5, 12, 0, 13), (11, 7, 1, 8), (4, 500, 11, 701), (0, 4, 0, 8), (3, 0, 0, 4),
    ):  # fmt: skip
        places = first + torch.arange(count)[:, None] * stride + torch.arange(length)
        assert torch.equal(filled(fill, count, length, first, stride, key), whole[places])


def test_elements_far_into_a_stream_are_those_of_their_place():
    first = 2**40 + 1
    assert torch.equal(filled(fill_uniform, 1, 7, first, 7, 9)[0], filled(fill_uniform, 1, 8, first - 1, 8, 9)[0, 1:])
    word = splitmix((9 + (first // 2 + 1) * GOLDEN) & MASK)
    assert float(filled(fill_uniform, 1, 1, first, 1, 9)) == (signed(word >> 32, 32) >> 7 | 1) * 2.0**-24


def test_the_uniforms_of_a_tensor_are_uniform_and_independent():
    x = filled(fill_uniform, 1, N, 0, N, text_key("h"))[0].double()
    assert 1 - 1e-4 < float(x.abs().max()) < 1 and float(x.abs().min()) > 0
    assert abs(float(x.mean())) < 4 / (3 * N) ** 0.5 and abs(float(x.var()) - 1 / 3) < 4 * (4 / 45 / N) ** 0.5
    assert chi_square(x, -1, 1) < 43.8 and ks_distance((x + 1) / 2) < 1.95
    low_bits = ((x[:, None] * 2.0**24).long() // 2 ** torch.arange(1, 9)) % 2  # of the fraction, but the lowest
    assert float((low_bits.double().mean(0) - 0.5).abs().max()) < 4 * 0.5 / N**0.5
    for lag in (1, 2, 3, 64, 1024):
        assert abs(float((x[lag:] * x[:-lag]).mean()) * 3) < 4 / N**0.5
        assert abs(float(((x[lag:] ** 2 - 1 / 3) * (x[:-lag] ** 2 - 1 / 3)).mean()) * 45 / 4) < 4 / N**0.5
    pairs = torch.histogramdd(x.float().view(-1, 2), [10, 10], [-1, 1, -1, 1]).hist  # (low half, high half) of a word
    expected = N / 2 / 100
    assert float(((pairs - expected) ** 2 / expected).sum()) < 148.2  # 99.9 % of 99 degrees of freedom


def test_texts_have_keys_of_their_own():
    keys = {text_key(f"{seed} blocks.{block}.mlp.up.weight") for seed in range(30) for block in range(100)}
    assert len(keys) == 3000 and max(keys) > 2**62 and min(keys) < -(2**62)
    a, b = (filled(fill_uniform, 1, N, 0, N, text_key(f"{seed} a"))[0].double() for seed in (0, 1))
    for x, y in ((a, b), (a[1:], b[:-1]), (a[:-1], b[1:])):
        assert abs(float((x * y).mean()) * 3) < 4 / N**0.5


def test_a_draw_needs_little_memory_beyond_its_tensor():
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.append(result.untyped_storage().nbytes() if isinstance(result, torch.Tensor) else 0)
            return result

    out = torch.empty(1000, 3000)
    with Sizes():
        fill_uniform(out, 1, 0, 3000, 1.0)
        fill_normal(out, 1, 0, 3000, 1.0)
    assert max(size for size in sizes if size != out.nbytes) <= 2 * 8 * random_numbers.CHUNK_WORDS["cpu"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fill", [fill_uniform, fill_normal])
def test_a_gpu_draws_the_bits_of_the_cpu(fill):
    for count, length, first, stride in ((1, 9_000_001, 5, 1), (300, 7001, 3, 20_001), (4000, 128, 256, 1024)):
        of_gpu, of_cpu = (filled(fill, count, length, first, stride, 11, device) for device in ("cuda", "cpu"))
        assert torch.equal(of_gpu.cpu(), of_cpu)

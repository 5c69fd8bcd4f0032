"""A hash depends on every bit, on the order of elements and on the dtype, and on no memory layout or chunk size."""

from __future__ import annotations

import zlib

import pytest
import torch

from megasora.parallel import tensor_hash as module
from megasora.parallel.tensor_hash import odd_constants, tensor_hash

MASK = (1 << 64) - 1
GOLDEN, MIX_A, MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64


def hash_of(tensor: torch.Tensor) -> int:
    value = tensor_hash(tensor)
    assert value.dtype == torch.int64 and value.shape == ()
    return int(value)


def reference(memory: bytes, start: int, chunk_bytes: int) -> int:
    """The formula, in Python integers."""
    total = start
    for begin in range(0, len(memory), chunk_bytes):
        chunk, part = memory[begin : begin + chunk_bytes], 0
        for i in range(0, len(chunk), 8):
            word = int.from_bytes(chunk[i : i + 8].ljust(8, b"\0"), "little")
            constant = (i // 8 + 1) * GOLDEN & MASK
            constant = (constant ^ constant >> 30) * MIX_A & MASK
            constant = (constant ^ constant >> 27) * MIX_B & MASK
            constant = (constant ^ constant >> 31) | 1
            part += (word ^ word >> 32) * constant
        total = (total * MIX_B + part) & MASK
    return total - (1 << 64) if total >> 63 else total


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_the_hash_is_the_formula(count, monkeypatch):
    x = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    for words in (1 << 20, 16):
        monkeypatch.setattr(module, "CHUNK_WORDS", words)
        start = zlib.crc32(f"torch.uint8 {count}".encode())
        assert hash_of(x) == reference(bytes(x.tolist()), start, 8 * words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool])
def test_a_hash_depends_on_every_bit_and_on_no_memory_layout(dtype):
    x = (torch.arange(35) % 2 if dtype == torch.bool else torch.arange(35)).view(5, 7).to(dtype)
    assert hash_of(x) == hash_of(x.clone()) == hash_of(x.t().contiguous().t())
    padded = torch.cat([x.view(-1)[:3], x.view(-1)])
    assert hash_of(padded[3:]) == hash_of(x)  # at an address that is no multiple of 8
    seen, flips = {hash_of(x)}, 0
    for byte in range(x.numel() * x.element_size()):
        for bit in range(1 if dtype == torch.bool else 8):
            other = x.clone()
            other.view(-1).view(torch.uint8)[byte] ^= 1 << bit
            seen.add(hash_of(other))
            flips += 1
    assert len(seen) == flips + 1


def test_flips_of_equal_bits_in_several_words_do_not_cancel():
    x = torch.randn(64, dtype=torch.float64)
    signs = {hash_of(torch.where(torch.arange(64) % n == 0, -x, x)) for n in (1, 2, 3, 4, 8, 32)}
    assert len(signs | {hash_of(x)}) == 7


def test_exchanged_elements_and_odd_values():
    x = torch.randn(5000)
    swapped = x.clone()
    swapped[[10, 4000]] = x[[4000, 10]]
    assert hash_of(x) != hash_of(swapped) != hash_of(x.flip(0))
    assert hash_of(torch.tensor(0.0)) != hash_of(torch.tensor(-0.0))  # bits, not values
    assert hash_of(torch.tensor([float("nan")])) == hash_of(torch.tensor([float("nan")]))
    assert hash_of(torch.empty(0)) == hash_of(torch.empty(0, 3))
    assert hash_of(torch.zeros(3)) != hash_of(torch.zeros(4)) != hash_of(torch.zeros(4, dtype=torch.int32))
    assert hash_of(torch.ones(3, requires_grad=True)) == hash_of(torch.ones(3))


def test_constants_are_odd_and_distinct():
    constants = odd_constants(100_000, torch.device("cpu"))
    assert bool((constants % 2 != 0).all()) and len(constants.unique()) > 99_990
    assert abs(float(constants.double().mean())) < 2.0**63 / 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_hash_of_the_cpu():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3_000_001).to(dtype)
        assert hash_of(x.cuda()) == hash_of(x)

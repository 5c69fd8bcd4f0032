"""Random numbers as a pure function of a key and a counter: any slice of a stream can be drawn without the rest.

The generator is SplitMix64 (Steele et al., OOPSLA 2014): word j of the stream of `key` is mix(key + (j + 1) GOLDEN).
Integers wrap around alike on every device. Element i of a stream of fp32 numbers takes half of word i // 2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64: products wrap around
MIX_A = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_B = 0x94D049BB133111EB - (1 << 64)
# Words that are drawn at once: on a CPU 1 MiB, which stays in its caches, on a GPU 16 MiB; a draw needs thrice that.
CHUNK_WORDS = {"cpu": 1 << 17, "cuda": 1 << 21}


def mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64."""
    return mix_(z.clone(), torch.empty_like(z))


def mix_(z: Tensor, scratch: Tensor) -> Tensor:
    """The same in place; masks after right shifts remove the copies of the sign bit. `scratch`: as large as `z`."""
    for shift, factor in ((30, MIX_A), (27, MIX_B)):
        torch.bitwise_right_shift(z, shift, out=scratch).bitwise_and_((1 << (64 - shift)) - 1)
        z.bitwise_xor_(scratch).mul_(factor)
    torch.bitwise_right_shift(z, 31, out=scratch).bitwise_and_((1 << 33) - 1)
    return z.bitwise_xor_(scratch)


def text_key(text: str) -> int:
    """A key, as int64, for each text: the first bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def uniform(keys: Tensor) -> Tensor:
    """float64 in (0, 1), one per key."""
    return (((mix(keys) >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53


def normal(keys_L: Tensor, first_L: Tensor, dim: int) -> Tensor:
    """fp32 [L, dim] standard normals: row i is elements first[i] .. first[i] + dim - 1 of the stream of keys[i].

    `first` must be even.
    """
    counters = first_L[:, None] // 2 + torch.arange((dim + 1) // 2, device=keys_L.device)
    return box_muller(mix(keys_L[:, None] + (counters + 1) * GOLDEN))[:, :dim]


def box_muller(words: Tensor) -> Tensor:
    """int64 [..., n] -> fp32 [..., 2 n]: the halves of word j give two normals, the cosine and then the sine."""
    low = (words & 0xFFFFFFFF).float()
    high = ((words >> 32) & 0xFFFFFFFF).float()
    radius = torch.sqrt(-2.0 * torch.log((low + 0.5).clamp_max(2.0**32 - 256) * 2.0**-32))
    angle = high * (2.0 * math.pi * 2.0**-32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-2)


def fill_uniform(out_RN: Tensor, key: int, first: int, stride: int, bound: float) -> None:
    """Row r becomes elements first + r stride, first + r stride + 1 ... of the stream of `key`; fp32, in place.

    Uniform in (-bound, bound): 24 random bits as an odd integer, which fp32 represents exactly, times bound / 2^24. One
    rounding, so the bits are the same on every device.
    """
    for rows, columns, words, part in word_blocks(out_RN, key, first, stride, out_RN.device):
        bits = words.view(torch.int32).bitwise_right_shift_(7).bitwise_or_(1)
        out_RN[rows, columns].copy_(bits[:, part]).mul_(bound * 2.0**-24)


def fill_normal(out_RN: Tensor, key: int, first: int, stride: int, std: float) -> None:
    """The same for normals of standard deviation `std`. They are drawn on the CPU wherever `out` is: the logarithm and
    the cosine of a GPU differ in the last bit."""
    for rows, columns, words, part in word_blocks(out_RN, key, first, stride, torch.device("cpu")):
        out_RN[rows, columns].copy_(box_muller(words)[:, part].mul_(std))


def word_blocks(
    out_RN: Tensor, key: int, first: int, stride: int, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor, slice]]:
    """The words of all elements of `out`, in blocks: (rows and columns of `out`, words [rows, n], which of their 2 n
    halves these columns are). The words are overwritten by the next block."""
    count, length = out_RN.shape
    if not out_RN.numel():
        return
    if count > 1 and stride % 2:  # so that all rows begin with the same half of a word
        for start in (0, 1):
            for rows, *block in word_blocks(out_RN[start::2], key, first + start * stride, 2 * stride, device):
                yield slice(start + 2 * rows.start, start + 2 * rows.stop, 2), *block
        return
    skip, row_words = first % 2, (first % 2 + length + 1) // 2
    chunk = CHUNK_WORDS.get(device.type, CHUNK_WORDS["cpu"])
    width = min(row_words, chunk)
    height = min(count, chunk // width)
    buffers = torch.empty(2, height * width, dtype=torch.int64, device=device)
    steps = torch.arange(width, device=device).mul_(GOLDEN)
    for word in range(0, row_words, width):
        n = min(width, row_words - word)
        begin = 2 * word - skip  # the column of the first half
        part = slice(max(0, -begin), min(2 * n, length - begin))
        for row in range(0, count, height):
            rows = min(height, count - row)
            counters = torch.arange(row, row + rows, device=device) * (stride // 2) + (first // 2 + word + 1)
            words, scratch = (buffer[: rows * n].view(rows, n) for buffer in buffers)
            torch.add((counters * GOLDEN + key)[:, None], steps[:n], out=words)
            yield slice(row, row + rows), slice(begin + part.start, begin + part.stop), mix_(words, scratch), part

"""A 64-bit hash of the bits of a tensor, computed where the tensor is, so that replicas are compared without copies.

    h = sum_i m_i f(w_i)  mod 2^64       w_i: the tensor's memory in words of 64 bits; m_i: odd constants

`f` XORs the upper half of a word into its lower half, which makes flips of upper bits count in the lower ones, where
they do not cancel. A single flipped bit changes the hash with certainty; other differences, also tensors that are
exchanged or permuted, go unnoticed with a probability of about 2^-32 or less.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from megasora.random_numbers import GOLDEN, MIX_B, mix

WORD = 8  # bytes
CHUNK_WORDS = 1 << 20
LOWER_HALF = 0xFFFFFFFF


def tensor_hash(tensor: Tensor) -> Tensor:
    """int64 scalar on the tensor's device: a hash of its dtype and its elements' bits, in their order."""
    memory = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = memory.new_full((), zlib.crc32(f"{tensor.dtype} {tensor.numel()}".encode()), dtype=torch.int64)
    constants = odd_constants(min(CHUNK_WORDS, -(-len(memory) // WORD)), memory.device)
    for chunk in memory.split(CHUNK_WORDS * WORD):
        words = words_of(chunk)
        mixed = (words >> 32).bitwise_and_(LOWER_HALF).bitwise_xor_(words)
        total = total * MIX_B + mixed.mul_(constants[: len(words)]).sum()
    return total


def words_of(memory: Tensor) -> Tensor:
    """Bytes [n] as int64 [ceil(n / 8)], padded with zeros."""
    if len(memory) % WORD == 0 and memory.data_ptr() % WORD == 0 and memory.storage_offset() % WORD == 0:
        return memory.view(torch.int64)
    padded = memory.new_zeros(-(-len(memory) // WORD) * WORD)
    padded[: len(memory)] = memory
    return padded.view(torch.int64)


def odd_constants(count: int, device: torch.device) -> Tensor:
    """int64 [count]: the same pseudo-random odd numbers on every device."""
    return mix(torch.arange(1, count + 1, device=device) * GOLDEN).bitwise_or_(1)

"""float32 to float16, the bits that `astype(np.float16)` gives, in half of its time.

numpy converts one number at a time. These are whole-array operations on the numbers' bits, a few thousand at once so
that they stay in the cache. With e = max(floor(log2 |x|), -14), the halves around x are 2^(e-10) apart, and so are
the floats around c = 2^(e+13): the sum |x| + c is rounded where the half is, ties to even. What it is above c, in
these steps, is the mantissa with its leading bit (which numbers below 2^-14 do not have), so

    half(|x|) = (e + 14) 2^10 + (|x| + c - c) / 2^(e-10),    and the sign in bit 15.
"""

from __future__ import annotations

import numpy as np

CHUNK = 1 << 15  # numbers
LARGEST = 65520.0  # the least number that is rounded to Inf
SMALLEST = np.float32(2.0**-14)  # with a leading bit
EXPONENT, SIGN = 0x7F800000, 0x8000
# to the bits of 2^e: thirteen binary orders more, and in the last bits what (e + 127 + 13) 2^10 exceeds (e + 14) 2^10
# by, with the other sign, modulo 2^16
ABOVE = (13 << 23) + (-(126 << 10)) % (1 << 16)


class Half:
    """Converts arrays of any size; holds the buffers of a chunk."""

    def __init__(self) -> None:
        self.sums, self.exponents = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
        self.smallest = np.full(CHUNK, SMALLEST)  # two arrays are compared three times as fast as one with a number

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """float32, contiguous -> float16 of the same shape. Raises OverflowError where one is not finite in float16."""
        halves = np.empty(values.shape, np.float16)
        flat, bits = values.reshape(-1), halves.view(np.uint16).reshape(-1)
        for first in range(0, len(flat), CHUNK):
            self.convert(flat[first : first + CHUNK], bits[first : first + CHUNK])
        return halves

    def convert(self, x: np.ndarray, half: np.ndarray) -> None:
        total, exponent = self.sums[: len(x)], self.exponents[: len(x)]
        total_bits, exponent_bits = total.view(np.uint32), exponent.view(np.uint32)
        np.abs(x, out=total)
        if not total.max() < LARGEST:  # nor where it is NaN
            raise OverflowError(f"{int((~(total < LARGEST)).sum())} of {len(x)} numbers are not finite in float16")
        np.maximum(total, self.smallest[: len(x)], out=exponent)
        exponent_bits &= EXPONENT
        exponent_bits += ABOVE
        total += exponent
        exponent_bits >>= 13
        total_bits += exponent_bits
        np.right_shift(x.view(np.uint32), 16, out=exponent_bits)
        exponent_bits &= SIGN
        total_bits += exponent_bits
        half[:] = total_bits  # the lower half of each

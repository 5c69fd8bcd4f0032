"""Conversion of float32 arrays to float16: the bits of `astype(np.float16)` in half of its time.

numpy converts one element at a time. These are whole-array operations on the bits of a few thousand elements, which
stay in the cache. With e = max(floor(log2 |x|), -14), float16 values near x are 2^(e-10) apart, and so are float32
values near c = 2^(e+13). So |x| + c is rounded exactly as float16 rounds |x|: to nearest, ties to even. Its excess over
c, in units of 2^(e-10), is the mantissa with its leading bit (which values below 2^-14 do not have), so

    float16(|x|) = (e + 14) 2^10 + (|x| + c - c) / 2^(e-10),    and the sign in bit 15.
"""

from __future__ import annotations

import numpy as np

CHUNK = 1 << 15  # elements
OVERFLOW = 65520.0  # the smallest value that rounds to Inf
MIN_NORMAL = np.float32(2.0**-14)  # the smallest float16 with a leading bit
EXPONENT_MASK, SIGN_BIT = 0x7F800000, 0x8000
# Added to the bits of 2^e: 13 to the exponent, which gives c; and -126 2^10 modulo 2^16 to the low bits, which cancels
# the excess of c's exponent after the shift, (e + 127 + 13) 2^10, over (e + 14) 2^10.
EXPONENT_OFFSET = (13 << 23) + (-(126 << 10)) % (1 << 16)


class Float16Converter:
    """Converts contiguous float32 arrays of any size; owns the buffers of one chunk."""

    def __init__(self) -> None:
        self.sums, self.exponents = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
        self.min_normal = np.full(CHUNK, MIN_NORMAL)  # comparing two arrays is three times as fast as array and scalar

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """float32 -> float16 of the same shape. Raises OverflowError where a value is not finite in float16."""
        converted = np.empty(values.shape, np.float16)
        flat, bits = values.reshape(-1), converted.view(np.uint16).reshape(-1)
        for start in range(0, len(flat), CHUNK):
            self.convert_chunk(flat[start : start + CHUNK], bits[start : start + CHUNK])
        return converted

    def convert_chunk(self, x: np.ndarray, out_bits: np.ndarray) -> None:
        total, exponent = self.sums[: len(x)], self.exponents[: len(x)]
        total_bits, exponent_bits = total.view(np.uint32), exponent.view(np.uint32)
        np.abs(x, out=total)
        if not total.max() < OVERFLOW:  # also true for NaN
            raise OverflowError(f"{int((~(total < OVERFLOW)).sum())} of {len(x)} values are not finite in float16")
        np.maximum(total, self.min_normal[: len(x)], out=exponent)
        exponent_bits &= EXPONENT_MASK
        exponent_bits += EXPONENT_OFFSET
        total += exponent
        exponent_bits >>= 13
        total_bits += exponent_bits
        np.right_shift(x.view(np.uint32), 16, out=exponent_bits)
        exponent_bits &= SIGN_BIT
        total_bits += exponent_bits
        out_bits[:] = total_bits  # the lower 16 bits

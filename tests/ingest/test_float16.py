"""Halves have the bits that numpy's own conversion gives, whatever the number; what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest

from megasora.ingest.float16 import CHUNK, Float16Converter

HALVES = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # all that are finite and not negative
BETWEEN = ((HALVES[1:].astype(np.float64) + HALVES[:-1]) / 2).astype(np.float32)  # exact: a half has 11 bits


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint16)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("towards", [None, np.inf, -np.inf])
def test_every_half_every_tie_and_the_floats_beside_them_are_rounded_as_numpy_rounds_them(sign, towards):
    values = np.concatenate([HALVES, BETWEEN])
    if towards is not None:
        values = np.nextafter(values, np.float32(towards))
    values = (sign * values)[np.abs(values) < 65520]
    assert np.array_equal(bits(Float16Converter()(values)), bits(values.astype(np.float16)))


def test_floats_of_any_bits_are_rounded_as_numpy_rounds_them():
    values = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    values = values[np.abs(values) < 65520]
    assert len(values) > 1 << 17
    assert np.array_equal(bits(Float16Converter()(values)), bits(values.astype(np.float16)))


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (CHUNK,), (2, CHUNK + 1), (0, 4)])
def test_arrays_of_any_shape_keep_it(shape):
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    halves = Float16Converter()(values)
    assert halves.dtype == np.float16 and np.array_equal(halves, values.astype(np.float16))


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e30, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [0, CHUNK + 3])
def test_what_is_not_finite_in_half_precision_is_refused_wherever_it_is(value, place):
    values = np.full(CHUNK + 10, np.nextafter(np.float32(65520), np.float32(0)))
    assert (Float16Converter()(values) == 65504).all()
    values[place] = value
    with pytest.raises(OverflowError, match="1 of .* values are not finite in float16"):
        Float16Converter()(values)

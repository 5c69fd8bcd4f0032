"""Float16Converter gives the bits of numpy's `astype(np.float16)`; values that overflow are an error."""

from __future__ import annotations

import numpy as np
import pytest

from megasora.ingest.float16 import CHUNK, Float16Converter

FLOAT16_VALUES = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # finite, not negative
TIES = ((FLOAT16_VALUES[1:].astype(np.float64) + FLOAT16_VALUES[:-1]) / 2).astype(np.float32)  # exact: 12 bits


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint16)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("towards", [None, np.inf, -np.inf])
def test_every_float16_every_tie_and_their_neighbours_are_rounded_as_by_numpy(sign, towards):
    values = np.concatenate([FLOAT16_VALUES, TIES])
    if towards is not None:
        values = np.nextafter(values, np.float32(towards))
    values = (sign * values)[np.abs(values) < 65520]
    assert np.array_equal(bits(Float16Converter()(values)), bits(values.astype(np.float16)))


def test_random_float32_bits_are_rounded_as_by_numpy():
    values = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    values = values[np.abs(values) < 65520]
    assert len(values) > 1 << 17
    assert np.array_equal(bits(Float16Converter()(values)), bits(values.astype(np.float16)))


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (CHUNK,), (2, CHUNK + 1), (0, 4)])
def test_the_shape_is_preserved(shape):
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    converted = Float16Converter()(values)
    assert converted.dtype == np.float16 and np.array_equal(converted, values.astype(np.float16))


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e30, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("position", [0, CHUNK + 3])
def test_a_value_that_is_not_finite_in_float16_is_an_error_at_any_position(value, position):
    values = np.full(CHUNK + 10, np.nextafter(np.float32(65520), np.float32(0)))
    assert (Float16Converter()(values) == 65504).all()
    values[position] = value
    with pytest.raises(OverflowError, match="1 of .* values are not finite in float16"):
        Float16Converter()(values)

"""Splitting of widths into chunks."""

import pytest

from megasora.kernels.vector_chunks import MIN_BLOCK, split_width


@pytest.mark.parametrize(
    ("width", "max_chunks", "prefer_few", "expected"),
    [
        (5120, 6, False, (5, 1024)),
        (1536, 6, True, (3, 512)),
        (5120, 3, False, (3, 2048)),
        (2048, 5, False, (4, 512)),
        (2048, 5, True, (1, 2048)),
        (96, 1, False, (1, 128)),
        (96, 6, True, (3, 32)),
        (1, 5, False, (1, MIN_BLOCK)),
        (0, 6, True, (0, MIN_BLOCK)),
    ],
)
def test_known_splits(width, max_chunks, prefer_few, expected):
    assert split_width(width, max_chunks, prefer_few) == expected


@pytest.mark.parametrize("prefer_few", [False, True])
@pytest.mark.parametrize("max_chunks", [1, 3, 5, 6])
def test_no_other_power_of_two_wastes_less(max_chunks, prefer_few):
    for width in range(1, 6000, 7):
        count, block = split_width(width, max_chunks, prefer_few)
        blocks = [1 << n for n in range(4, 14) if -(-width // (1 << n)) <= max_chunks]
        assert block in blocks and count <= max_chunks
        assert count * block == min(-(-width // b) * b for b in blocks)

"""Rows: their tiles, and sums over their tokens."""

import math

import pytest
import torch
from agreement import TRITON_DEVICE, normal

from megasora.kernels.row_tiles import GROUP_TILES, sum_of_tiles
from megasora.kernels.rows import MAX_TILE_TOKENS, MIN_TILE_TOKENS, PROGRAMS, Rows, tile_tokens_for


def rows_of(*lengths, tokens=None, device="cpu"):
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return Rows.from_cu_seqlens(cu, int(cu[-1]) if tokens is None else tokens, device)


@pytest.mark.parametrize("lengths", [(40, 0, 35, 15), (0, 1, 0), (300, 2, 64), (1,) * 70], ids=str)
def test_each_tile_is_within_one_row_and_tiles_are_in_order(lengths):
    tokens = sum(lengths) + 50
    rows = rows_of(*lengths, tokens=tokens)
    starts = rows.tile_start_Q.tolist()
    assert starts[0] == 0 and starts[-1] == tokens
    row_of_token = [row for row, n in enumerate((*lengths, 50)) for _ in range(n)]
    for start, end, row in zip(starts, starts[1:], rows.tile_row_Q.tolist(), strict=False):
        assert 0 < end - start <= MIN_TILE_TOKENS and set(row_of_token[start:end]) == {row}
    for row, (a, b) in enumerate(rows.first_tile_R.unfold(0, 2, 1).tolist()):
        assert rows.tile_row_Q[a:b].tolist() == [row] * (b - a)
    # program p has the tiles from token p * MIN_TILE_TOKENS on
    first_tokens = [starts[tile] for tile in rows.first_tile_P.tolist()]
    assert first_tokens == [*range(0, tokens, MIN_TILE_TOKENS), tokens]
    assert rows.row_L.tolist() == row_of_token[: sum(lengths)] and rows.num_real == sum(lengths)


@pytest.mark.parametrize("num_tokens", [1, 4096, 16_384, 36_864, 37_888, 73_728, 80_000, 1_048_576])
def test_programs_have_equal_shares_and_fill_their_last_wave(num_tokens):
    """From 12K tokens on: with 1, 2 or 4 programs on each of 132 multiprocessors, 9 of 10 work in the last wave."""
    rows = rows_of(num_tokens)
    tiles = rows.tile_start_Q[rows.first_tile_P.long()].diff()
    assert bool((tiles[:-1] == tile_tokens_for(num_tokens)).all()) and 0 < tiles[-1] <= tile_tokens_for(num_tokens)
    assert MIN_TILE_TOKENS <= tile_tokens_for(num_tokens) <= MAX_TILE_TOKENS
    for slots in (132, 264, 528) if num_tokens >= PROGRAMS * MIN_TILE_TOKENS else ():
        waves = len(tiles) / slots
        assert waves / math.ceil(waves) > 0.9


def test_sums_are_over_the_tokens_of_each_row():
    rows, x = rows_of(70, 0, 1, 33, tokens=120), normal(104, 5)
    expected = torch.stack([x[a:b].sum(0) for a, b in ((0, 70), (70, 70), (70, 71), (71, 104))])
    torch.testing.assert_close(rows.sum(x), expected)
    torch.testing.assert_close(rows.expand(expected)[[0, 69, 70, 103]], expected[[0, 0, 2, 3]])


@pytest.mark.parametrize("width", [1, 96, 300])
@pytest.mark.parametrize(
    "lengths", [(70, 0, 1, 33), (32 * GROUP_TILES * 2, 0, 1, 32 * GROUP_TILES * 18 + 5), (1,) * 40]
)
def test_the_kernels_add_up_the_tiles_of_every_row(lengths, width):
    rows = rows_of(*lengths, tokens=sum(lengths) + 16, device=TRITON_DEVICE)
    tiles = normal(2, len(rows.tile_row_Q), width).float()
    actual = sum_of_tiles(tiles.to(TRITON_DEVICE), rows.tile_row_Q, rows.first_tile_R)
    first = rows.first_tile_R.tolist()
    expected = torch.stack([tiles[:, a:b].sum(1) for a, b in zip(first, first[1:], strict=False)], 1)
    torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([0, 5, 3], "must rise from 0"),
        ([1, 5], "must rise from 0"),
        ([0], "must rise"),
        ([0, 9], "after the last of 8"),
    ],
)
def test_invalid_cu_rows_raise(cu, message):
    with pytest.raises(ValueError, match=message):
        Rows.from_cu_seqlens(torch.tensor(cu), 8, "cpu")

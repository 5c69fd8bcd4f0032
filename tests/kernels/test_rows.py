"""Rows: their tiles, and sums over their tokens."""

import pytest
import torch
from agreement import TRITON_DEVICE, normal

from megasora.kernels.row_tiles import sum_of_tiles
from megasora.kernels.rows import TILE_TOKENS_BY_PACK_SIZE, Rows


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
        assert 0 < end - start <= TILE_TOKENS_BY_PACK_SIZE[0] and set(row_of_token[start:end]) == {row}
    for row, (a, b) in enumerate(rows.first_tile_R.unfold(0, 2, 1).tolist()):
        assert rows.tile_row_Q[a:b].tolist() == [row] * (b - a)
    assert rows.row_L.tolist() == row_of_token[: sum(lengths)] and rows.num_real == sum(lengths)


def test_longer_packs_have_longer_tiles():
    longest = [int(rows_of(n).tile_start_Q.diff().max()) for n in (1000, 20_000, 100_000)]
    assert longest == sorted(TILE_TOKENS_BY_PACK_SIZE.values()) == [32, 64, 128]


def test_sums_are_over_the_tokens_of_each_row():
    rows, x = rows_of(70, 0, 1, 33, tokens=120), normal(104, 5)
    expected = torch.stack([x[a:b].sum(0) for a, b in ((0, 70), (70, 70), (70, 71), (71, 104))])
    torch.testing.assert_close(rows.sum(x), expected)
    torch.testing.assert_close(rows.expand(expected)[[0, 69, 70, 103]], expected[[0, 0, 2, 3]])


@pytest.mark.parametrize("width", [1, 96, 300])
def test_the_kernel_adds_up_the_tiles_of_every_row(width):
    rows = rows_of(70, 0, 1, 33, tokens=120, device=TRITON_DEVICE)
    tiles = normal(len(rows.tile_row_Q), width).float()
    actual = sum_of_tiles(tiles.to(TRITON_DEVICE), rows.first_tile_R)
    first = rows.first_tile_R.tolist()
    expected = torch.stack([tiles[a:b].sum(0) for a, b in zip(first, first[1:], strict=False)])
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

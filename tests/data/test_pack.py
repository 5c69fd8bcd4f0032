"""The contents of a pack: segments, padding, coords, positions and dtypes."""

import dataclasses

import pytest
import torch

from megasora.data.pack import Record, make_batch


def record(sample_id, grid, words, caption="a clip"):
    tokens = grid[0] * grid[1] * grid[2]
    native = (8.0 * grid[1], 8.0 * grid[2], 4.0 * grid[0] - 3, 12.0)
    return Record(
        sample_id, torch.full((tokens, 6), float(sample_id)), grid, torch.full((words, 4), sample_id), native, caption
    )


def make_pack(padding=4):
    records = [record(5, (2, 1, 2), 3), record(2, (1, 2, 3), 1, caption=""), record(9, (1, 1, 1), 2, caption="  ")]
    return records, make_batch(records, 11 + padding)


def test_segments_are_contiguous_and_followed_by_padding():
    _, batch = make_pack()
    assert batch.cu_segments.tolist() == [0, 4, 10, 11] and batch.cu_text.tolist() == [0, 3, 4, 6]
    assert batch.cu_segments.dtype == batch.cu_text.dtype == torch.int32
    assert batch.patches_LP[:, 0].tolist() == [5] * 4 + [2] * 6 + [9] + [0] * 4
    assert batch.text_SE[:, 0].tolist() == [5] * 3 + [2] + [9] * 2
    assert batch.sample_ids_G.tolist() == [5, 2, 9]
    assert batch.num_tokens == 11 and batch.num_segments == 3 and len(batch.patches_LP) == 15


def test_coords_start_at_zero_in_each_clip_in_time_major_order():
    _, batch = make_pack()
    first = [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    second = [[0, h, w] for h in range(2) for w in range(3)]
    assert batch.coords_L3.tolist() == first + second + [[0, 0, 0]] * 5
    assert batch.coords_L3.dtype == torch.int32
    assert batch.grids_G3.tolist() == [[2, 1, 2], [1, 2, 3], [1, 1, 1]]


def test_a_new_pack_is_clean_with_one_row_per_segment():
    records, batch = make_pack()
    assert torch.equal(batch.cu_rows, batch.cu_segments)
    assert (batch.timesteps_R == 0).all() and batch.row_segment_R.tolist() == [0, 1, 2]
    assert batch.native_size_G4.tolist() == [list(r.native_size) for r in records]


def test_an_empty_caption_is_hidden():
    _, batch = make_pack()
    assert batch.drop_text_G.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("stored", "packed"),
    [(["float16"], "float16"), (["bfloat16"] * 2, "bfloat16"), (["float16", "bfloat16"], "float32")],
)
def test_patches_are_packed_in_a_dtype_that_holds_them_exactly(stored, packed):
    values = torch.tensor([[1 / 3, -7.0, 2.0**-9]])
    records = [
        Record(i, values.to(getattr(torch, name)), (1, 1, 1), torch.ones(1, 4), (8, 8, 1, 0), "x")
        for i, name in enumerate(stored)
    ]
    batch = make_batch(records, 2)
    assert batch.patches_LP.dtype == getattr(torch, packed)
    for row, record in zip(batch.patches_LP, records, strict=False):
        assert torch.equal(row.float(), record.patches_LP[0].float())


def test_a_full_pack_has_no_padding_and_one_token_too_many_is_an_error():
    records, batch = make_pack(padding=0)
    assert batch.num_tokens == len(batch.patches_LP)
    with pytest.raises(ValueError, match="3 clips of 11 tokens do not fit a pack of 10"):
        make_batch(records, 10)
    with pytest.raises(ValueError, match="0 clips"):
        make_batch([], 10)


def test_some_tokens_of_a_clip_keep_their_coords_and_positions():
    whole = record(5, (3, 1, 2), 3)
    positions = torch.tensor([0, 3, 4, 5])
    part = dataclasses.replace(whole, patches_LP=whole.patches_LP[positions], positions_L=positions)
    batch = make_batch([record(1, (1, 1, 1), 1), part], 8)
    assert batch.coords_L3[1:5].tolist() == [[0, 0, 0], [1, 0, 1], [2, 0, 0], [2, 0, 1]]
    assert batch.positions_L.tolist() == [0, 0, 3, 4, 5, 0, 0, 0] and batch.positions_L.dtype == torch.int64
    assert batch.grids_G3[1].tolist() == [3, 1, 2] and batch.cu_segments.tolist() == [0, 1, 5]


def test_fields_that_plans_are_made_from_stay_on_the_cpu():
    _, batch = make_pack()
    moved = batch.to("meta")
    on_cpu = {name for name, value in vars(moved).items() if value is not None and value.device.type == "cpu"}
    assert on_cpu == {"grids_G3", "cu_segments", "cu_rows", "cu_text", "sample_ids_G", "positions_L"}

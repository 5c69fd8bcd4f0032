"""Packs: what one holds, and the plan of an epoch."""

import numpy as np
import pytest
import torch

from megasora.data.pack import Record, make_batch, plan_epoch


def clip_mix(count=3000, seed=0):
    """Tokens of clips like the demo's: 12 to 216, about 50 on average."""
    rng = np.random.default_rng(seed)
    frames = rng.choice([1, 2, 3, 4, 5, 9], count, p=[0.12, 0.13, 0.5, 0.1, 0.1, 0.05])
    per_frame = rng.choice([12, 15, 16, 24], count, p=[0.3, 0.24, 0.3, 0.16])
    return frames * per_frame


def record(sample_id, grid, words, caption="a clip"):
    tokens = grid[0] * grid[1] * grid[2]
    native = (8.0 * grid[1], 8.0 * grid[2], 4.0 * grid[0] - 3, 12.0)
    return Record(
        sample_id, torch.full((tokens, 6), float(sample_id)), grid, torch.full((words, 4), sample_id), native, caption
    )


# ---- the plan


@pytest.mark.parametrize("lookahead", [1, 7, 128, 10_000])
@pytest.mark.parametrize("budget", [216, 1024])
def test_every_clip_is_in_exactly_one_pack_within_the_budget(lookahead, budget):
    tokens = clip_mix(1000)
    packs = plan_epoch(tokens, budget, lookahead, seed=3, epoch=2)
    assert sorted(i for pack in packs for i in pack) == list(range(1000))
    assert all(0 < sum(tokens[pack]) <= budget for pack in packs)


@pytest.mark.parametrize("seed", range(5))
def test_padding_is_at_most_two_percent(seed):
    tokens = clip_mix(seed=seed)
    assert 12 <= tokens.min() and tokens.max() <= 216 and 40 < tokens.mean() < 60
    packs = plan_epoch(tokens, 1024, 1024, seed, epoch=0)
    assert 1 - tokens.sum() / (1024 * len(packs)) <= 0.02


def test_only_the_last_packs_have_gaps_that_a_clip_in_view_would_fill():
    tokens = clip_mix()
    packs = plan_epoch(tokens, 1024, 1024, seed=0, epoch=0)
    gaps = [1024 - sum(tokens[pack]) for pack in packs]
    assert max(gaps[: int(0.6 * len(gaps))]) < tokens.min()


def test_the_plan_is_a_function_of_seed_and_epoch():
    tokens = clip_mix(500)
    plan = plan_epoch(tokens, 1024, 64, 5, 1)
    assert plan == plan_epoch(tokens.copy(), 1024, 64, 5, 1)
    assert plan != plan_epoch(tokens, 1024, 64, 5, 2) and plan != plan_epoch(tokens, 1024, 64, 6, 1)


def test_clips_of_all_sizes_come_throughout_the_epoch():
    tokens = clip_mix()
    packs = plan_epoch(tokens, 1024, 128, seed=0, epoch=0)
    quarters = np.array_split(np.arange(len(packs)), 4)
    means = [np.mean([tokens[i] for p in quarter for i in packs[p]]) for quarter in quarters]
    assert max(means) / min(means) < 1.15


def test_a_clip_waits_no_longer_than_the_clips_in_view():
    # clips of the whole budget can never fill a gap: each must come when it is first in line
    tokens = np.where(np.arange(2000) % 50 == 0, 1024, clip_mix(2000))
    packs = plan_epoch(tokens, 1024, 64, seed=0, epoch=0)
    order = np.random.default_rng((0, 0)).permutation(2000)
    rank = np.empty(2000, dtype=int)
    rank[order] = np.arange(2000)
    seen = 0
    for pack in packs:
        assert min(rank[pack]) <= seen  # the clip first in line is always taken
        seen += len(pack)
        assert max(rank[pack]) <= seen + 64


@pytest.mark.parametrize(("tokens", "packs"), [([], 0), ([7], 1), ([10, 10], 2), ([5, 5, 10], 2), ([1] * 30, 3)])
def test_small_cases_have_the_least_number_of_packs(tokens, packs):
    assert len(plan_epoch(np.array(tokens, dtype=np.int64), 10, 8, 0, 0)) == packs


# ---- the pack


def make_pack(padding=4):
    records = [record(5, (2, 1, 2), 3), record(2, (1, 2, 3), 1, caption=""), record(9, (1, 1, 1), 2, caption="  ")]
    return records, make_batch(records, 11 + padding)


def test_segments_lie_one_after_the_other_and_padding_behind_them():
    _, batch = make_pack()
    assert batch.cu_segments.tolist() == [0, 4, 10, 11] and batch.cu_text.tolist() == [0, 3, 4, 6]
    assert batch.cu_segments.dtype == batch.cu_text.dtype == torch.int32
    assert batch.patches_LP[:, 0].tolist() == [5] * 4 + [2] * 6 + [9] + [0] * 4
    assert batch.text_SE[:, 0].tolist() == [5] * 3 + [2] + [9] * 2
    assert batch.sample_ids_G.tolist() == [5, 2, 9]
    assert batch.num_tokens == 11 and batch.num_segments == 3 and len(batch.patches_LP) == 15


def test_coords_start_anew_in_each_clip_time_first():
    _, batch = make_pack()
    first = [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    second = [[0, h, w] for h in range(2) for w in range(3)]
    assert batch.coords_L3.tolist() == first + second + [[0, 0, 0]] * 5
    assert batch.coords_L3.dtype == torch.int32
    assert batch.grids_G3.tolist() == [[2, 1, 2], [1, 2, 3], [1, 1, 1]]


def test_a_fresh_pack_is_clean_with_a_row_a_segment():
    records, batch = make_pack()
    assert torch.equal(batch.cu_rows, batch.cu_segments)
    assert (batch.timesteps_R == 0).all() and batch.row_segment_R.tolist() == [0, 1, 2]
    assert batch.native_G4.tolist() == [list(r.native) for r in records]


def test_an_empty_caption_is_hidden():
    _, batch = make_pack()
    assert batch.drop_text_G.tolist() == [False, True, True]


def test_half_precision_patches_become_float():
    records = [Record(0, torch.ones(1, 6, dtype=torch.float16), (1, 1, 1), torch.ones(1, 4), (8, 8, 1, 0), "x")]
    assert make_batch(records, 2).patches_LP.dtype == torch.float32


def test_a_full_pack_has_no_padding_and_one_clip_too_many_is_refused():
    records, batch = make_pack(padding=0)
    assert batch.num_tokens == len(batch.patches_LP)
    with pytest.raises(ValueError, match="clips of 11 tokens do not fit a pack of 10"):
        make_batch(records, 10)


def test_plans_are_made_from_what_stays_on_the_cpu():
    _, batch = make_pack()
    moved = batch.to("meta")
    on_cpu = {name for name, value in vars(moved).items() if value is not None and value.device.type == "cpu"}
    assert on_cpu == {"grids_G3", "cu_segments", "cu_rows", "cu_text", "sample_ids_G", "starts_G"}

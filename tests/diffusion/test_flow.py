"""The objective: what is noised and what is kept clean, and that nothing depends on where a clip lies."""

import dataclasses
from collections import Counter

import pytest
import torch

from megasora.batch import segment_ids
from megasora.config import FrameConditioningConfig, ObjectiveConfig
from megasora.data.pack import Record, make_batch
from megasora.diffusion import noise
from megasora.diffusion.flow import FlowMatching, draw_clean_frames, noise_batch, build_rows, velocity_error
from megasora.diffusion.timesteps import shift_factor

PATCH_DIM = 7  # odd, so that the noise's pairs do not divide it
GRIDS = [(1, 2, 3), (2, 2, 2), (5, 1, 2), (3, 3, 1), (9, 1, 1)]
EVEN = FrameConditioningConfig(none=1, first=1, last=1, head=1, tail=1, both=1)


def unpacked(ids):
    """Clip `i` has the same content wherever it stands."""
    records = []
    for i in ids:
        grid = GRIDS[i % len(GRIDS)]
        tokens = grid[0] * grid[1] * grid[2]
        patches = torch.randn(tokens, PATCH_DIM, generator=torch.Generator().manual_seed(i))
        text = torch.full((1 + i % 3, 4), float(i))
        records.append(Record(i, patches, grid, text, (16.0, 16.0, 9.0, 8.0), f"clip {i}"))
    return records


def make_pack(ids, padding=0):
    records = unpacked(ids)
    return make_batch(records, sum(len(r.patches_LP) for r in records) + padding)


def make_objective(seed=0, **options):
    return FlowMatching(ObjectiveConfig(**{"frame_conditioning": EVEN, **options}), seed)


def by_clip(batch, values_L):
    return dict(
        zip(
            batch.sample_ids_G.tolist(),
            values_L[: batch.num_tokens].split(batch.cu_segments.diff().tolist()),
            strict=True,
        )
    )


def grid_points(n):
    return [(i + 0.5) / n for i in range(n)]


def counts_of(frames, config, n=10_000):
    counts = Counter(draw_clean_frames(frames, u, 0.0, config) for u in grid_points(n))
    return {drawn: count / n for drawn, count in counts.items()}


# ---- which frames are clean


def test_conditions_are_drawn_with_the_configured_probabilities():
    config = FrameConditioningConfig(none=3.0, first=1.5, last=0.5, head=2.0, tail=1.0, both=2.0)
    kinds = {(0, 0): 0.3, (1, 0): 0.15 + 0.2, (0, 1): 0.05 + 0.1, (1, 1): 0.2}  # of length_u = 0, k is the least
    measured = counts_of(9, config)
    assert measured.keys() == kinds.keys()
    for drawn, share in kinds.items():
        assert measured[drawn] == pytest.approx(share, abs=2e-4)


def test_lengths_of_clean_ends_are_drawn_evenly():
    for kind, expected in (
        ("head", [(k, 0) for k in (1, 2, 3, 4)]),
        ("tail", [(0, k) for k in (1, 2, 3, 4)]),
        ("both", [(1, 1), (2, 1), (2, 2)]),
    ):
        config = FrameConditioningConfig(**{**dict.fromkeys(vars(EVEN), 0.0), kind: 1.0})
        drawn = [draw_clean_frames(5, 0.5, u, config) for u in grid_points(1200)]
        assert {d: drawn.count(d) for d in set(drawn)} == dict.fromkeys(expected, 1200 // len(expected))


@pytest.mark.parametrize("frames", range(1, 8))
@pytest.mark.parametrize("only", [None, *vars(EVEN)])
def test_at_least_one_frame_stays_noised(frames, only):
    config = EVEN if only is None else FrameConditioningConfig(**{**dict.fromkeys(vars(EVEN), 0.0), only: 1.0})
    points = [0.0, *grid_points(24), 1 - 2.0**-53]
    for head, tail in {draw_clean_frames(frames, a, b, config) for a in points for b in points}:
        assert head >= 0 and tail >= 0 and head + tail < frames


def test_an_image_is_never_given_away_and_two_frames_have_no_both_ends():
    assert counts_of(1, EVEN) == {(0, 0): 1.0}
    both_is_left_out = counts_of(2, EVEN)
    assert both_is_left_out.keys() == {(0, 0), (1, 0), (0, 1)}
    assert both_is_left_out[0, 0] == pytest.approx(0.2, abs=2e-4)


def test_conditions_and_caption_dropout_of_the_objective_follow_the_probabilities():
    n = 3000
    condition = FrameConditioningConfig(none=0.5, first=0.3, last=0.2, head=0, tail=0, both=0)
    objective = make_objective(frame_conditioning=condition, caption_dropout=0.25)
    ids = [2 + 5 * i for i in range(n)]  # all of 5 latent frames
    noised, _, _ = objective.add_noise(make_pack(ids), step=0)
    clean = noised.timesteps_R == 0
    rows = torch.bincount(noised.row_segment_R, minlength=n)
    first_row = torch.searchsorted(noised.row_segment_R, torch.arange(n))
    shares = [(rows == 1), (rows == 2) & clean[first_row], (rows == 2) & ~clean[first_row]]
    for measured, share in zip(shares, (0.5, 0.3, 0.2), strict=True):
        assert float(measured.double().mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)
    assert float(noised.drop_text_G.double().mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / n) ** 0.5)


# ---- rows


def test_rows_part_a_segment_at_its_clean_frames():
    batch = make_pack([2, 0, 4])  # grids (5, 1, 2), (1, 2, 3), (9, 1, 1)
    cu_rows, timesteps, owner = build_rows(batch, torch.tensor([0.5, 0.6, 0.7]), [(1, 0), (0, 0), (2, 3)])
    assert cu_rows.tolist() == [0, 2, 10, 16, 18, 22, 25]
    assert timesteps.tolist() == pytest.approx([0, 0.5, 0.6, 0, 0.7, 0])
    assert owner.tolist() == [0, 0, 1, 2, 2, 2]


def test_every_segment_is_whole_rows():
    noised, _, _ = make_objective().add_noise(make_pack(range(40), padding=3), step=1)
    assert set(noised.cu_segments.tolist()) <= set(noised.cu_rows.tolist())
    starts = noised.cu_rows[:-1]
    assert torch.equal(noised.row_segment_R, segment_ids(noised.cu_segments, noised.num_tokens)[starts])


# ---- the noised pack


def corrupt_known(padding=0):
    batch = make_pack([2, 0, 4], padding)
    keys = noise.clip_keys(0, 0, batch.sample_ids_G, 0)
    clean = [(1, 0), (0, 0), (2, 3)]
    return batch, *noise_batch(batch, torch.tensor([0.5, 0.6, 0.7]), clean, keys, torch.tensor([False, True, False]))


def test_clean_frames_are_kept_bit_for_bit_at_time_zero_without_weight():
    batch, noised, _, weight_L = corrupt_known(padding=4)
    clean_L = torch.tensor([1] * 2 + [0] * 8 + [0] * 6 + [1] * 2 + [0] * 4 + [1] * 3 + [0] * 4).bool()
    assert torch.equal(noised.patches_LP[clean_L], batch.patches_LP[clean_L])
    noised_L = ~clean_L & (torch.arange(29) < 25)
    assert not torch.isclose(noised.patches_LP[noised_L], batch.patches_LP[noised_L]).any()
    assert torch.equal(weight_L, noised_L.float())
    t_L = noised.timesteps_R[segment_ids(noised.cu_rows, len(clean_L))]
    assert (t_L[clean_L] == 0).all() and (t_L[noised_L] > 0.4).all()


def test_noised_minus_time_times_target_is_the_clean_pack():
    batch = make_pack(range(60))
    noised, target_LP, _ = make_objective().add_noise(batch, step=3)
    t_L1 = noised.timesteps_R[segment_ids(noised.cu_rows, len(target_LP)), None]
    torch.testing.assert_close(noised.patches_LP - t_L1 * target_LP, batch.patches_LP, rtol=1e-5, atol=1e-5)
    noise_LP = noised.patches_LP + (1 - t_L1) * target_LP
    torch.testing.assert_close(noise_LP - target_LP, batch.patches_LP, rtol=1e-5, atol=1e-5)
    assert abs(float(noise_LP.mean())) < 0.05 and float(noise_LP.std()) == pytest.approx(1, abs=0.05)


def test_only_what_is_noised_changes():
    batch, noised, _, _ = corrupt_known()
    untouched = ("coords_L3", "grids_G3", "cu_segments", "text_SE", "cu_text", "native_size_G4", "sample_ids_G")
    for name in untouched:
        assert torch.equal(getattr(batch, name), getattr(noised, name)), name
    assert noised.drop_text_G.tolist() == [False, True, False]


def test_a_caption_that_is_missing_stays_hidden():
    batch = dataclasses.replace(make_pack(range(30)), drop_text_G=torch.tensor([True, *[False] * 29]))
    noised, _, _ = make_objective(caption_dropout=0.0).add_noise(batch, step=0)
    assert noised.drop_text_G.tolist() == [True] + [False] * 29


def test_timesteps_are_moved_by_the_size_of_the_clip():
    ids = range(4000)
    plain, _, _ = make_objective(frame_conditioning=FrameConditioningConfig(1, 0, 0, 0, 0, 0), shift_tokens=10**9).add_noise(
        make_pack(ids), 0
    )
    moved, _, _ = make_objective(frame_conditioning=FrameConditioningConfig(1, 0, 0, 0, 0, 0), shift=4.0, shift_tokens=8).add_noise(
        make_pack(ids), 0
    )
    factor = shift_factor(plain.cu_segments.diff(), ObjectiveConfig(shift=4.0, shift_tokens=8))
    odds = [t / (1 - t) for t in (plain.timesteps_R.double(), moved.timesteps_R.double())]
    torch.testing.assert_close(odds[1], factor * odds[0], rtol=1e-4, atol=0)
    assert float(odds[0].log().mean()) == pytest.approx(0, abs=0.07)
    assert float(odds[0].log().std()) == pytest.approx(1, abs=0.07)


# ---- keyed by (seed, step, sample id)


def everything(objective, ids, step, padding=0):
    """What each clip got: noised patches, target, weight, level of each token, and whether its caption is hidden."""
    noised, target, weight = objective.add_noise(make_pack(ids, padding), step)
    t_L = noised.timesteps_R[segment_ids(noised.cu_rows, len(weight))]
    clips = [by_clip(noised, values) for values in (noised.patches_LP, target, weight, t_L)]
    hidden = dict(zip(noised.sample_ids_G.tolist(), noised.drop_text_G.tolist(), strict=True))
    return {i: ([clip[i] for clip in clips], hidden[i]) for i in ids}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and a[1] == b[1]


def test_a_clip_is_noised_alike_in_any_place_and_company():
    objective = make_objective(caption_dropout=0.5)
    whole = everything(objective, list(range(20)), step=4, padding=6)
    for ids in ([19, 3, 8, 11], [3], [8, 3], list(range(19, -1, -1))):
        part = everything(objective, ids, step=4)
        assert all(same(part[i], whole[i]) for i in ids)


@pytest.mark.parametrize(("seed", "step"), [(1, 4), (0, 5)])
def test_another_seed_or_step_noises_every_clip_otherwise(seed, step):
    ids = list(range(20))
    ours, theirs = everything(make_objective(), ids, 4), everything(make_objective(seed), ids, step)
    for i in ids:
        assert not torch.isclose(ours[i][0][1], theirs[i][0][1]).any()
    assert sum(torch.equal(ours[i][0][3], theirs[i][0][3]) for i in ids) == 0


def test_clips_of_one_content_get_noise_of_their_own():
    records = [Record(i, torch.zeros(6, PATCH_DIM), (1, 2, 3), torch.zeros(1, 4), (8, 8, 1, 0)) for i in range(3)]
    _, target, _ = make_objective().add_noise(make_batch(records, 18), 0)
    assert not torch.isclose(target[:6], target[6:12]).any() and not torch.isclose(target[6:12], target[12:]).any()


# ---- validation


def test_validation_noises_whole_clips_to_one_level_and_shows_every_caption():
    objective, batch = make_objective(caption_dropout=0.9), make_pack(range(12), padding=5)
    noised, target, weight = objective.noise_to(batch, 0.3, stream=100)
    assert torch.equal(noised.cu_rows, batch.cu_segments) and not noised.drop_text_G.any()
    assert noised.timesteps_R.tolist() == pytest.approx([0.3] * 12)
    assert weight.tolist() == [1.0] * batch.num_tokens + [0.0] * 5
    torch.testing.assert_close(noised.patches_LP - 0.3 * target, batch.patches_LP, rtol=1e-5, atol=1e-5)


def test_validation_noise_is_fixed_by_seed_stream_and_sample_id():
    batch = make_pack([3, 5, 4])
    _, target, _ = make_objective().noise_to(batch, 0.3, stream=100)
    alone, other_level = (make_objective().noise_to(make_pack([5]), t, 100)[1] for t in (0.3, 0.9))
    assert torch.equal(by_clip(batch, target)[5], alone) and torch.equal(alone, other_level)
    for objective, stream in ((make_objective(seed=1), 100), (make_objective(), 101)):
        assert not torch.isclose(objective.noise_to(make_pack([5]), 0.3, stream)[1], alone).any()
    for step in range(50):  # no training step sees it
        assert not torch.isclose(make_objective().add_noise(make_pack([5]), step)[1], alone).all(-1).any()


def test_no_number_of_noise_is_used_twice():
    batch = make_pack(range(5))
    records_of_zeros = dataclasses.replace(batch, patches_LP=torch.zeros_like(batch.patches_LP))
    _, noise_LP, _ = make_objective().add_noise(records_of_zeros, 0)
    assert len(noise_LP.unique()) == noise_LP.numel()


# ---- the loss


def test_loss_is_the_mean_square_over_the_noised_tokens():
    prediction, target = torch.randn(2, 6, PATCH_DIM, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.tensor([1, 0, 1, 1, 0, 0]).double()
    loss = velocity_error(prediction, target, weight)
    by_hand = ((prediction - target)[[0, 2, 3]] ** 2).sum() / PATCH_DIM
    torch.testing.assert_close(loss.squared_error_sum, by_hand)
    assert loss.tokens == 3 and isinstance(loss.tokens, int)
    assert (loss.squared_error_L[[1, 4, 5]] == 0).all() and float(loss.squared_error_L.sum()) == pytest.approx(float(by_hand))


def test_a_model_that_knows_the_velocity_has_no_loss():
    objective, batch = make_objective(), make_pack(range(30), padding=11)
    _, target, weight = objective.add_noise(batch, 2)
    loss = velocity_error(target + 1e6 * (1 - weight[:, None]), target, weight)  # wrong where there is no weight
    assert float(loss.squared_error_sum) == 0 and loss.tokens == int(weight.sum())
    zero = velocity_error(torch.zeros_like(target), target, weight)
    assert float(zero.squared_error_sum / zero.tokens) == pytest.approx(float(target[weight > 0].square().mean()), rel=1e-5)


def test_gradient_is_twice_the_error_where_there_is_weight_and_zero_elsewhere():
    objective, batch = make_objective(), make_pack(range(10), padding=3)
    _, target, weight = objective.add_noise(batch, 0)
    prediction = torch.zeros_like(target).requires_grad_()
    velocity_error(prediction, target, weight).squared_error_sum.backward()
    torch.testing.assert_close(prediction.grad, -2 * target * weight[:, None] / PATCH_DIM)


def test_a_kept_token_is_noised_as_in_the_whole_clip():
    """Token dropping: rows, levels, noise and weight of what is left are those of the whole clip, token by token."""
    ids, objective = list(range(40)), make_objective(3)
    whole, target, weight = objective.add_noise(make_pack(ids), 5)
    draw, records, kept = torch.Generator().manual_seed(1), [], []
    for record in unpacked(ids):
        tokens = len(record.patches_LP)
        places = torch.randperm(tokens, generator=draw)[: max(1, tokens // 3)].sort().values
        records.append(dataclasses.replace(record, patches_LP=record.patches_LP[places], positions_L=places))
        kept.append(places)
    fewer, fewer_target, fewer_weight = objective.add_noise(make_batch(records, sum(map(len, kept)) + 3), 5)
    here = torch.cat([places + first for places, first in zip(kept, whole.cu_segments.tolist(), strict=False)])
    count = fewer.num_tokens
    assert count == len(here) and bool((fewer.cu_rows.diff() > 0).all())
    assert torch.equal(fewer.patches_LP[:count], whole.patches_LP[here])
    assert torch.equal(fewer_target[:count], target[here])
    assert torch.equal(fewer_weight[:count], weight[here]) and not fewer_weight[count:].any()
    levels = [batch.timesteps_R.repeat_interleave(batch.cu_rows.diff()) for batch in (fewer, whole)]
    assert torch.equal(levels[0], levels[1][here]) and len(levels[0].unique()) > 10

"""The objective: which tokens are noised and which stay clean, independent of where a clip is in a pack."""

import dataclasses
from collections import Counter

import pytest
import torch

from megasora.batch import segment_ids
from megasora.config import FrameConditioningConfig, ObjectiveConfig
from megasora.data.pack import Record, make_batch
from megasora.diffusion import noise
from megasora.diffusion.flow import FlowMatching, build_rows, draw_clean_frames, draw_rows, velocity_error
from megasora.diffusion.timesteps import shift_factor

PATCH_DIM = 7  # odd, so that the noise's pairs do not divide it
GRIDS = [(1, 2, 3), (2, 2, 2), (5, 1, 2), (3, 3, 1), (9, 1, 1)]
EVEN = FrameConditioningConfig(none=1, first=1, last=1, head=1, tail=1, both=1)


def make_records(ids):
    """The content of clip `i` depends only on `i`."""
    records = []
    for i in ids:
        grid = GRIDS[i % len(GRIDS)]
        tokens = grid[0] * grid[1] * grid[2]
        patches = torch.randn(tokens, PATCH_DIM, generator=torch.Generator().manual_seed(i))
        text = torch.full((1 + i % 3, 4), float(i))
        records.append(Record(i, patches, grid, text, (16.0, 16.0, 9.0, 8.0), f"clip {i}"))
    return records


def make_pack(ids, padding=0):
    records = make_records(ids)
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


def fractions_of(frames, config, n=10_000):
    counts = Counter(draw_clean_frames(frames, u, 0.0, config) for u in grid_points(n))
    return {drawn: count / n for drawn, count in counts.items()}


# ---- which frames are clean


def test_kinds_of_frame_conditioning_have_the_configured_probabilities():
    config = FrameConditioningConfig(none=3.0, first=1.5, last=0.5, head=2.0, tail=1.0, both=2.0)
    kinds = {(0, 0): 0.3, (1, 0): 0.15 + 0.2, (0, 1): 0.05 + 0.1, (1, 1): 0.2}  # length_u = 0: the smallest k
    measured = fractions_of(9, config)
    assert measured.keys() == kinds.keys()
    for drawn, fraction in kinds.items():
        assert measured[drawn] == pytest.approx(fraction, abs=2e-4)


def test_numbers_of_clean_frames_are_uniform():
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


def test_an_image_is_never_clean_and_two_frames_are_never_clean_at_both_ends():
    assert fractions_of(1, EVEN) == {(0, 0): 1.0}
    fractions = fractions_of(2, EVEN)
    assert fractions.keys() == {(0, 0), (1, 0), (0, 1)}
    assert fractions[0, 0] == pytest.approx(0.2, abs=2e-4)


def test_frame_conditioning_and_caption_dropout_of_the_objective_have_the_configured_probabilities():
    n = 3000
    conditioning = FrameConditioningConfig(none=0.5, first=0.3, last=0.2, head=0, tail=0, both=0)
    objective = make_objective(frame_conditioning=conditioning, caption_dropout=0.25)
    ids = [2 + 5 * i for i in range(n)]  # all of 5 latent frames
    noised, _, _ = objective.add_noise(make_pack(ids), step=0)
    clean = noised.timesteps_R == 0
    rows = torch.bincount(noised.row_segment_R, minlength=n)
    first_row = torch.searchsorted(noised.row_segment_R, torch.arange(n))
    kinds = [(rows == 1), (rows == 2) & clean[first_row], (rows == 2) & ~clean[first_row]]
    for measured, fraction in zip(kinds, (0.5, 0.3, 0.2), strict=True):
        assert float(measured.double().mean()) == pytest.approx(
            fraction, abs=4 * (fraction * (1 - fraction) / n) ** 0.5
        )
    assert float(noised.drop_text_G.double().mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / n) ** 0.5)


# ---- rows


def test_a_segment_is_split_into_rows_at_its_clean_frames():
    batch = make_pack([2, 0, 4])  # grids (5, 1, 2), (1, 2, 3), (9, 1, 1)
    cu_rows, timesteps, segments = build_rows(batch, torch.tensor([0.5, 0.6, 0.7]), [(1, 0), (0, 0), (2, 3)])
    assert cu_rows.tolist() == [0, 2, 10, 16, 18, 22, 25]
    assert timesteps.tolist() == pytest.approx([0, 0.5, 0.6, 0, 0.7, 0])
    assert segments.tolist() == [0, 0, 1, 2, 2, 2]


def test_every_row_is_within_one_segment():
    noised, _, _ = make_objective().add_noise(make_pack(range(40), padding=3), step=1)
    assert set(noised.cu_segments.tolist()) <= set(noised.cu_rows.tolist())
    starts = noised.cu_rows[:-1]
    assert torch.equal(noised.row_segment_R, segment_ids(noised.cu_segments, noised.num_tokens)[starts])


# ---- the noised pack


def noise_known(padding=0):
    batch = make_pack([2, 0, 4], padding)
    keys = noise.clip_keys(0, 0, batch.sample_ids_G, 0)
    clean = [(1, 0), (0, 0), (2, 3)]
    hidden = torch.tensor([False, True, False])
    with_rows, noise_of_pack = draw_rows(batch, torch.tensor([0.5, 0.6, 0.7]), clean, keys, hidden)
    return batch, *noise_of_pack.add(with_rows)


def noise_to(objective, batch, t, stream):
    with_rows, noise_of_pack = objective.draw_at(batch, t, stream)
    return noise_of_pack.add(with_rows)


def test_clean_frames_are_unchanged_with_timestep_zero_and_loss_weight_zero():
    batch, noised, _, weight_L = noise_known(padding=4)
    clean_L = torch.tensor([1] * 2 + [0] * 8 + [0] * 6 + [1] * 2 + [0] * 4 + [1] * 3 + [0] * 4).bool()
    assert torch.equal(noised.patches_LP[clean_L], batch.patches_LP[clean_L])
    noised_L = ~clean_L & (torch.arange(29) < 25)
    assert not torch.isclose(noised.patches_LP[noised_L], batch.patches_LP[noised_L]).any()
    assert torch.equal(weight_L, noised_L.float())
    t_L = noised.timesteps_R[segment_ids(noised.cu_rows, len(clean_L))]
    assert (t_L[clean_L] == 0).all() and (t_L[noised_L] > 0.4).all()


def test_noised_minus_timestep_times_target_is_the_clean_pack():
    batch = make_pack(range(60))
    noised, target_LP, _ = make_objective().add_noise(batch, step=3)
    t_L1 = noised.timesteps_R[segment_ids(noised.cu_rows, len(target_LP)), None]
    torch.testing.assert_close(noised.patches_LP - t_L1 * target_LP, batch.patches_LP, rtol=1e-5, atol=1e-5)
    noise_LP = noised.patches_LP + (1 - t_L1) * target_LP
    torch.testing.assert_close(noise_LP - target_LP, batch.patches_LP, rtol=1e-5, atol=1e-5)
    assert abs(float(noise_LP.mean())) < 0.05 and float(noise_LP.std()) == pytest.approx(1, abs=0.05)


def test_fields_without_noise_are_unchanged():
    batch, noised, _, _ = noise_known()
    unchanged = ("coords_L3", "grids_G3", "cu_segments", "text_SE", "cu_text", "native_size_G4", "sample_ids_G")
    for name in unchanged:
        assert torch.equal(getattr(batch, name), getattr(noised, name)), name
    assert noised.drop_text_G.tolist() == [False, True, False]


def test_an_empty_caption_stays_hidden():
    batch = dataclasses.replace(make_pack(range(30)), drop_text_G=torch.tensor([True, *[False] * 29]))
    noised, _, _ = make_objective(caption_dropout=0.0).add_noise(batch, step=0)
    assert noised.drop_text_G.tolist() == [True] + [False] * 29


def test_timesteps_are_shifted_by_the_size_of_the_clip():
    ids = range(4000)
    plain, _, _ = make_objective(
        frame_conditioning=FrameConditioningConfig(1, 0, 0, 0, 0, 0), shift_tokens=10**9
    ).add_noise(make_pack(ids), 0)
    shifted, _, _ = make_objective(
        frame_conditioning=FrameConditioningConfig(1, 0, 0, 0, 0, 0), shift=4.0, shift_tokens=8
    ).add_noise(make_pack(ids), 0)
    factor = shift_factor(plain.cu_segments.diff(), ObjectiveConfig(shift=4.0, shift_tokens=8))
    odds = [t / (1 - t) for t in (plain.timesteps_R.double(), shifted.timesteps_R.double())]
    torch.testing.assert_close(odds[1], factor * odds[0], rtol=1e-4, atol=0)
    assert float(odds[0].log().mean()) == pytest.approx(0, abs=0.07)
    assert float(odds[0].log().std()) == pytest.approx(1, abs=0.07)


# ---- keyed by (seed, step, sample id)


def noise_by_clip(objective, ids, step, padding=0):
    """Of each clip: [noised patches, target, weight, timestep of each token], and whether its caption is hidden."""
    noised, target, weight = objective.add_noise(make_pack(ids, padding), step)
    t_L = noised.timesteps_R[segment_ids(noised.cu_rows, len(weight))]
    clips = [by_clip(noised, values) for values in (noised.patches_LP, target, weight, t_L)]
    hidden = dict(zip(noised.sample_ids_G.tolist(), noised.drop_text_G.tolist(), strict=True))
    return {i: ([clip[i] for clip in clips], hidden[i]) for i in ids}


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and a[1] == b[1]


def test_noise_of_a_clip_does_not_depend_on_its_position_or_the_other_clips():
    objective = make_objective(caption_dropout=0.5)
    every = noise_by_clip(objective, list(range(20)), step=4, padding=6)
    for ids in ([19, 3, 8, 11], [3], [8, 3], list(range(19, -1, -1))):
        fewer = noise_by_clip(objective, ids, step=4)
        assert all(equal(fewer[i], every[i]) for i in ids)


@pytest.mark.parametrize(("seed", "step"), [(1, 4), (0, 5)])
def test_another_seed_or_step_changes_the_noise_of_every_clip(seed, step):
    ids = list(range(20))
    first, second = noise_by_clip(make_objective(), ids, 4), noise_by_clip(make_objective(seed), ids, step)
    for i in ids:
        assert not torch.isclose(first[i][0][1], second[i][0][1]).any()
    assert sum(torch.equal(first[i][0][3], second[i][0][3]) for i in ids) == 0


def test_clips_of_equal_content_get_different_noise():
    records = [Record(i, torch.zeros(6, PATCH_DIM), (1, 2, 3), torch.zeros(1, 4), (8, 8, 1, 0)) for i in range(3)]
    _, target, _ = make_objective().add_noise(make_batch(records, 18), 0)
    assert not torch.isclose(target[:6], target[6:12]).any() and not torch.isclose(target[6:12], target[12:]).any()


# ---- validation


def test_validation_noises_all_frames_to_one_timestep_and_hides_no_caption():
    objective, batch = make_objective(caption_dropout=0.9), make_pack(range(12), padding=5)
    noised, target, weight = noise_to(objective, batch, 0.3, stream=100)
    assert torch.equal(noised.cu_rows, batch.cu_segments) and not noised.drop_text_G.any()
    assert noised.timesteps_R.tolist() == pytest.approx([0.3] * 12)
    assert weight.tolist() == [1.0] * batch.num_tokens + [0.0] * 5
    torch.testing.assert_close(noised.patches_LP - 0.3 * target, batch.patches_LP, rtol=1e-5, atol=1e-5)


def test_validation_noise_is_a_function_of_seed_stream_and_sample_id():
    batch = make_pack([3, 5, 4])
    _, target, _ = noise_to(make_objective(), batch, 0.3, stream=100)
    alone, other_timestep = (noise_to(make_objective(), make_pack([5]), t, 100)[1] for t in (0.3, 0.9))
    assert torch.equal(by_clip(batch, target)[5], alone) and torch.equal(alone, other_timestep)
    for objective, stream in ((make_objective(seed=1), 100), (make_objective(), 101)):
        assert not torch.isclose(noise_to(objective, make_pack([5]), 0.3, stream)[1], alone).any()
    for step in range(50):  # no training step uses it
        assert not torch.isclose(make_objective().add_noise(make_pack([5]), step)[1], alone).all(-1).any()


def test_no_element_of_the_noise_is_used_twice():
    batch = make_pack(range(5))
    zeros = dataclasses.replace(batch, patches_LP=torch.zeros_like(batch.patches_LP))
    _, noise_LP, _ = make_objective().add_noise(zeros, 0)
    assert len(noise_LP.unique()) == noise_LP.numel()


# ---- the loss


def test_loss_is_the_mean_square_over_the_noised_tokens():
    prediction, target = torch.randn(2, 6, PATCH_DIM, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.tensor([1, 0, 1, 1, 0, 0]).double()
    loss = velocity_error(prediction, target, weight)
    by_hand = ((prediction - target)[[0, 2, 3]] ** 2).sum() / PATCH_DIM
    torch.testing.assert_close(loss.squared_error_sum, by_hand)
    assert loss.tokens == 3 and loss.tokens.dtype == torch.int64
    assert (loss.squared_error_L[[1, 4, 5]] == 0).all() and float(loss.squared_error_L.sum()) == pytest.approx(
        float(by_hand)
    )


def test_the_exact_velocity_has_zero_loss():
    objective, batch = make_objective(), make_pack(range(30), padding=11)
    _, target, weight = objective.add_noise(batch, 2)
    loss = velocity_error(target + 1e6 * (1 - weight[:, None]), target, weight)  # wrong where the weight is 0
    assert float(loss.squared_error_sum) == 0 and loss.tokens == int(weight.sum())
    zero = velocity_error(torch.zeros_like(target), target, weight)
    assert float(zero.squared_error_sum / zero.tokens) == pytest.approx(
        float(target[weight > 0].square().mean()), rel=1e-5
    )


def test_gradient_is_twice_the_error_at_noised_tokens_and_zero_elsewhere():
    objective, batch = make_objective(), make_pack(range(10), padding=3)
    _, target, weight = objective.add_noise(batch, 0)
    prediction = torch.zeros_like(target).requires_grad_()
    velocity_error(prediction, target, weight).squared_error_sum.backward()
    torch.testing.assert_close(prediction.grad, -2 * target * weight[:, None] / PATCH_DIM)


def test_token_dropping_does_not_change_the_noise_of_the_remaining_tokens():
    """Timestep, noise, target and weight of each remaining token are those in the whole clip."""
    ids, objective = list(range(40)), make_objective(3)
    whole, target, weight = objective.add_noise(make_pack(ids), 5)
    generator, records, positions = torch.Generator().manual_seed(1), [], []
    for record in make_records(ids):
        tokens = len(record.patches_LP)
        positions_l = torch.randperm(tokens, generator=generator)[: max(1, tokens // 3)].sort().values
        records.append(dataclasses.replace(record, patches_LP=record.patches_LP[positions_l], positions_L=positions_l))
        positions.append(positions_l)
    fewer, fewer_target, fewer_weight = objective.add_noise(make_batch(records, sum(map(len, positions)) + 3), 5)
    index_L = torch.cat([p + first for p, first in zip(positions, whole.cu_segments.tolist(), strict=False)])
    count = fewer.num_tokens
    assert count == len(index_L) and bool((fewer.cu_rows.diff() > 0).all())
    assert torch.equal(fewer.patches_LP[:count], whole.patches_LP[index_L])
    assert torch.equal(fewer_target[:count], target[index_L])
    assert torch.equal(fewer_weight[:count], weight[index_L]) and not fewer_weight[count:].any()
    timesteps = [batch.timesteps_R.repeat_interleave(batch.cu_rows.diff()) for batch in (fewer, whole)]
    assert torch.equal(timesteps[0], timesteps[1][index_L]) and len(timesteps[0].unique()) > 10

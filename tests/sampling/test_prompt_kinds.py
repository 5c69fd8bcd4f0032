"""Every kind of prompt against its known answer: the denoiser is exact for a data set of moving shapes.

The codec is a complete DCT, so clips survive it to within a grey level, and samples can be compared with rendered
frames.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from optimal_denoiser import HEADINGS, OptimalDenoiser, longer, moving_shapes

from megasora.batch import segment_ids
from megasora.codec import build_codec
from megasora.config import CodecConfig, Config, SampleConfig, TextConfig
from megasora.data.pack import Record, make_batch
from megasora.diffusion.flow import build_rows
from megasora.diffusion.samplers import integrate
from megasora.sampling import timeline as kinds
from megasora.sampling.sampler import Sampler
from megasora.testing.clips import render
from megasora.text import build_text_encoder

HEIGHT, WIDTH = 16, 24  # px; a shape needs 12 frames around the torus
RED_RIGHT = "a red circle moves right"


@pytest.fixture(scope="module")
def denoiser():
    codec = build_codec(CodecConfig(channels=3 * 4 * 8 * 8))
    encoder = build_text_encoder(TextConfig())
    return OptimalDenoiser(codec, lambda caption: encoder.encode([caption])[0])


# ---- the denoiser itself


def pack_of(denoiser, captions, grids, head=0, drop=None):
    """A clean pack of clip 3 of each caption and grid, padded, and its rows with `head` clean frames."""
    records = []
    for i, (caption, grid) in enumerate(zip(captions, grids, strict=True)):
        text = denoiser.encode_caption(caption)
        records.append(Record(i, denoiser.data(grid, text)[3].float(), grid, text, (1.0, 1.0, 1.0, 1.0), caption))
    batch = make_batch(records, sum(len(r.patches_LP) for r in records) + 5)
    if drop is not None:
        batch = dataclasses.replace(batch, drop_text_G=torch.tensor(drop))
    return batch, build_rows(batch, torch.ones(len(records)), [(head, 0)] * len(records))


def solve(denoiser, batch, rows, seed=0, steps=6):
    """The clips [l, P] of the pack, sampled by Euler steps from noise at rows with timestep 1."""
    cu_rows, timesteps_R, segment_R = rows
    row_L = segment_ids(cu_rows, len(batch.patches_LP))
    scale_R = timesteps_R.float()

    def velocity(x, t):
        noised = dataclasses.replace(
            batch, patches_LP=x, cu_rows=cu_rows, timesteps_R=scale_R * t, row_segment_R=segment_R
        )
        return denoiser([noised])[0]

    noise = torch.randn(batch.patches_LP.shape, generator=torch.Generator().manual_seed(seed))
    start = torch.where(scale_R[row_L, None] > 0, noise, batch.patches_LP)
    x = integrate(velocity, start, [torch.tensor(1 - i / steps) for i in range(steps + 1)], "euler")
    return x[: batch.num_tokens].split(batch.cu_segments.diff().tolist())


def nearest_clip(x_NlP, x_lP):
    """(index of the closest clip, largest difference to it)."""
    error_N = (x_NlP - x_lP).abs().amax((1, 2))
    return int(error_N.argmin()), float(error_N.min())


def test_the_posterior_mean_equals_bayes_rule_of_a_data_set_of_numbers(denoiser):
    toy, grid = OptimalDenoiser(denoiser.codec, denoiser.encode_caption), (2, 1, 1)
    clips = [(0.0, 0.0), (1.0, 0.0), (1.0, 3.0)]
    x_NlP = torch.tensor(clips).double()[..., None]
    toy.encoded[grid], toy.captions = {"": x_NlP, "x": x_NlP[:2]}, {denoiser.encode_caption("x").numpy().tobytes(): "x"}
    x_t, t = (0.9, 0.8), (0.5, 0.25)

    def density(clip):
        return math.exp(-sum(((a - (1 - s) * b) / s) ** 2 / 2 for a, b, s in zip(x_t, clip, t, strict=True)))

    for caption, chosen in ((denoiser.encode_caption("x"), clips[:2]), (None, clips)):
        total = sum(map(density, chosen))
        expected = [[sum(density(clip) * clip[i] for clip in chosen) / total] for i in range(2)]
        mean = toy.posterior_mean(torch.tensor(x_t)[:, None], torch.tensor(t)[:, None], grid, caption)
        assert mean.flatten().tolist() == pytest.approx(sum(expected, []), rel=1e-5)


def test_its_velocity_leads_from_noise_to_one_clip_of_the_caption_in_every_segment(denoiser):
    captions, grids, found = ["a yellow circle moves left", RED_RIGHT], [(2, 2, 3), (3, 2, 2)], set()
    batch, rows = pack_of(denoiser, captions, grids)
    for seed in range(3):
        for caption, grid, x_lP in zip(captions, grids, solve(denoiser, batch, rows, seed), strict=True):
            index, error = nearest_clip(denoiser.data(grid, denoiser.encode_caption(caption)), x_lP)
            assert error < 1e-3
            found.add((caption, index))
    assert len(found) > 2  # another clip for another noise


def test_a_clean_frame_selects_its_continuation_and_a_hidden_caption_allows_every_clip(denoiser):
    batch, rows = pack_of(denoiser, [RED_RIGHT], [(3, 2, 3)], head=2)
    assert float((solve(denoiser, batch, rows)[0] - batch.patches_LP[:18]).abs().max()) < 1e-3
    hidden, rows = pack_of(denoiser, [RED_RIGHT], [(3, 2, 3)], drop=[True])
    every = denoiser.data((3, 2, 3), None)
    found = [nearest_clip(every, solve(denoiser, hidden, rows, seed)[0]) for seed in range(6)]
    assert max(error for _, error in found) < 1e-3
    assert len({index // 12 for index, _ in found}) > 1  # 12 clips of each caption


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_part_of_a_longer_clip_is_a_clip_of_the_data(denoiser, heading):
    spec = next(s for _, s in moving_shapes(HEIGHT, WIDTH, 5) if s.direction == heading)
    whole = render(longer(spec, 6, 20))
    assert np.array_equal(whole[6:11], render(spec))
    for start in (0, 7, 15):
        caption, found, difference = denoiser.nearest(whole[start : start + 5])
        assert difference == 0 and found.direction == heading and caption == f"a red circle moves {heading}"


# ---- kinds of prompts

YELLOW_RIGHT, RED_LEFT = "a yellow circle moves right", "a red circle moves left"
GREY_LEVELS = 2  # of 255: two conversions from float


@pytest.fixture(scope="module")
def sampler(denoiser):
    config = Config(sample=SampleConfig(solver="euler", num_inference_steps=6, guidance_scale=1.0, size="16x24"))
    config.codec.channels = denoiser.codec.channels
    return Sampler(config, denoiser, "exact", 0, codec=denoiser.codec)


def spec_of(frames):
    """A red circle that moves right, from 8.5 px."""
    return moving_shapes(HEIGHT, WIDTH, frames)[4][1]


def truth(frames):
    """Its frames."""
    return render(spec_of(frames))


def sample(sampler, timelines, **settings):
    return [store.frames_FHWC for store in sampler.sample(timelines, sampler.override_settings(**settings))]


def assert_same(video, expected, grey_levels=GREY_LEVELS):
    assert video.shape == expected.shape and video.dtype == np.uint8
    difference = np.abs(video.astype(int) - expected).max((1, 2, 3))
    assert difference.max() <= grey_levels, f"difference of each frame: {difference.tolist()}"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("frames", [1, 8, 13])
def test_text_gives_a_clip_of_its_caption_and_another_seed_another_one(sampler, denoiser, frames, guidance):
    timelines = [sampler.timeline(YELLOW_RIGHT, frames=frames, seed=seed) for seed in range(4)]
    starts = set()
    for video in sample(sampler, timelines, guidance_scale=guidance):
        caption, spec, difference = denoiser.nearest(video)
        assert video.shape == (frames, HEIGHT, WIDTH, 3) and difference <= GREY_LEVELS
        assert spec.color == "yellow" and (frames == 1 or caption == YELLOW_RIGHT)
        starts.add(spec.start_x)
    assert len(starts) > 1


def test_without_guidance_by_the_caption_every_clip_can_come(sampler, denoiser):
    timelines = [sampler.timeline(YELLOW_RIGHT, frames=5, seed=seed) for seed in range(6)]
    found = {denoiser.nearest(video)[0] for video in sample(sampler, timelines, guidance_scale=0.0)}
    assert len(found) > 1


def test_at_scale_zero_a_negative_prompt_is_what_is_sampled(sampler, denoiser):
    """v = v_negative + scale (v_caption - v_negative)."""
    timelines = [sampler.timeline(RED_RIGHT, frames=9, seed=s, negative_prompt=YELLOW_RIGHT) for s in range(2)]
    for scale, expected in ((0.0, YELLOW_RIGHT), (1.0, RED_RIGHT)):
        for video in sample(sampler, timelines, guidance_scale=scale):
            caption, _, difference = denoiser.nearest(video)
            assert caption == expected and difference <= GREY_LEVELS


def test_an_image_and_a_caption_give_the_clip_that_begins_with_it(sampler):
    assert_same(sampler.video(RED_RIGHT, image=truth(1)[0], frames=11), truth(11))


def test_the_opposite_caption_reverses_the_motion_from_the_same_image(sampler):
    reversed_spec = dataclasses.replace(spec_of(9), direction="left")
    assert_same(sampler.video(RED_LEFT, image=truth(1)[0], frames=9), render(reversed_spec))


NEW = (1, 4, 6, 9)  # frames: a part of a latent frame, one, more than one


def test_a_video_is_continued_to_the_frame_whatever_its_length(sampler):
    """Given frames are no whole latent frames in most of these."""
    lengths = [(given, NEW[given % 4]) for given in range(1, 10)]
    wholes = [truth(given + new) for given, new in lengths]
    for (given, new), whole in zip(lengths, wholes, strict=True):
        video = sampler.extend(whole[:given], RED_RIGHT, frames=new)
        assert np.array_equal(video[:given], whole[:given])
        assert_same(video, whole)


def test_what_comes_before_a_video_leads_to_its_first_frame(sampler):
    lengths = [(given, NEW[given % 4]) for given in range(2, 10)]
    for given, new in lengths:
        whole = truth(given + new)
        video = sampler.prepend(whole[new:], RED_RIGHT, frames=new)
        assert np.array_equal(video[new:], whole[new:])
        assert_same(video, whole)


@pytest.mark.parametrize(("before", "gap", "after"), [(5, 4, 4), (5, 8, 4), (1, 3, 5), (6, 5, 7), (9, 2, 3)])
def test_two_videos_are_connected_by_the_motion_between_them(sampler, before, gap, after):
    whole = truth(before + gap + after)
    video = sampler.connect(whole[:before], whole[before + gap :], RED_RIGHT, frames=gap)
    assert np.array_equal(video[:before], whole[:before]) and np.array_equal(video[-after:], whole[-after:])
    assert_same(video, whole)


@pytest.mark.parametrize("given", [3, 5, 8])
def test_a_loop_ends_one_step_before_its_start(sampler, given):
    """The motion closes after 12 frames."""
    once = truth(12)
    assert_same(sampler.loop(once[:given], RED_RIGHT, frames=12 - given), once)


@pytest.mark.parametrize("numbers", [(0, 8), (0, 4, 8), (0, 5, 12), (0, 3)])
def test_key_frames_are_reached_at_their_time(sampler, numbers):
    frames = numbers[-1] + 1
    whole = truth(frames)
    assert_same(sampler.keyframes(RED_RIGHT, {i: whole[i] for i in numbers}, frames=frames), whole)


@pytest.mark.parametrize("frames", [6, 9])
def test_a_last_image_is_the_last_frame_and_the_motion_before_it_is_right_to_two_steps(sampler, denoiser, frames):
    """Not exact: its latent frame holds the frames before it too, which are taken to be still at first."""
    last = truth(frames)[-1]
    video = sampler.video(RED_RIGHT, last_image=last, frames=frames)
    assert_same(video[-1:], last[None])
    caption, spec, difference = denoiser.nearest(video[:-1])
    assert caption == RED_RIGHT and difference <= GREY_LEVELS
    late = (spec.start_x - spec_of(frames).start_x + WIDTH / 2) % WIDTH - WIDTH / 2
    assert abs(late) <= 4  # px, two steps


def test_an_edit_changes_what_the_caption_says_and_keeps_the_motion(sampler):
    source = truth(9)
    expected = render(dataclasses.replace(spec_of(9), color="yellow"))
    assert_same(sampler.edit(source, YELLOW_RIGHT, 0.7), expected)


def test_an_edit_of_strength_one_keeps_nothing_and_its_seed_decides(sampler, denoiser):
    videos = [sampler.edit(truth(5), YELLOW_RIGHT, 1.0, seed=seed) for seed in range(4)]
    found = [denoiser.nearest(video) for video in videos]
    assert {caption for caption, _, _ in found} == {YELLOW_RIGHT}
    assert len({spec.start_x for _, spec, _ in found}) > 1


def test_an_edit_changes_no_pixel_outside_of_its_mask(sampler):
    source = truth(9)
    mask = np.zeros(source.shape[:3], bool)
    mask[:, 2:14, :13] = True  # no border of tokens
    edited = sampler.edit(source, YELLOW_RIGHT, 0.7, mask=mask)
    assert np.array_equal(edited[~mask], source[~mask])
    expected = render(dataclasses.replace(spec_of(9), color="yellow"))
    assert_same(edited, np.where(mask[..., None], expected, source))


@pytest.mark.parametrize("is_backward", [False, True])
def test_a_clip_of_four_times_the_window_is_one_motion(sampler, is_backward):
    whole = truth(36)
    settings = {"window_frames": 9, "context_frames": 5}
    if is_backward:
        assert_same(sampler.prepend(whole[-5:], RED_RIGHT, frames=31, **settings), whole)
    else:
        assert_same(sampler.extend(whole[:5], RED_RIGHT, frames=31, **settings), whole)


def test_a_long_clip_of_a_caption_alone_is_one_clip_of_the_data(sampler, denoiser):
    video = sampler.video(YELLOW_RIGHT, frames=30, window_frames=9, context_frames=5)
    caption, _, difference = denoiser.nearest(video)
    assert caption == YELLOW_RIGHT and difference <= GREY_LEVELS


def test_prompts_of_all_kinds_in_one_call_give_what_each_gives_alone(sampler):
    whole, free = truth(13), sampler.timeline(RED_RIGHT, (HEIGHT, WIDTH))
    timelines = [
        dataclasses.replace(free, frames=5, seed=3),
        kinds.keyframes(dataclasses.replace(free, frames=9), {0: whole[0]}),
        kinds.extend(dataclasses.replace(free, frames=6), whole[:5]),
        kinds.prepend(dataclasses.replace(free, frames=5), whole[5:9]),
        kinds.connect(dataclasses.replace(free, frames=4), whole[:5], whole[9:]),
    ]
    together = sample(sampler, timelines)
    for timeline, video in zip(timelines, together, strict=True):
        assert_same(video, sample(sampler, [timeline])[0], 1)

"""Rotary frequencies for clips larger than those trained on: which of them change, and to what."""

import math

import pytest
import torch

from megasora.kernels.rope3d import rope_frequency
from megasora.kernels.rope_scaling import RopeScaling, intrinsic_pair

SPLIT, BASE = (16, 12, 12), 10_000.0  # 8 pairs of time, 6 of height, 6 of width
PLAIN = (1.0, 1.0, 1.0)
TRAINED = (13, 30, 45)
MODELS = {  # elements of the time axis, base, latent frames trained on; index and period of the pair the authors change
    "CogVideoX": (16, 10_000.0, 13, 1, 20),
    "HunyuanVideo": (16, 256.0, 33, 3, 50),
}


def frequencies(scaling=None, scale=PLAIN, split=SPLIT, base=BASE):
    return rope_frequency(split, base, scale, scaling)


@pytest.mark.parametrize("model", MODELS)
def test_the_intrinsic_pair_is_that_of_the_paper(model):
    size, base, trained, expected, period = MODELS[model]
    time = rope_frequency((size, 0, 0), base, PLAIN)
    pair = intrinsic_pair(time.tolist(), trained)
    assert pair == expected and round(2 * math.pi / float(time[pair])) == period


@pytest.mark.parametrize("frames", [21, 26, 52, 400])
def test_riflex_changes_one_frequency_of_time_to_nine_tenths_of_a_turn_over_the_clip(frames):
    plain, scaled = frequencies(), frequencies(RopeScaling("riflex", TRAINED, (frames, 90, 90)))
    assert (plain != scaled).nonzero().tolist() == [[1]]
    assert float(scaled[1]) == pytest.approx(0.9 * 2 * math.pi / frames, rel=1e-6)


@pytest.mark.parametrize("frames", [1, 13, 19])
def test_riflex_changes_nothing_in_a_clip_shorter_than_the_intrinsic_period(frames):
    assert torch.equal(frequencies(RopeScaling("riflex", TRAINED, (frames, 90, 90))), frequencies())


@pytest.mark.parametrize("trained", [1, 5, 13, 33])
@pytest.mark.parametrize("factor", [1, 2, 4, 9])
@pytest.mark.parametrize(("size", "base"), [(12, 10_000.0), (16, 256.0), (44, 10_000.0)])
def test_no_later_frame_repeats_the_first_in_the_intrinsic_pair(trained, factor, size, base):
    frames, pair = factor * trained, intrinsic_pair(rope_frequency((size, 0, 0), base, PLAIN).tolist(), trained)
    scaling = RopeScaling("riflex", (trained, 1, 1), (frames, 1, 1))
    plain, scaled = (
        torch.arange(frames) * rope_frequency((size, 0, 0), base, PLAIN, s)[pair] / (2 * math.pi)
        for s in (None, scaling)
    )  # turns of each frame
    assert (scaled[1:] > 0).all() and (scaled < 1).all()
    if frames > 1 and plain[1] * frames > 1:
        assert float(scaled[-1]) == pytest.approx(0.9 * (frames - 1) / frames)
    else:
        assert torch.equal(scaled, plain)


def test_without_a_pair_slower_than_the_clips_riflex_changes_nothing():
    assert intrinsic_pair(frequencies(split=(2, 0, 0)).tolist(), 7) is None
    scaling = RopeScaling("riflex", (7, 1, 1), (28, 1, 1))
    assert torch.equal(frequencies(scaling, split=(2, 0, 0)), frequencies(split=(2, 0, 0)))
    assert torch.equal(frequencies(scaling, split=(0, 8, 8)), frequencies(split=(0, 8, 8)))


def test_ntk_is_the_ntk_factor_of_the_axes_that_are_larger():
    scaled = frequencies(RopeScaling("ntk", TRAINED, (52, 45, 20)))
    assert torch.equal(scaled, frequencies(scale=(4.0, 1.5, 1.0)))
    assert torch.equal(frequencies(RopeScaling("ntk", TRAINED, (13, 2, 1))), frequencies())


def test_scaling_comes_on_top_of_the_ntk_factor_of_the_model():
    own = (2.0, 1.5, 1.0)
    scaled = frequencies(RopeScaling("ntk", TRAINED, (52, 45, 20)), own)
    torch.testing.assert_close(scaled, frequencies(scale=(8.0, 2.25, 1.0)))
    # the periods of the slowed time axis are longer: the pair is found among these
    changed = frequencies(RopeScaling("riflex", TRAINED, (52, 1, 1)), (8.0, 1.0, 1.0)) != frequencies(
        scale=(8.0, 1.0, 1.0)
    )
    assert changed.nonzero().tolist() == [[1]]
    assert 2 * math.pi / frequencies(scale=(8.0, 1.0, 1.0))[1] == pytest.approx(20 * 8 ** (2 / 14), rel=0.01)


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="method=yarn must be one of ntk, riflex"):
        RopeScaling("yarn", TRAINED, TRAINED)
    with pytest.raises(ValueError, match=r"trained_grid=\(0, 1, 1\) must be three numbers above 0"):
        RopeScaling("ntk", (0, 1, 1), TRAINED)
    with pytest.raises(ValueError, match=r"grid=\(4, 1\) must be three numbers above 0"):
        RopeScaling("ntk", TRAINED, (4, 1))

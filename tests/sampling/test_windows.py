"""Windows of long clips: every frame is sampled once, and all boundaries are those of latent frames."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.sampling.windows import Window, group_of_frames, plan_windows, round_up, whole

plans = given(
    frames=st.integers(1, 400), window=st.integers(9, 40), context=st.integers(1, 30), ft=st.sampled_from([1, 4, 8])
)


def test_a_clip_that_fits_is_one_window_of_whole_latent_frames_before_its_end():
    assert plan_windows(9, 9, 5, 4, False) == [Window(0, 9)]
    assert plan_windows(7, 9, 5, 4, False) == [Window(0, 7)]
    assert plan_windows(7, 9, 5, 4, True) == [Window(-2, 7)]
    assert plan_windows(1, 9, 5, 4, False) == [Window(0, 1)]


def test_known_plans():
    assert plan_windows(17, 9, 5, 4, False) == [Window(0, 9), Window(4, 13), Window(8, 17)]
    assert plan_windows(18, 9, 5, 4, False)[-1] == Window(12, 18)
    assert plan_windows(19, 9, 4, 4, True) == [Window(10, 19), Window(5, 14), Window(0, 9)]


@plans
@settings(max_examples=200, deadline=None)
def test_forward_windows_begin_with_whole_latents_of_the_frames_before(frames, window, context, ft):
    windows = plan_windows(frames, window, context, ft, False)
    done = 0
    for w in windows:
        shared = done - w.first
        assert w.frames <= whole(window, ft) and w.end <= frames
        assert w.first >= 0 and w.end > done  # each adds frames
        assert shared == 0 if w is windows[0] else shared >= 1 and (shared - 1) % ft == 0
        done = w.end
    assert done == frames


@plans
@settings(max_examples=200, deadline=None)
def test_backward_windows_end_with_whole_latents_of_the_frames_after(frames, window, context, ft):
    windows = plan_windows(frames, window, context, ft, True)
    start = frames
    for w in windows:
        shared = w.end - start
        assert w.frames <= whole(window, ft) and (w.frames - 1) % ft == 0
        assert w.first < start
        assert shared == 0 if w is windows[0] else shared >= ft and shared % ft == 0
        start = w.first
    assert -ft < start <= 0  # less than a latent frame is left out


@pytest.mark.parametrize("ft", [1, 2, 4, 8])
def test_sizes_are_those_of_causal_codecs(ft):
    for frames in range(1, 40):
        assert (whole(frames, ft) - 1) % ft == 0 and frames - ft < whole(frames, ft) <= frames
        assert (round_up(frames, ft) - 1) % ft == 0 and frames <= round_up(frames, ft) < frames + ft


def test_the_first_frame_is_a_latent_frame_of_its_own():
    assert np.array_equal(group_of_frames(10, 4), [0, 1, 1, 1, 1, 2, 2, 2, 2, 3])
    assert np.array_equal(group_of_frames(3, 1), [0, 1, 2])

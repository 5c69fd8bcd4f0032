"""Given frames and causal latents: which latent frames are given, in the first pass and in the second."""

import numpy as np
import pytest
import torch

from megasora.codec import build_codec
from megasora.config import CodecConfig
from megasora.errors import MegaSoraError
from megasora.sampling.frame_store import FrameStore
from megasora.sampling.latents import (
    ClipCoder,
    WindowFrames,
    first_pass,
    nearest_known,
    needs_second_pass,
    restore_given,
    second_pass,
    start_levels,
)
from megasora.sampling.timeline import Given, Timeline, connect, edit, extend, keyframes, prepend
from megasora.sampling.windows import Window

FT, CHANNELS = 4, 768  # all coefficients: the codec changes nothing
CODER = ClipCoder(build_codec(CodecConfig(channels=CHANNELS)), (1, 1, 1))


def make_frames(frames, height=8, width=16, seed=0):
    return np.random.default_rng(seed).integers(60, 200, (frames, height, width, 3), dtype=np.uint8)


def make_window(given, frames=13, level=0.0):
    """The frames of a clip of which those numbered in `given` are given."""
    levels, known = np.ones(frames, np.float32), np.zeros(frames, bool)
    levels[list(given)], known[list(given)] = level, True
    return WindowFrames(make_frames(frames), levels, known)


def starts(given, level=0.0):
    return first_pass(make_window(given, level=level), CODER, CHANNELS).start_T.tolist()


def test_latent_frames_of_given_frames_are_given():
    assert starts([]) == [1, 1, 1, 1]
    assert starts([0]) == [0, 1, 1, 1]
    assert starts(range(5)) == [0, 0, 1, 1]
    assert starts(range(5, 13)) == [1, 1, 0, 0]
    assert starts([0, *range(9, 13)]) == [0, 1, 1, 0]
    assert starts(range(13)) == [0, 0, 0, 0]


def test_frames_of_a_part_of_a_group_are_given_unless_a_whole_group_is_beside_them():
    assert starts([12]) == [1, 1, 1, 0]  # a last image
    assert starts([0, 6, 12]) == [0, 1, 0, 0]  # key frames
    assert starts(range(7)) == [0, 0, 1, 1]  # two frames of group 2, beside group 1
    assert starts([7, 8, *range(9, 13)]) == [1, 1, 1, 0]


def test_a_level_between_is_that_of_the_group():
    assert starts(range(13), level=0.6) == pytest.approx([0.6] * 4)
    window = make_window(range(13), level=0.6)
    window.level_F[:5] = 0  # of an earlier window
    assert first_pass(window, CODER, CHANNELS).start_T.tolist() == pytest.approx([0, 0, 0.6, 0.6])
    assert start_levels(np.array([0, 0, 0, 0.5, 0.6], np.float32), 4, 2).tolist() == pytest.approx([0, 0.6])


def test_a_given_start_has_the_latents_of_its_frames_alone():
    window = make_window(range(5))
    latents = first_pass(window, CODER, CHANNELS)
    alone = CODER.encode(window.frames_FHWC[:5])
    torch.testing.assert_close(latents.patches_LP[: len(alone)], alone)


def test_free_frames_are_still_where_latents_of_given_ones_need_them():
    assert nearest_known(np.array([0, 0, 1, 0, 0, 0, 1, 0], bool)).tolist() == [2, 2, 2, 2, 2, 6, 6, 6]
    window = make_window([12])
    decoded = CODER.decode(first_pass(window, CODER, CHANNELS).patches_LP, (4, 1, 2), (8, 16))
    assert np.abs(decoded.astype(int) - window.frames_FHWC[12]).max() <= 1  # all 13 frames


def test_only_given_frames_after_free_ones_need_a_second_pass():
    assert not needs_second_pass(make_window([]))
    assert not needs_second_pass(make_window(range(5)))
    assert not needs_second_pass(make_window(range(13), level=0.5))
    assert needs_second_pass(make_window([12]))
    assert needs_second_pass(make_window([0, *range(9, 13)]))


def test_the_second_pass_has_the_given_frames_in_the_context_of_the_sampled_ones():
    window, sampled = make_window([0, *range(7, 13)]), make_frames(13, seed=1)
    latents = second_pass(window, sampled, CODER, 0.5)
    assert latents.start_T.tolist() == [0, 0.5, 0.5, 0]  # group 2 has two given frames
    expected = sampled.copy()
    expected[[0, *range(7, 13)]] = window.frames_FHWC[[0, *range(7, 13)]]
    decoded = CODER.decode(latents.patches_LP, (4, 1, 2), (8, 16))
    assert np.abs(decoded.astype(int) - expected).max() <= 1


def test_groups_given_in_part_have_their_given_frames_again():
    window, sampled = make_window([0, 6, 12]), make_frames(13, seed=1)
    restored = restore_given(window, sampled, CODER)
    for i in (6, 12):
        assert np.abs(restored[i].astype(int) - window.frames_FHWC[i]).max() <= 1
    others = [i for i in range(13) if i not in (6, 12)]
    assert np.abs(restored[others].astype(int) - sampled[others]).max() <= 1
    assert restore_given(make_window([0]), sampled, CODER) is sampled


def test_tokens_outside_of_a_mask_are_held():
    window = make_window(range(13), level=1.0)
    mask = np.zeros((13, 8, 16), bool)
    mask[6, 3, 9] = True  # one pixel of one frame: group 2, second token
    latents = first_pass(WindowFrames(window.frames_FHWC, window.level_F, window.is_known_F, mask), CODER, CHANNELS)
    changes = ~latents.held_L.view(4, 2)
    assert changes.nonzero().tolist() == [[2, 1]]
    assert latents.start_T.tolist() == [1, 1, 1, 1] and latents.patches_LP.abs().sum() > 0


def test_sides_that_are_no_multiples_are_padded_and_cropped():
    frames = make_frames(5, 11, 13)
    assert CODER.grid(5, 11, 13) == (2, 2, 2)
    decoded = CODER.decode(CODER.encode(frames), (2, 2, 2), (11, 13))
    assert decoded.shape == frames.shape and np.abs(decoded.astype(int) - frames).max() <= 1


# ---------------------------------------------------------------- timelines and the frames of a store

CLIP = Timeline("a clip", 8, 16, 6, 12.0)


def test_given_frames_of_videos_are_returned_themselves():
    video = make_frames(5)
    for clip, new in ((extend(CLIP, video), (5, 11)), (prepend(CLIP, video), (0, 6))):
        assert clip.frames == 11 and clip.new_frames == [new]
        store = FrameStore(clip)
        assert np.array_equal(np.delete(store.frames_FHWC, np.arange(*new), axis=0), video)
        assert np.array_equal(store.is_done_F, clip.levels() == 0)
    assert prepend(CLIP, video).is_backward and not extend(CLIP, video).is_backward
    between = connect(CLIP, video, make_frames(4, seed=1))
    assert between.new_frames == [(5, 11)] and between.frames == 15 and not between.is_backward


def test_given_images_are_sampled_with_the_clip():
    clip = keyframes(CLIP, {5: make_frames(1)[0]})
    assert clip.new_frames == [(0, 6)] and clip.is_backward and clip.levels().tolist() == [1, 1, 1, 1, 1, 0]
    store = FrameStore(clip)
    assert not store.is_done_F.any()
    window = store.window(Window(-3, 6))
    assert window.level_F.tolist() == [1] * 8 + [0] and np.array_equal(
        window.frames_FHWC[8], clip.given[0].frames_FHWC[0]
    )
    sampled = make_frames(9, seed=2)
    store.complete(Window(-3, 6), sampled)
    assert np.array_equal(store.frames_FHWC, sampled[3:]) and store.is_done_F.all()


def test_a_later_window_is_given_the_frames_of_an_earlier_one():
    clip = edit(CLIP, make_frames(6), 0.5)
    store, sampled = FrameStore(clip), make_frames(3, seed=2)
    store.complete(Window(0, 3), sampled)
    window = store.window(Window(1, 6))
    assert window.level_F.tolist() == [0, 0, 0.5, 0.5, 0.5] and window.is_known_F.all()
    assert np.array_equal(window.frames_FHWC[:2], sampled[1:])
    assert np.array_equal(window.frames_FHWC[2:], clip.given[0].frames_FHWC[3:])


def test_pixels_outside_of_a_mask_stay_as_given():
    mask = np.random.default_rng(3).random((6, 8, 16)) < 0.5
    clip = edit(CLIP, make_frames(6), 1.0, mask)
    store, sampled = FrameStore(clip), make_frames(6, seed=2)
    store.complete(Window(0, 6), sampled)
    assert np.array_equal(store.frames_FHWC[mask], sampled[mask])
    assert np.array_equal(store.frames_FHWC[~mask], clip.given[0].frames_FHWC[~mask])


def test_a_store_in_a_file_is_the_same(tmp_path):
    clip = extend(CLIP, make_frames(5))
    store = FrameStore(clip, tmp_path / "frames.npy")
    store.complete(Window(0, 11), make_frames(11, seed=1))
    del store
    expected = np.concatenate([make_frames(5), make_frames(11, seed=1)[5:]])
    assert np.array_equal(np.load(tmp_path / "frames.npy"), expected)


def test_frames_of_another_size_or_outside_raise():
    for call, words in (
        (lambda: keyframes(CLIP, {6: make_frames(1)[0]}), "frame 6, but the clip has frames 0 to 5"),
        (lambda: extend(CLIP, make_frames(5, 8, 8)), "has 8x8 pixels, the clip 8x16"),
        (lambda: edit(CLIP, make_frames(6), 0.0), "--edit 0 must be above 0"),
        (lambda: edit(CLIP, make_frames(6), 1.5), "--edit 1.5 must be above 0"),
        (lambda: edit(CLIP, make_frames(6), float("nan")), "--edit nan must be"),
        (lambda: edit(CLIP, make_frames(6), 0.5, np.ones((5, 8, 16), bool)), r"--mask has the shape \[5, 8, 16\]"),
    ):
        with pytest.raises(MegaSoraError, match=words):
            call()
    assert Given(3, make_frames(2)).end == 5

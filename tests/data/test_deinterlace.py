"""Interlaced frames are deinterlaced, one for one; all others stay as they are."""

from __future__ import annotations

import numpy as np
import pytest

from megasora.config import IngestConfig
from megasora.data.clip_reader import read_clip
from megasora.data.deinterlace import deinterlace
from megasora.testing.video_files import Encoding, encode_video

HEIGHT, WIDTH = 96, 128


def bar_at(x: int) -> np.ndarray:
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[:, x : x + 12] = 255
    return picture


def woven(frames: int, step: int) -> np.ndarray:
    """Frames of two moments each, top field first: a bar that moves by `step` pixels per field."""
    made = [bar_at(8 + 2 * step * number) for number in range(frames)]
    for number, picture in enumerate(made):
        picture[1::2] = bar_at(8 + 2 * step * number + step)[1::2]
    return np.stack(made)


def combing(frames_FHWC: np.ndarray) -> float:
    """The part of pixels that differ much from both neighbours above and below."""
    luma = frames_FHWC.astype(int).mean(-1)
    above, below = luma[:, 1:-1] - luma[:, :-2], luma[:, 1:-1] - luma[:, 2:]
    return float(((np.abs(above) > 60) & (np.abs(below) > 60) & (above * below > 0)).mean())


INTERLACED = {
    "a.mp4": Encoding(options={"x264-params": "tff=1", "qp": "5"}),
    "a.mkv": Encoding(
        container="matroska", codec="mpeg2video", options={"flags": "+ildct+ilme", "qmax": "2", "bf": "2"}
    ),
}


@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced_frames_come_out_without_combs_one_for_one(name, tmp_path):
    made = woven(9, 4)
    assert combing(made) > 0.02
    clip = read_clip(encode_video(tmp_path / name, made, 25, INTERLACED[name]), IngestConfig())
    assert clip.fps == 25.0 and clip.frames_FHWC.shape == made.shape
    assert combing(clip.frames_FHWC) < 0.002
    columns = clip.frames_FHWC.astype(float).mean((1, 3))
    centres = (columns * np.arange(WIDTH)).sum(1) / columns.sum(1)
    assert centres[0] == pytest.approx(13.5, abs=1) or centres[0] == pytest.approx(
        17.5, abs=1
    )  # one of its two moments
    assert np.diff(centres) == pytest.approx(8, abs=0.7)  # and of each frame the same one


@pytest.mark.parametrize("name", INTERLACED)
def test_a_still_scene_that_is_interlaced_keeps_its_lines(name, tmp_path):
    picture = np.random.default_rng(0).integers(0, 2, (HEIGHT // 4, 1, 1)).repeat(4, 0).repeat(WIDTH, 1).repeat(3, 2)
    path = encode_video(tmp_path / name, [np.uint8(255 * picture)] * 6, 25, INTERLACED[name])
    frames = read_clip(path, IngestConfig()).frames_FHWC
    assert np.abs(frames[1:-1].astype(int) - 255 * picture).mean() < 8


def test_thinning_and_excerpts_count_interlaced_frames_as_others(tmp_path):
    path = encode_video(tmp_path / "a.mp4", woven(10, 4), 10, INTERLACED["a.mp4"])
    whole, thin = read_clip(path, IngestConfig()), read_clip(path, IngestConfig(max_fps=5))
    assert thin.fps == 5.0 and np.array_equal(thin.frames_FHWC, whole.frames_FHWC[::2])


class Frame:
    """A progressive frame that no filter may touch."""

    interlaced_frame = False


def test_progressive_frames_pass_unchanged_and_without_delay():
    frames = [(number, Frame()) for number in range(5)]
    passed = []
    for pair in deinterlace(iter(frames)):
        passed.append(pair)
        assert pair is not None and len(passed) == pair[0] + 1
    assert [frame for _, frame in passed] == [frame for _, frame in frames]

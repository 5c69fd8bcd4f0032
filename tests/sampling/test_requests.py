"""Requests: of flags and of lines; plans: which files and frames they need; seams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megasora.config import Config
from megasora.data.clip_writer import write_image, write_video
from megasora.errors import MegaSoraError
from megasora.sampling.clip_plan import ClipPlan
from megasora.sampling.inputs import Source, read_mask
from megasora.sampling.requests import Keyframe, Length, Request
from megasora.sampling.seams import Steps, psnr
from megasora.testing.video_files import gradient


def request(**values) -> Request:
    return Request.from_values({"prompt": "x", **values})


@pytest.mark.parametrize(
    ("text", "fps", "frames"),
    [
        ("16", 8, 16),
        ("2s", 8, 16),
        ("0.4s", 8, 3),
        ("0.4s", 12.5, 5),
        ("0.01s", 8, 1),
        (".5s", 29.97, 15),
        ("3.", 8, 3),
    ],
)
def test_a_length_is_frames_or_the_nearest_number_of_frames_of_seconds(text, fps, frames):
    assert Length.parse(text, "--extend").frames(fps) == frames


@pytest.mark.parametrize("text", ["", "0", "0s", "-1", "1.5", "2 s", "s", "1e3", "two", "inf", "٣", "9" * 40])
def test_other_lengths_are_errors(text):
    with pytest.raises(MegaSoraError, match="--extend .* is not a length"):
        Length.parse(text, "--extend")


def test_the_name_of_a_key_frame_may_have_colons():
    assert Keyframe.parse("a:b.png:16", "--keyframes") == Keyframe(Path("a:b.png"), 16)


KINDS = {
    "text": {}, "image": {"last_image": "a.png"}, "keyframes": {"keyframes": ["a.png:0"]}, "loop": {"loop": True},
    "extend": {"extend": "2s"}, "prepend": {"prepend": 3}, "edit": {"edit": 0.6, "mask": "m.png"},
    "connect": {"connect": ["a.mp4", "b.mp4"], "frames": 9},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_gives_the_same_request_as_the_values_that_describe_it(kind, tmp_path):
    video = {"video": "in.mp4"} if kind in ("extend", "prepend", "loop", "edit") else {}
    made = request(**KINDS[kind], **video, seed=7)
    assert made.kind == kind and Request.from_values(made.values()) == made
    moved = Request.from_values({"prompt": "x", **KINDS[kind], **video}, tmp_path)
    assert all(path.parent == tmp_path for path in moved.files.values()) and len(moved.files) == len(made.files)
    absolute = moved.relative_to(Path("/elsewhere"))
    assert absolute == moved


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"promt": "x"}, "unknown key 'promt'; known keys: prompt, "),
        ({"prompt": 3}, "--prompt 3 is not a text"),
        ({"frames": "9"}, "--frames 9 is not a whole number"),
        ({"frames": True}, "--frames True is not a whole number"),
        ({"frames": 9.5}, "--frames 9.5 is not a whole number"),
        ({"fps": 1e999}, "--fps inf is not a number"),
        ({"fps": [8]}, r"--fps \[8\] is not a number"),
        ({"video": 3, "loop": True}, "--video 3 is not the path"),
        ({"video": "a\0b", "loop": True}, "--video .* is not the path"),
        ({"video": "a.mp4", "loop": 1}, "--loop 1 is not true or false"),
        ({"video": "a.mp4", "extend": 1.5}, "--extend 1.5 is not"),
        ({"connect": ["a.mp4"]}, "--connect .* is not two videos"),
        ({"keyframes": {"a.png": 0}}, "--keyframes .* is not a list"),
        ({"seed": 1 << 63}, "--seed 9223372036854775808 must be"),
        ({"prompt": "a\x7fb"}, "control character"),
    ],
)
def test_values_of_the_wrong_kind_are_errors_that_name_the_key(values, words):
    with pytest.raises(MegaSoraError, match=words):
        request(**values)


def test_null_is_as_if_the_key_were_absent():
    assert request(image=None, loop=None, edit=None, frames=None) == request()


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_video(gradient(7, 16, 24), 8, folder / "a.mp4")
    write_video(gradient(4, 16, 24), 8, folder / "b.mp4")
    white = np.zeros((16, 24, 3), np.uint8)
    white[:, 12:] = 255
    write_image(white, folder / "mask.png")
    return folder


def plan(media, **values) -> ClipPlan:
    return ClipPlan.of(Request.from_values({"prompt": "x", **values}, media), Config())


def test_a_source_gives_its_first_and_its_last_frames_without_keeping_the_others(media):
    source = Source.open("--video", media / "a.mp4", Config().ingest)
    frames = np.stack(list(source.frames()))
    assert (source.size, source.num_frames, source.fps) == ((16, 24), 7, 8) and len(frames) == 7
    assert np.array_equal(source.first(3), frames[:3]) and np.array_equal(source.last(3), frames[-3:])
    assert np.array_equal(source.first(99), frames) and np.array_equal(source.last(99), frames)


def test_sources_keep_their_size_where_an_ingest_would_shrink_them(media):
    limits = Config().ingest
    limits.fit_height, limits.max_fps = 8, 2.0
    source = Source.open("--video", media / "a.mp4", limits)
    assert source.size == (16, 24) and source.num_frames == 7


def test_a_mask_of_one_frame_holds_for_all_frames(media):
    mask = read_mask(Source.open("--mask", media / "mask.png", Config().ingest), 7)
    assert mask.shape == (7, 16, 24) and not mask[:, :, :12].any() and mask[:, :, 12:].all()


@pytest.mark.parametrize(
    ("values", "new", "frames", "seams"),
    [
        ({"frames": 6}, 6, 6, []),
        ({"keyframes": ["mask.png:0", "mask.png:9"]}, 10, 10, []),
        ({"video": "a.mp4", "extend": "0.4s"}, 3, 10, [7]),
        ({"video": "a.mp4", "prepend": 5}, 5, 12, [5]),
        ({"video": "a.mp4", "loop": True, "frames": 4}, 4, 11, [7, 0]),
        ({"connect": ["a.mp4", "b.mp4"], "frames": 3}, 3, 14, [7, 10]),
        ({"video": "a.mp4", "edit": 0.5}, 7, 7, []),
    ],
)
def test_a_plan_counts_the_frames_of_the_result_and_knows_its_seams(media, values, new, frames, seams):
    made = plan(media, **values)
    assert (made.new_frames, made.num_frames, made.seams) == (new, frames, seams)
    if "mask.png" not in str(values) and made.video:
        assert made.fps == 8


def test_a_changed_file_is_found_when_it_is_read(media, tmp_path):
    (tmp_path / "a.mp4").write_bytes((media / "a.mp4").read_bytes())
    source = Source.open("--video", tmp_path / "a.mp4", Config().ingest)
    (tmp_path / "a.mp4").write_bytes((media / "b.mp4").read_bytes())
    with pytest.raises(MegaSoraError, match="--video .*a.mp4 has 4 frames, its header 7"):
        list(source.frames())


# ---------------------------------------------------------------- seams


def moving(levels: list[float]) -> Steps:
    steps = Steps()
    for level in levels:
        steps.add(np.full((4, 4, 3), level, np.uint8))
    return steps


def test_the_ratio_of_a_seam_is_its_step_over_the_usual_step_around_it():
    steps = moving([0, 2, 4, 6, 18, 20, 22])  # frame 4 begins with a step of 12
    assert steps.seams([4]) == [{"frame": 4, "step": 12.0, "ratio": 6.0}]
    assert steps.seams([2]) == [{"frame": 2, "step": 2.0, "ratio": 1.0}]


def test_the_seam_of_a_loop_is_between_its_last_and_its_first_frame():
    steps = moving([0, 5, 10, 15, 20, 15, 10, 15])
    assert steps.seams([5, 0])[1] == {"frame": 0, "step": 15.0, "ratio": 3.0}


def test_other_seams_and_stills_do_not_hide_a_jump():
    steps = moving([0, 0, 100, 200, 200])
    assert steps.seams([2, 3])[0] == {"frame": 2, "step": 100.0, "ratio": 400.0}  # of at least a quarter grey level
    assert moving([7]).seams([]) == [] and moving([3, 9]).seams([1]) == [{"frame": 1, "step": 6.0, "ratio": None}]


def test_psnr_is_that_of_its_definition():
    a = np.zeros((2, 2, 3), np.uint8)
    assert psnr(a, a) == 99.0 and psnr(a + 16, a) == pytest.approx(20 * np.log10(255 / 16))

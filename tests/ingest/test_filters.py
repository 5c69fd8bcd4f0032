"""Filters of an ingest: duration, motion, contrast and scores, and the clips that they reject."""

from __future__ import annotations

import numpy as np
import pytest

from megasora.config import IngestConfig
from megasora.data.media import RejectedClip
from megasora.errors import MegaSoraError
from megasora.ingest.filters import MAX_THUMBNAILS, FrameStats, Thumbnails, check_duration, load_score_functions


def flat(*levels: int, size=(48, 80)) -> list[np.ndarray]:
    return [np.full((*size, 3), level, np.uint8) for level in levels]


def alternating(count: int, size=(48, 80), dark=0, light=200) -> list[np.ndarray]:
    """Two halves, dark and light, that are swapped every frame."""
    frame = np.full((*size, 3), dark, np.uint8)
    frame[:, : size[1] // 2] = light
    return [frame if i % 2 else frame[:, ::-1] for i in range(count)]


def measured(frames, **limits) -> dict[str, float]:
    stats = FrameStats("a.mp4", IngestConfig(**limits))
    assert all(a is b for a, b in zip(stats.observe(iter(frames)), frames, strict=True))  # frames are not changed
    return stats.values()


def rejection(work) -> tuple[str, str]:
    with pytest.raises(RejectedClip) as error:
        work()
    return error.value.filter_name, error.value.reason


def test_motion_contrast_and_brightness_have_their_known_values():
    values = measured(flat(10, 30, 20))
    assert values["contrast"] == pytest.approx(0, abs=1e-3)
    assert (values["motion"], values["brightness"]) == (pytest.approx(15, abs=1e-3), pytest.approx(20, abs=1e-3))
    values = measured(alternating(4))
    assert values["motion"] == pytest.approx(200, abs=1e-3)
    assert (values["contrast"], values["brightness"]) == (pytest.approx(100, abs=1e-3), pytest.approx(100, abs=1e-3))


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (16, 16), (1080, 1920)])
def test_statistics_work_at_every_frame_size(size):
    values = measured(flat(0, 100, size=size))
    assert values["motion"] == pytest.approx(100, abs=1e-2)


def test_static_and_blank_clips_are_rejected_and_images_are_not_static():
    still = alternating(1) * 5
    assert rejection(lambda: measured(still, min_motion=0.5)) == ("motion and contrast", "static")
    assert measured(still[:1], min_motion=0.5)["motion"] == 0
    assert rejection(lambda: measured(flat(0, 0, 0), min_contrast=2.0)) == ("motion and contrast", "blank")
    assert rejection(lambda: measured(flat(255), min_contrast=2.0)) == ("motion and contrast", "blank")
    measured(alternating(5), min_motion=199, min_contrast=99)


def test_videos_outside_the_duration_limits_are_rejected_and_images_are_not():
    def run(count, fps, **limits):
        return len(list(check_duration(iter(flat(*[1] * count)), fps, "a.mp4", IngestConfig(**limits))))

    limits = dict(min_seconds=1.0, max_seconds=2.0)
    assert [run(n, 12.0, **limits) for n in (12, 24)] == [12, 24]
    assert rejection(lambda: run(11, 12.0, **limits)) == ("duration", "too few seconds")
    assert rejection(lambda: run(25, 12.0, **limits)) == ("duration", "too many seconds")
    assert run(1, 0.0, **limits) == 1


def test_a_clip_that_is_too_long_is_not_decoded_to_its_end():
    def endless():
        while True:
            yield flat(0)[0]

    assert rejection(lambda: list(check_duration(endless(), 10.0, "a", IngestConfig(max_seconds=1.0))))[0] == "duration"


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (25, [0, 10, 20]), (639, range(0, 639, 10))])
def test_scores_get_one_thumbnail_per_second(count, expected):
    thumbnails = Thumbnails(10.0)
    for _ in thumbnails.observe(np.full((300, 600, 3), i % 256, np.uint8) for i in range(count)):
        pass
    assert [int(x[0, 0, 0]) for x in thumbnails.frames] == [i % 256 for i in expected]
    assert thumbnails.frames[0].shape == (100, 200, 3)


def test_scores_of_a_long_clip_get_a_bounded_number_of_evenly_spaced_thumbnails():
    thumbnails = Thumbnails(1.0)
    for _ in thumbnails.observe(np.full((2, 2, 3), i // 8, np.uint8) for i in range(2000)):
        pass
    levels = [int(x[0, 0, 0]) for x in thumbnails.frames]
    assert MAX_THUMBNAILS // 2 < len(levels) <= MAX_THUMBNAILS
    assert levels == list(range(0, 250, 4))


def test_scores_are_called_by_name_and_may_reject_a_clip(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(
        "def light(frames_FHWC, fps): return frames_FHWC.mean()\n"
        "def never(frames_FHWC, fps): return None\n"
        "def nan(frames_FHWC, fps): return float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    thumbnails = Thumbnails(1.0)
    list(thumbnails.observe(iter(flat(10, 20))))
    assert thumbnails.scores("a", load_score_functions(["my_scores:light"])) == {"light": 15.0}
    for name in ("never", "nan"):
        functions = load_score_functions([f"my_scores:{name}"])
        assert rejection(lambda f=functions: thumbnails.scores("a", f)) == ("scores", f"score {name}")
    for wrong in ("no_such_module:f", "my_scores:no_such_function"):
        with pytest.raises(MegaSoraError, match=f"ingest.scores: {wrong}"):
            load_score_functions([wrong])

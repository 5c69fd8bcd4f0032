"""Rates and lengths of clips follow from their time stamps, whatever the header says."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megasora.config import IngestConfig
from megasora.data.clip_reader import open_clip, read_clip
from megasora.data.frame_schedule import FrameTimes, build_schedule
from megasora.data.media import Media, RejectedClip
from megasora.ingest.filters import check_duration
from megasora.testing.video_files import Encoding, copy_packets, encode_video, gradient

MILLISECOND = Fraction(1, 1000)
MEDIA = Media(Path("a.mkv"))
NTSC, FILM, NTSC60 = Fraction(30_000, 1001), Fraction(24_000, 1001), Fraction(60_000, 1001)


def schedule_of(ticks, tick=MILLISECOND, **settings):
    times = {key: settings.pop(key) for key in ("last_duration", "declared_fps") if key in settings}
    return build_schedule(FrameTimes(np.array(ticks, np.int64), tick, **times), MEDIA, **settings)


def player(seconds: list[float], instants: np.ndarray) -> list[int]:
    """The frame on the screen at each instant: the last that has started."""
    return [max(number for number, start in enumerate(seconds) if start <= instant + 1e-9) for instant in instants]


def numbers_of(schedule) -> list[int]:
    return np.repeat(np.arange(len(schedule.repeats_N)), schedule.repeats_N).tolist()


@pytest.mark.parametrize("tick", [MILLISECOND, Fraction(1, 90_000), Fraction(1, 600)])
@pytest.mark.parametrize("rate", [Fraction(8), FILM, Fraction(25), NTSC, Fraction(30), NTSC60, Fraction(25, 2)])
@pytest.mark.parametrize("rounded", [round, int])
def test_rounded_stamps_of_a_constant_rate_give_that_rate_and_every_frame_once(rate, tick, rounded):
    ticks = [rounded(number / rate / tick) for number in range(200)]
    for declared in (rate, Fraction(1000), None):
        schedule = schedule_of(ticks, tick, declared_fps=declared)
        exact = declared == rate or rate.denominator in (1, 1001)
        assert schedule.fps == (float(rate) if exact else pytest.approx(float(rate), rel=float(2 * tick * rate) / 199))
        assert schedule.repeats_N.tolist() == [1] * 200
        assert schedule.seconds == pytest.approx([n / float(rate) for n in range(200)], abs=float(tick))


def test_frames_less_than_a_quarter_of_a_period_from_their_place_are_each_returned_once():
    places = np.arange(100) * 40.0
    ticks = np.rint(places + np.random.default_rng(0).uniform(-9.5, 9.5, 100)).astype(int)
    schedule = schedule_of(ticks)
    assert schedule.repeats_N.tolist() == [1] * 100 and schedule.fps == 25.0


@pytest.mark.parametrize("max_fps", [0.0, 10.0, 4.0])
def test_a_variable_rate_becomes_the_frames_that_a_player_shows(max_fps):
    rng = np.random.default_rng(1)
    for _ in range(20):
        steps = rng.choice([*[40] * 7, 80, 200, 1000], 60)
        ticks = np.concatenate([[0], np.cumsum(steps)])
        schedule = schedule_of(ticks, max_fps=max_fps)
        fps = max_fps or 25.0
        starts = np.arange(round((ticks[-1] + 40) / 1000 * fps)) / fps
        assert schedule.fps == fps
        assert numbers_of(schedule) == player((ticks / 1000).tolist(), starts + 0.02)
        assert np.all(np.diff(schedule.seconds) > 0)
        assert schedule.seconds == pytest.approx(starts, abs=max(0.04, 1 / fps))


def test_a_held_last_frame_is_repeated_as_long_as_it_is_shown():
    assert schedule_of(range(0, 480, 40), last_duration=40).repeats_N.tolist() == [1] * 12
    held = schedule_of(range(0, 480, 40), last_duration=1000)
    assert held.repeats_N.tolist() == [1] * 11 + [25] and held.fps == 25.0
    assert held.seconds == pytest.approx(np.arange(36) / 25)


def test_times_that_cannot_be_made_regular_are_rejected_with_a_reason():
    ten_seconds = [0, 40, 80, 10_080, 10_120]
    assert len(schedule_of(ten_seconds).seconds) == 254
    for ticks in ([0, 40, 80, 10_081, 10_121], [0, 0, 0, 0, 40, 40, 40]):
        with pytest.raises(RejectedClip) as error_info:
            schedule_of(ticks)
        assert error_info.value.reason == "variable rate"
    with pytest.raises(RejectedClip, match="shows one frame for 20.0 s"):
        schedule_of(range(0, 480, 40), last_duration=20_000)


def test_a_tiny_period_beside_long_gaps_does_not_fill_the_memory():
    steps = np.tile([1, 1, 1, 900_000], 500)  # of 1/90,000 s
    with pytest.raises(RejectedClip, match=r"would have 4.5e\+08 frames") as error_info:
        schedule_of(np.cumsum(steps), Fraction(1, 90_000))
    assert error_info.value.reason == "variable rate"


def test_an_excerpt_of_a_variable_rate_starts_with_the_frame_on_the_screen_and_ends_in_time():
    ticks = [0, 40, 80, 1000, 2000, 2040, 2080, 2120, 2160]
    schedule = schedule_of(ticks, start=0.5, end=2.1)
    assert schedule.fps == 25.0 and len(schedule.seconds) == 40
    assert numbers_of(schedule) == player([t / 1000 for t in ticks], 0.52 + np.arange(40) / 25)
    held = schedule_of([0, 40, 80, 1000, 1040], start=0.0, end=1.0)
    assert numbers_of(held) == [0, 1] + [2] * 23


def test_slow_videos_are_no_variable_rate():
    schedule = schedule_of([0, 60_000, 120_000])
    assert schedule.fps == pytest.approx(1 / 60) and schedule.repeats_N.tolist() == [1, 1, 1]


# ---------------------------------------------------------------- files


CONTAINERS = {
    "a.mp4": Encoding(options={"bf": "2", "crf": "5"}),
    "b.mp4": Encoding(options={"bf": "0", "crf": "5"}, muxer_options={"movflags": "frag_keyframe+empty_moov"}),
    "a.mov": Encoding(container="mov", options={"bf": "0", "crf": "5"}),
    "a.mkv": Encoding(container="matroska", options={"bf": "2", "crf": "5"}),
    "a.webm": Encoding(container="webm", codec="libvpx-vp9", options={"crf": "5"}),
    "a.avi": Encoding(container="avi", codec="mpeg4", options={"qmax": "2"}),
}


def blue_levels(frames_FHWC: np.ndarray) -> list[int]:
    """The number of each frame of `gradient`."""
    return np.rint((frames_FHWC[..., 2].mean((1, 2)) - 20) / 20).astype(int).tolist()


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("max_fps", [0.0, 6.0])
def test_frames_of_a_file_of_variable_rate_are_those_on_the_screen(name, max_fps, tmp_path):
    ticks = [0, 1, 2, 3, 4, 11, 17, 18, 19, 21]  # of 1/12 s
    path = encode_video(tmp_path / name, gradient(10, 32, 48), 12, CONTAINERS[name], ticks)
    clip = read_clip(path, IngestConfig(max_fps=max_fps))
    fps = max_fps or 12.0
    starts = np.arange(round(22 / 12 * fps)) / fps
    assert clip.fps == fps
    assert blue_levels(clip.frames_FHWC) == player([t / 12 for t in ticks], starts + 1 / 24)


@pytest.mark.parametrize("name", ["a.webm", "a.mkv"])
def test_a_header_of_1000_frames_per_second_over_24_frames_in_3_seconds_is_8_per_second(name, tmp_path):
    """As browsers record: a clock of milliseconds, and wavering stamps."""
    rng = np.random.default_rng(0)
    how = Encoding(container="webm", codec="libvpx", options={"b": "1M"}, tick=MILLISECOND)
    for count, step, waver in ((24, 125, 12), (90, 33, 12)):
        ticks = np.concatenate([[0], np.cumsum(step + rng.integers(-waver, waver + 1, count - 1))]).tolist()
        path = encode_video(tmp_path / name, [np.zeros((16, 16, 3), np.uint8)] * count, 1000, how, ticks)
        length = (ticks[-1] + step) / 1000
        clip, slow = read_clip(path, IngestConfig()), read_clip(path, IngestConfig(max_fps=8))
        assert len(clip.frames_FHWC) / clip.fps == pytest.approx(length, rel=0.02)
        assert clip.fps == pytest.approx(1000 / step, rel=0.02)
        assert slow.fps == pytest.approx(8, rel=0.02) and len(slow.frames_FHWC) == pytest.approx(8 * length, abs=1)


def test_a_held_last_frame_of_a_file_counts_as_long_as_it_is_shown(tmp_path):
    path = encode_video(tmp_path / "a.mp4", gradient(6, 32, 48), 12, Encoding(options={"bf": "0"}))
    import av

    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mp4"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        packets[-1].duration = round(1 / stream.time_base)  # 1 s
        for packet in packets:
            packet.stream = copy
            target.mux(packet)
    clip = read_clip(tmp_path / "b.mp4", IngestConfig())
    assert clip.fps == 12.0 and blue_levels(clip.frames_FHWC) == [0, 1, 2, 3, 4] + [5] * 12
    assert len(read_clip(path, IngestConfig()).frames_FHWC) == 6


def test_limits_of_seconds_hold_for_the_time_that_a_clip_takes(tmp_path):
    """Ten frames at 12 per second in the header, 22/12 s on the screen."""
    ticks = [0, 1, 2, 3, 4, 11, 17, 18, 19, 21]
    path = encode_video(tmp_path / "a.mkv", gradient(10, 32, 48), 12, CONTAINERS["a.mkv"], ticks)
    for limits, reason in (
        ({"max_seconds": 1.8}, "too many seconds"),
        ({"max_seconds": 1.9}, None),
        ({"min_seconds": 1.8}, None),
        ({"min_seconds": 1.9}, "too few seconds"),
    ):
        settings = IngestConfig(**limits)
        with open_clip(Media(path), settings) as clip:
            try:
                assert len(list(check_duration(clip.frames, clip.fps, "a", settings))) == 22 and reason is None
            except RejectedClip as error:
                assert error.reason == reason


@pytest.mark.parametrize("name", CONTAINERS)
def test_scenes_of_a_file_of_variable_rate_share_no_frame(name, tmp_path):
    """Each frame is returned with its own time stamp first, so an excerpt that starts there starts with it."""
    ticks = [0, 1, 2, 3, 4, 11, 17, 18, 19, 21]
    path = encode_video(tmp_path / name, gradient(10, 32, 48), 12, CONTAINERS[name], ticks)
    with open_clip(Media(path), IngestConfig()) as clip:
        levels, seconds = blue_levels(np.stack(list(clip.frames))), clip.timestamps
    cut = round(seconds[levels.index(6)], 6)
    for start, end, expected in ((0.0, cut, range(6)), (cut, None, range(6, 10))):
        with open_clip(Media(path, start=start, end=end), IngestConfig()) as clip:
            assert sorted(set(blue_levels(np.stack(list(clip.frames))))) == list(expected)


def test_time_stamps_do_not_depend_on_where_a_file_starts(tmp_path):
    path = encode_video(tmp_path / "a.mp4", gradient(24, 32, 48), 12, Encoding(options={"g": "6"}))
    copy_packets(path, tmp_path / "b.mkv", "matroska", start=Fraction(-5))
    for file in (path, tmp_path / "b.mkv"):
        with open_clip(Media(file, start=1.0, end=1.5), IngestConfig()) as clip:
            assert len(list(clip.frames)) == 6 and clip.fps == 12.0
            assert clip.timestamps == pytest.approx(1 + np.arange(6) / 12, abs=1e-3)

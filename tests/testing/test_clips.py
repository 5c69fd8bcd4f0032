"""Procedural clips: pixels, captions and files, and the detector that reads them back."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megasora.errors import MegaSoraError
from megasora.testing import clip_files, clips, detector

EVERYTHING = {
    "colors": tuple(clips.COLORS),
    "shapes": clips.SHAPES,
    "backgrounds": clips.BACKGROUNDS,
    "bounce_fraction": 0.3,
}
SPEC = clips.ClipSpec(
    color="red",
    shape="circle",
    direction="right",
    background="plain",
    size="small",
    speed="slow",
    motion="wrap",
    height=32,
    width=24,
    frames=9,
    fps=8,
    start_x=5.0,
    start_y=16.0,
    brightness=120,
)


def decode(path: Path) -> np.ndarray:
    """Frames of a written clip, uint8 [F, H, W, 3]."""
    if path.suffix == ".png":
        from PIL import Image

        return np.asarray(Image.open(path))[None]
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def grade(count: int, seed: int, split: str, frames_of) -> tuple[dict[str, float], float]:
    """Fraction of clips that the detector reads correctly, by word, and the largest error of a position, px."""
    correct: Counter[str] = Counter()
    worst = 0.0
    for index in range(count):
        spec, _ = clips.clip_at(seed, split, index, **EVERYTHING)
        reading = detector.detect(frames_of(spec, index))
        for word in ("color", "shape", "background", "direction"):
            truth = None if word == "direction" and spec.frames == 1 else getattr(spec, word)
            correct[word] += getattr(reading, word) == truth
        canvas = np.array([spec.width, spec.height])
        error = (reading.positions - clips.positions(spec) + canvas / 2) % canvas - canvas / 2
        worst = max(worst, float(np.abs(error).max()))  # NaN, a frame without a shape, would be lost in max():
        assert reading.presence == 1.0
    return {word: hits / count for word, hits in correct.items()}, worst


# ---------------------------------------------------------------- the detector


def test_detector_reads_every_word_of_rendered_clips():
    accuracy, worst = grade(300, 5, "train", lambda spec, _: clips.render(spec))
    assert min(accuracy.values()) >= 0.99, accuracy
    assert worst < 0.2  # px


def test_detector_reads_every_word_after_h264(tmp_path):
    def written(spec, index):
        return decode(clip_files.write_clip(spec, "a clip", tmp_path / f"clip-{index}"))

    accuracy, worst = grade(100, 6, "val", written)
    assert min(accuracy.values()) >= 0.99, accuracy
    assert worst < 0.5  # px


def test_detector_is_robust_to_lost_high_frequencies_grain_and_jitter():
    k = np.arange(8)
    scale = np.where(k == 0, np.sqrt(1 / 8), np.sqrt(2 / 8))[:, None]
    basis = scale * np.cos(np.pi * (k[None, :] + 0.5) * k[:, None] / 8)
    low = (k[:, None] + k[None, :]) < 4  # 10 of the 64 coefficients of every 8 x 8 block
    rng = np.random.default_rng(0)

    def degraded(spec, _):
        frames = clips.render(spec).astype(np.float64)
        blocks = frames.reshape(len(frames), spec.height // 8, 8, spec.width // 8, 8, 3)
        spectrum = np.einsum("ai,bj,fhiwjc->fhawbc", basis, basis, blocks) * low[:, None, :, None]
        frames = np.einsum("ai,bj,fhawbc->fhiwjc", basis, basis, spectrum).reshape(frames.shape)
        frames += rng.normal(0.0, 15.0, frames.shape)
        return np.clip(frames, 0, 255).astype(np.uint8)

    accuracy, worst = grade(100, 7, "train", degraded)
    assert min(accuracy.values()) >= 0.97, accuracy
    assert worst < 1.5  # px

    correct = 0
    for index in range(60):
        spec, _ = clips.clip_at(8, "train", index, lengths={9: 1.0}, **EVERYTHING)
        shaken = [np.roll(frame, tuple(rng.integers(-1, 2, 2)), (0, 1)) for frame in clips.render(spec)]
        correct += detector.detect(np.stack(shaken)).direction == spec.direction
    assert correct >= 58


def test_detector_finds_no_shape_in_grey_black_and_noise():
    rng = np.random.default_rng(0)
    grey = np.full((5, 32, 32, 3), 120, dtype=np.uint8)
    for frames in (grey, np.zeros_like(grey), rng.integers(0, 256, grey.shape).astype(np.uint8)):
        reading = detector.detect(frames)
        assert (reading.color, reading.shape, reading.direction) == (None, None, None)
        assert reading.presence == 0.0 and np.isnan(reading.positions).all()
    with pytest.raises(MegaSoraError, match=r"\(32, 32, 3\)"):
        detector.detect(grey[0])


def test_detector_gives_no_direction_without_movement():
    still = np.repeat(clips.render(SPEC)[:1], 9, axis=0)
    rng = np.random.default_rng(0)
    shaken = np.stack([np.roll(frame, tuple(rng.integers(-1, 2, 2)), (0, 1)) for frame in still])
    for frames in (still[:1], still, shaken):
        reading = detector.detect(frames)
        assert (reading.color, reading.shape, reading.direction) == ("red", "circle", None)


def test_detector_gives_no_color_where_two_shapes_are_mixed():
    first = clips.render(replace(SPEC, width=48))
    second = clips.render(replace(SPEC, width=48, color="green", start_x=29.0))
    half = np.arange(48)[None, None, :, None] < 24
    assert detector.detect(np.where(half, first, second)[:1]).color is None


# ---------------------------------------------------------------- pixels


def test_rendering_is_a_pure_function_of_the_spec():
    for index in range(20):
        spec, _ = clips.clip_at(1, "train", index, **EVERYTHING)
        frames = clips.render(spec)
        assert frames.dtype == np.uint8 and frames.shape == (spec.frames, spec.height, spec.width, 3)
        np.testing.assert_array_equal(frames, clips.render(replace(spec)))


def test_a_clip_depends_only_on_seed_split_and_index():
    assert clips.clip_at(3, "train", 7) == clips.clip_at(3, "train", 7)
    others = [clips.clip_at(4, "train", 7), clips.clip_at(3, "val", 7), clips.clip_at(3, "train", 8)]
    assert all(clips.clip_at(3, "train", 7)[0] != other[0] for other in others)


@pytest.mark.parametrize("direction", clips.DIRECTIONS)
@pytest.mark.parametrize("shape", clips.SHAPES)
def test_motion_on_the_torus_is_a_roll(shape, direction):
    # 2 px per frame: a full canvas of 24 px takes 12 frames, of 32 px 16.
    period = 12 if direction in ("left", "right") else 16
    axis = 1 if direction in ("left", "right") else 0
    shift = -2 if direction in ("left", "up") else 2
    for size in clips.SIZES:
        spec = replace(SPEC, shape=shape, direction=direction, size=size, frames=period + 1)
        frames = clips.render(spec)
        np.testing.assert_array_equal(frames[period], frames[0])
        for index in range(period):
            np.testing.assert_array_equal(frames[index], np.roll(frames[0], shift * index, axis))


def test_covered_area_is_the_area_of_the_shape():
    y, x = np.mgrid[:32, :32] + 0.5 - 16.3
    for diameter in clips.SIZES.values():
        areas = {"circle": np.pi / 4, "square": 1.0, "triangle": 3**-0.5}
        for shape, area in areas.items():
            covered = clips.coverage(shape, diameter, x, y).sum()
            assert covered == pytest.approx(area * diameter**2, rel=0.02), shape


def test_bouncing_shapes_stay_inside_and_first_move_in_their_direction():
    bounced = 0
    for index in range(200):
        spec, _ = clips.clip_at(2, "train", index, **(EVERYTHING | {"bounce_fraction": 1.0}))
        assert spec.motion == "bounce"
        path, diameter = clips.positions(spec), clips.SIZES[spec.size]
        reach = diameter / 3 if spec.shape == "triangle" else diameter / 2  # px; a lower bound for every shape
        assert (path >= reach - 1e-9).all()
        assert (path <= np.array([spec.width, spec.height]) - reach + 1e-9).all()
        if spec.frames > 2:
            step = np.array({"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[spec.direction])
            moved = (path[2] - path[0]) @ step
            assert moved >= 2 * clips.SPEEDS[spec.speed] - 0.7  # a triangle may reach the wall earlier
            bounced += bool(((np.diff(path, axis=0) @ step) < -1e-9).any())
    assert bounced > 50


def test_canvases_are_multiples_of_eight_and_both_wide_and_tall():
    sizes = Counter()
    for index in range(300):
        spec, _ = clips.clip_at(0, "train", index)
        assert spec.height % 8 == 0 and spec.width % 8 == 0
        assert (spec.frames - 1) % 4 == 0 and spec.fps in clips.FRAME_RATES
        sizes[np.sign(spec.width - spec.height)] += 1
    assert min(sizes[-1], sizes[0], sizes[1]) > 50


# ---------------------------------------------------------------- captions


def test_captions_are_true_and_have_optional_words_with_the_given_probability():
    counts: Counter[str] = Counter()
    moving = 0
    for index in range(400):
        spec, text = clips.clip_at(4, "train", index, **EVERYTHING)
        words = text.replace(",", "").split()
        assert f"{spec.color} {spec.shape}" in text and words[0] == "a"
        adverb = {"slow": "slowly", "fast": "quickly"}[spec.speed]
        truth = {spec.color, spec.shape, spec.size, adverb, spec.background, spec.direction}
        kinds = (clips.COLORS, clips.SHAPES, clips.SIZES, clips.BACKGROUNDS, clips.DIRECTIONS)
        known = {"slowly", "quickly"}.union(*kinds)
        assert set(words) & known <= truth
        if spec.frames == 1:
            assert not {"moves", "bounces", *clips.DIRECTIONS, "slowly", "quickly"} & set(words)
            continue
        moving += 1
        assert spec.direction in words and (spec.motion == "bounce") == ("bounces" in words)
        for kind, word in (("size", spec.size), ("speed", adverb), ("background", spec.background)):
            counts[kind] += word in words
    for kind, count in counts.items():
        assert 0.5 < count / moving < 0.7, kind


def test_captions_without_and_with_all_optional_words():
    rng = np.random.default_rng(0)
    assert clips.caption(SPEC, rng, word_probability=0.0) == "a red circle moves right"
    everything = "a small red circle moves right slowly over a plain background"
    assert clips.caption(SPEC, rng, word_probability=1.0) == everything
    image = replace(SPEC, frames=1)
    assert clips.caption(image, rng, word_probability=0.0) == "a red circle"
    assert clips.caption(image, rng, word_probability=1.0) == "a small red circle over a plain background"
    bouncing = replace(SPEC, motion="bounce", speed="fast")
    assert clips.caption(bouncing, rng, word_probability=0.0) == "a red circle bounces, first to the right"
    full = "a small red circle bounces quickly, first to the right, over a plain background"
    assert clips.caption(bouncing, rng, word_probability=1.0) == full


def test_held_out_combinations_are_balanced_and_never_in_training():
    colors, shapes, directions = (Counter(combination[i] for combination in clips.HELD_OUT) for i in range(3))
    assert colors == dict.fromkeys(clips.DEFAULT_COLORS, 1)
    assert directions == dict.fromkeys(clips.DIRECTIONS, 1)
    assert shapes == dict.fromkeys(clips.DEFAULT_SHAPES, 2)
    training, validation = set(), []
    for index in range(1500):
        spec, _ = clips.clip_at(0, "train", index)
        training.add((spec.color, spec.shape, spec.direction))
        spec, _ = clips.clip_at(0, "val", index)
        validation.append((spec.color, spec.shape, spec.direction))
    assert len(training) == 28 and not training & clips.HELD_OUT
    assert sum(combination in clips.HELD_OUT for combination in validation) == 375


@pytest.mark.parametrize("count", [16, 32, 48, 64, 128])
def test_evaluation_prompts_are_balanced(count):
    prompts = clips.evaluation_prompts(count)
    assert len(prompts) == count

    def tally(*words):
        return Counter(tuple(truth[word] for word in words) for _, truth in prompts)

    for words, cells in {
        ("color", "direction"): 16,
        ("shape", "background"): 4,
        ("color", "shape"): 8,
        ("direction", "shape"): 8,
        ("color", "background"): 8,
        ("direction", "background"): 8,
    }.items():
        assert len(tally(*words)) == cells and set(tally(*words).values()) == {count // cells}, words
    assert clips.HELD_OUT.issubset(tally("color", "shape", "direction"))
    assert len({text for text, _ in prompts}) == min(count, 64)
    for text, truth in prompts:
        expected = "a {color} {shape} moves {direction} over a {background} background"
        assert text == expected.format(**truth)


def test_a_count_of_evaluation_prompts_that_cannot_be_balanced_is_an_error():
    with pytest.raises(MegaSoraError, match="count=50"):
        clips.evaluation_prompts(50)


# ---------------------------------------------------------------- files


def test_a_written_clip_is_h264_of_exact_rate_size_and_length(tmp_path):
    import av

    for fps in clips.FRAME_RATES:
        spec = replace(SPEC, fps=fps, frames=17)
        path = clip_files.write_clip(spec, "a red circle moves right", tmp_path / f"clip-{fps}")
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
            assert stream.average_rate == Fraction(fps) and stream.frames == 17
            assert (stream.height, stream.width) == (32, 24)
            times = [frame.pts * frame.time_base for frame in container.decode(stream)]
        assert times == [Fraction(index, fps) for index in range(17)]
        assert path.with_suffix(".txt").read_text() == "a red circle moves right\n"
        data = path.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")  # faststart
    assert {path.suffix for path in tmp_path.iterdir()} == {".mp4", ".txt"}  # and no temporary file


def test_quality_of_written_clips(tmp_path):
    spec = replace(SPEC, background="striped")
    luma = np.array([0.299, 0.587, 0.114])  # yuv420p halves the chroma, so the error is that of luma
    lossy = decode(clip_files.write_clip(spec, "x", tmp_path / "lossy")) @ luma - clips.render(spec) @ luma
    assert 10 * np.log10(255**2 / (lossy**2).mean()) > 36  # dB
    exact = decode(clip_files.write_clip(spec, "x", tmp_path / "exact", lossless=True))
    np.testing.assert_array_equal(exact, clips.render(spec))
    image = clip_files.write_clip(replace(spec, frames=1), "x", tmp_path / "image")
    assert image.suffix == ".png"
    np.testing.assert_array_equal(decode(image), clips.render(replace(spec, frames=1)))


def test_data_set_does_not_depend_on_the_number_of_processes(tmp_path):
    for processes in (1, 2):
        out = tmp_path / str(processes)
        train, val = clip_files.write_dataset(out, 60, 6, 3, processes=processes, show_progress=False)
        assert (train.split, train.clips, val.split, val.clips) == ("train", 60, "val", 6)
    one, two = ({p.relative_to(out): p.read_bytes() for p in out.rglob("*.*")} for out in tmp_path.iterdir())
    assert len(one) == 2 * 66 and one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_unknown_choices_for_a_data_set_are_an_error(tmp_path):
    with pytest.raises(MegaSoraError, match="colors: pink is unknown"):
        clip_files.write_dataset(tmp_path / "out", 4, 4, colors=("red", "pink"), show_progress=False)
    with pytest.raises(MegaSoraError, match="bounce_fraction=2"):
        clip_files.write_dataset(tmp_path / "out", 4, 4, bounce_fraction=2, show_progress=False)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def make_clips():
    path = Path(__file__).parents[2] / "tools" / "make_clips.py"
    module_spec = importlib.util.spec_from_file_location("make_clips", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def test_make_clips_writes_pairs_and_a_summary(make_clips, tmp_path, capsys):
    out = tmp_path / "clips"
    arguments = ["--clips", "12", "--val-clips", "4", "--shapes", "triangle", "--processes", "1"]
    assert make_clips.main(["--out", str(out), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "train" in shown and "12" in shown
    captions = sorted((out / "train").glob("*.txt"))
    assert [path.stem for path in captions] == [f"clip-{index:06d}" for index in range(12)]
    for path in captions:
        assert path.with_suffix(".mp4").exists() != path.with_suffix(".png").exists()
        assert "triangle" in path.read_text()


def test_make_clips_into_a_folder_that_is_not_empty_is_an_error(make_clips, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("not a clip")
    assert make_clips.main(["--out", str(tmp_path), "--clips", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(tmp_path) in error and "--out" in error
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]

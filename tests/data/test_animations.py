"""GIF, APNG, WebP and AVIF animations are videos: the frames that browsers show, at the rate of their delays."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megasora.config import IngestConfig
from megasora.data.clip_reader import open_clip, read_clip
from megasora.data.media import Media, RejectedClip
from megasora.data.media_formats import ALPHA_BACKGROUND

LIMITS = IngestConfig()
HEIGHT, WIDTH = 14, 20


def on_background(rgba: np.ndarray) -> np.ndarray:
    """float [H, W, 3]"""
    weight = rgba[..., 3:] / 255
    return rgba[..., :3] * weight + np.array(ALPHA_BACKGROUND) * (1 - weight)


# ---------------------------------------------------------------- files made by hand, and what browsers show


def lzw(indices: np.ndarray) -> bytes:
    """The compressed pixels of a GIF frame, by Pillow: bits of the first code, sub-blocks."""
    image = Image.fromarray(indices, "L")
    file = io.BytesIO()
    image.save(file, "GIF", optimize=False)
    data = file.getvalue()
    position = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while data[position] == 0x21:
        position += 2
        while data[position]:
            position += data[position] + 1
        position += 1
    flags = data[position + 9]
    return data[position + 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0) : -1]


def gif(frames: list[dict], palette: np.ndarray, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    file = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80 | 7, 3, 0) + palette.tobytes()
    for frame in frames:
        flags = frame["disposal"] << 2 | (frame["transparent"] is not None)
        file += b"!\xf9\4" + struct.pack("<BHBB", flags, frame.get("delay", 8), frame["transparent"] or 0, 0)
        own = frame.get("palette")
        y, x, (height, width) = frame["y"], frame["x"], frame["indices"].shape
        file += b"," + struct.pack("<HHHHB", x, y, width, height, 0x87 if own is not None else 0)
        file += (b"" if own is None else own.tobytes()) + lzw(frame["indices"])
    return file + b";"


def shown_of_gif(frames: list[dict], palette: np.ndarray) -> list[np.ndarray]:
    canvas, shown = np.zeros((HEIGHT, WIDTH, 4)), []
    for frame in frames:
        y, x, (height, width) = frame["y"], frame["x"], frame["indices"].shape
        before, area = canvas.copy(), canvas[y : y + height, x : x + width]
        colors = (palette if frame["palette"] is None else frame["palette"])[frame["indices"]]
        visible = frame["indices"] != (-1 if frame["transparent"] is None else frame["transparent"])
        area[visible] = np.dstack([colors, np.full((height, width), 255)])[visible]
        shown.append(on_background(canvas))
        if frame["disposal"] == 2:
            area[:] = 0
        elif frame["disposal"] == 3:
            canvas = before
    return shown


def random_area(rng, whole: bool) -> tuple[int, int, int, int]:
    if whole:
        return 0, 0, HEIGHT, WIDTH
    height, width = int(rng.integers(1, HEIGHT + 1)), int(rng.integers(1, WIDTH + 1))
    return int(rng.integers(HEIGHT - height + 1)), int(rng.integers(WIDTH - width + 1)), height, width


def random_gif(seed: int) -> tuple[list[dict], np.ndarray]:
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(6):
        y, x, height, width = random_area(rng, rng.random() < 0.2)
        own = rng.integers(0, 256, (256, 3)).astype(np.uint8) if rng.random() < 0.4 else None
        transparent = int(rng.integers(0, 8)) if rng.random() < 0.7 else None
        indices = rng.integers(0, 8, (height, width)).astype(np.uint8)
        frames.append(
            dict(y=y, x=x, indices=indices, palette=own, transparent=transparent, disposal=int(rng.integers(0, 4)))
        )
    return frames, rng.integers(0, 256, (256, 3)).astype(np.uint8)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def apng(frames: list[dict], hidden_first: np.ndarray | None = None, declared: int = 0) -> bytes:
    """Frames are RGBA; `hidden_first`: a picture for viewers that do not know animations."""
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 6, 0, 0, 0))
    file += chunk(b"acTL", struct.pack(">II", declared or len(frames), 0))
    if hidden_first is not None:
        file += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in hidden_first)))
    number = 0
    for i, frame in enumerate(frames):
        delay, area = frame.get("delay", Fraction(80, 1000)), (frame["x"], frame["y"])
        height, width = frame["rgba"].shape[:2]
        times = (delay.numerator, delay.denominator, frame["disposal"], frame["blend"])
        file += chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, *area, *times))
        pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in frame["rgba"]))
        if i == 0 and hidden_first is None:
            file += chunk(b"IDAT", pixels)
            number += 1
        else:
            file += chunk(b"fdAT", struct.pack(">I", number + 1) + pixels)
            number += 2
    return file + chunk(b"IEND", b"")


def shown_of_apng(frames: list[dict]) -> list[np.ndarray]:
    canvas, shown = np.zeros((HEIGHT, WIDTH, 4)), []
    for frame in frames:
        y, x, (height, width) = frame["y"], frame["x"], frame["rgba"].shape[:2]
        before, area, new = canvas.copy(), canvas[y : y + height, x : x + width], frame["rgba"].astype(float)
        if frame["blend"]:
            above, below = new[..., 3:] / 255, area[..., 3:] / 255 * (1 - new[..., 3:] / 255)
            alpha = above + below
            colors = (new[..., :3] * above + area[..., :3] * below) / np.maximum(alpha, 1e-9)
            new = np.dstack([colors, 255 * alpha])
        area[:] = new
        shown.append(on_background(canvas))
        if frame["disposal"] == 1:
            area[:] = 0
        elif frame["disposal"] == 2:
            canvas = before
    return shown


def random_apng(seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    frames = []
    for i in range(6):
        y, x, height, width = random_area(rng, i == 0)
        rgba = rng.integers(0, 256, (height, width, 4)).astype(np.uint8)
        rgba[..., 3] = np.choose(rng.integers(0, 3, (height, width)), [0, 255, rgba[..., 3]])
        frames.append(dict(y=y, x=x, rgba=rgba, disposal=int(rng.integers(0, 3)), blend=int(rng.integers(0, 2))))
    return frames


def moving_square(frames: int = 12) -> np.ndarray:
    made = np.full((frames, 48, 64, 3), (250, 240, 20), np.uint8)
    for i in range(frames):
        made[i, 14:34, 4 * i : 4 * i + 20] = (220, 30, 30)
    return made


def save(path: Path, frames: np.ndarray, duration, **options) -> Path:
    """By Pillow; `duration` in ms."""
    images = [Image.fromarray(frame) for frame in frames]
    format = {".apng": "PNG"}.get(path.suffix)
    lossless = {".webp": {"lossless": True}, ".avif": {"quality": 100, "subsampling": "4:4:4"}}.get(path.suffix, {})
    images[0].save(
        path, format=format, save_all=True, append_images=images[1:], duration=duration, **lossless, **options
    )
    return path


@pytest.mark.parametrize("seed", range(20))
def test_frames_of_a_gif_are_drawn_as_browsers_do(seed, tmp_path):
    frames, palette = random_gif(seed)
    (tmp_path / "a.gif").write_bytes(gif(frames, palette))
    clip = read_clip(tmp_path / "a.gif", LIMITS)
    assert clip.fps == 12.5
    assert np.abs(clip.frames_FHWC - np.array(shown_of_gif(frames, palette))).max() <= 0.51


@pytest.mark.parametrize("seed", range(20))
def test_frames_of_an_apng_are_drawn_as_its_standard_says(seed, tmp_path):
    frames = random_apng(seed)
    (tmp_path / "a.png").write_bytes(apng(frames))
    clip = read_clip(tmp_path / "a.png", LIMITS)
    assert clip.fps == 12.5
    assert np.abs(clip.frames_FHWC - np.array(shown_of_apng(frames))).max() <= 2


def test_frames_of_a_transparent_webp_are_those_that_were_saved(tmp_path):
    rng = np.random.default_rng(0)
    made = np.zeros((6, 48, 64, 4), np.uint8)
    for i in range(6):
        made[i, 4 * i : 4 * i + 20, 3 * i : 3 * i + 20] = rng.integers(0, 256, (20, 20, 4))
    save(tmp_path / "a.webp", made, 80, exact=True)
    clip = read_clip(tmp_path / "a.webp", LIMITS)
    assert np.abs(clip.frames_FHWC - on_background(made.astype(float))).max() <= 1


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.apng", "a.avif"])
def test_a_regular_animation_keeps_its_frames_and_its_true_rate(name, tmp_path):
    clip = read_clip(save(tmp_path / name, made := moving_square(), 80), LIMITS)
    assert clip.fps == 12.5
    assert clip.frames_FHWC.shape == made.shape
    assert np.abs(clip.frames_FHWC.astype(float) - made).mean() <= (3 if name == "a.avif" else 0)


@pytest.mark.parametrize("count", [2, 3, 12])
@pytest.mark.parametrize(
    ("delay", "fps"), [(8, 12.5), (4, 25.0), (3, 100 / 3), (2, 50.0), (100, 1.0), (0, 10), (1, 10)]
)
def test_the_rate_of_a_gif_is_that_of_its_delays_in_hundredths(delay, fps, count, tmp_path):
    """Browsers show delays of 0 and 1 as 10."""
    frames = [
        dict(y=0, x=0, indices=np.full((4, 4), i, np.uint8), disposal=1, transparent=None, delay=delay)
        for i in range(count)
    ]
    (tmp_path / "a.gif").write_bytes(gif(frames, np.arange(768, dtype=np.uint8).reshape(256, 3), 4, 4))
    clip = read_clip(tmp_path / "a.gif", LIMITS)
    assert clip.fps == pytest.approx(fps) and len(clip.frames_FHWC) == count


def test_delays_that_are_rounded_from_a_rate_keep_every_frame(tmp_path):
    delays = [3, 3, 4] * 4
    frames = [
        dict(y=0, x=0, indices=np.full((4, 4), i, np.uint8), disposal=1, transparent=None, delay=d)
        for i, d in enumerate(delays)
    ]
    (tmp_path / "a.gif").write_bytes(gif(frames, np.arange(768, dtype=np.uint8).reshape(256, 3), 4, 4))
    clip = read_clip(tmp_path / "a.gif", LIMITS)
    assert clip.fps == pytest.approx(30) and len(clip.frames_FHWC) == 12


@pytest.mark.parametrize("delay", [Fraction(1, 12), Fraction(1001, 30000), Fraction(7, 65521)])
def test_delays_of_an_apng_are_fractions(delay, tmp_path):
    frames = [{**frame, "delay": delay} for frame in random_apng(0)]
    (tmp_path / "a.png").write_bytes(apng(frames))
    shown_delay = delay if delay > Fraction(1, 100) else Fraction(1, 10)
    assert read_clip(tmp_path / "a.png", LIMITS).fps == pytest.approx(float(1 / shown_delay), rel=1e-4)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif"])
def test_a_frame_that_is_held_is_repeated(name, tmp_path):
    made = moving_square(5)
    clip = read_clip(save(tmp_path / name, made, [100, 100, 300, 100, 800]), LIMITS)
    assert clip.fps == 10.0
    shown = made[[0, 1, 2, 2, 2, 3] + [4] * 8]
    assert clip.frames_FHWC.shape == shown.shape
    assert np.abs(clip.frames_FHWC.astype(float) - shown).mean() <= (3 if name == "a.avif" else 0)


def test_a_lower_rate_thins_an_animation_out(tmp_path):
    path = save(tmp_path / "a.gif", made := moving_square(), 50)
    clip = read_clip(path, IngestConfig(max_fps=10))
    assert clip.fps == 10 and np.array_equal(clip.frames_FHWC, made[::2])


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_excerpts_are_the_frames_between_two_times(name, tmp_path):
    path = save(tmp_path / name, made := moving_square(), 100)
    for start, end, kept in ((0.0, 0.5, slice(0, 5)), (0.3, 0.7, slice(3, 7)), (0.8, None, slice(8, 12))):
        with open_clip(Media(path, start=start, end=end), LIMITS) as clip:
            assert np.array_equal(np.stack(list(clip.frames)), made[kept])
            assert clip.fps == 10.0
            assert clip.timestamps == pytest.approx(np.arange(12)[kept] / 10)
    with pytest.raises(RejectedClip) as error_info, open_clip(Media(path, start=5.0), LIMITS) as clip:
        list(clip.frames)
    assert error_info.value.reason == "no frames"


# ---------------------------------------------------------------- one picture, sizes, limits


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_of_one_frame_is_an_image(name, tmp_path):
    made = moving_square(1)
    if name == "a.png":
        frames = random_apng(0)[:1]
        (tmp_path / name).write_bytes(apng(frames))
        made = np.array(shown_of_apng(frames))
    else:
        save(tmp_path / name, made, 80)
    clip = read_clip(tmp_path / name, LIMITS)
    assert clip.fps == 0.0 and np.abs(clip.frames_FHWC - made).max() <= 0.51


def test_the_picture_for_other_viewers_is_no_frame_of_an_apng(tmp_path):
    frames = random_apng(0)
    (tmp_path / "a.png").write_bytes(apng(frames, hidden_first=np.full((HEIGHT, WIDTH, 4), 77, np.uint8)))
    clip = read_clip(tmp_path / "a.png", LIMITS)
    assert np.abs(clip.frames_FHWC - np.array(shown_of_apng(frames))).max() <= 2


def test_a_first_frame_larger_than_the_screen_of_a_gif_is_shown_whole(tmp_path):
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) % 8
    frames = [dict(y=0, x=0, indices=indices, disposal=1, transparent=None, delay=10)] * 2
    palette = np.random.default_rng(0).integers(0, 256, (256, 3)).astype(np.uint8)
    (tmp_path / "a.gif").write_bytes(gif(frames, palette, 4, 5))
    clip = read_clip(tmp_path / "a.gif", LIMITS)
    assert np.array_equal(clip.frames_FHWC, palette[indices][None].repeat(2, 0))


def test_interlaced_frames_of_a_gif_are_in_order(tmp_path):
    made = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for interlace in (0, 1):
        made.save(tmp_path / "a.gif", interlace=interlace)
        assert np.array_equal(read_clip(tmp_path / "a.gif", LIMITS).frames_FHWC[0, ..., 0], np.asarray(made))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations_are_scaled_and_limited_as_videos_are(name, tmp_path):
    path = save(tmp_path / name, moving_square(), 80)
    assert read_clip(path, IngestConfig(fit_height=24)).frames_FHWC.shape == (12, 24, 32, 3)
    assert len(read_clip(path, IngestConfig(max_frames=12)).frames_FHWC) == 12
    for limits, reason in (({"max_frames": 11}, "too long"), ({"max_width": 63}, "too large")):
        with pytest.raises(RejectedClip) as error_info:
            read_clip(path, IngestConfig(**limits))
        assert error_info.value.reason == reason


def test_repeated_frames_count_for_the_limits_before_any_is_decoded(tmp_path):
    path = save(tmp_path / "a.gif", moving_square(4), [20, 20, 20, 9000])
    with pytest.raises(RejectedClip, match="453 frames"), open_clip(Media(path), IngestConfig(max_frames=452)):
        pass


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_the_orientation_of_an_animation_is_applied_to_every_frame(name, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    made = moving_square(3)
    clip = read_clip(save(tmp_path / name, made, 80, exif=exif), LIMITS)
    assert np.array_equal(clip.frames_FHWC, np.rot90(made, -1, (1, 2)))


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_a_cut_animation_is_rejected(name, tmp_path):
    rng = np.random.default_rng(0)
    path = save(tmp_path / name, rng.integers(0, 256, (8, 40, 40, 3)).astype(np.uint8), 80)
    whole = path.read_bytes()
    for fraction in (0.2, 0.5, 0.8, 0.99):
        path.write_bytes(whole[: int(fraction * len(whole))])
        with pytest.raises(RejectedClip) as error_info:
            read_clip(path, LIMITS)
        assert error_info.value.reason == "unreadable"


@pytest.mark.parametrize(("name", "least"), [("a.gif", 0.8), ("a.png", 1.0)])
def test_holes_in_an_animation_are_noticed(name, least, tmp_path):
    """A quarter of this GIF are color tables, in which nothing can be noticed."""
    rng = np.random.default_rng(0)
    path = save(tmp_path / name, rng.integers(0, 256, (8, 40, 40, 3)).astype(np.uint8), 80)
    whole, noticed = path.read_bytes(), 0
    for _ in range(30):
        start = int(rng.integers(1000, len(whole) - 300))
        path.write_bytes(whole[:start] + bytes(256) + whole[start + 256 :])
        try:
            read_clip(path, LIMITS)
        except RejectedClip:
            noticed += 1
    assert noticed / 30 >= least


def test_an_apng_with_fewer_frames_than_it_declares_is_rejected(tmp_path):
    (tmp_path / "a.png").write_bytes(apng(random_apng(0), declared=7))
    with pytest.raises(RejectedClip, match="declares 7 frames and has 6"):
        read_clip(tmp_path / "a.png", LIMITS)

"""Pictures of a validation: three rows of each clip, clips beside each other."""

import numpy as np
from PIL import Image

from megasora.tasks.codec_pictures import FRAMES, GAIN, GAP, GREY, MAX_LINE, arrange, picture_of, write_pictures


def clip(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(90, 110, (frames, height, width, 3)).astype(np.uint8)


def test_rows_are_originals_reconstructions_and_differences():
    original = clip(1, 64, 80)
    picture = picture_of(original, original + 3)
    rows = picture.reshape(3, 64 + GAP, 80 + GAP, 4)
    assert np.array_equal(rows[0, :64, :80, :3], original[0]) and np.array_equal(rows[1, :64, :80, :3], original[0] + 3)
    assert np.all(rows[2, :64, :80, :3] == GREY + 3 * GAIN) and np.all(rows[:, :64, :80, 3] == 255)
    assert not rows[:, 64:, :, 3].any() and not rows[:, :, 80:, 3].any()  # gaps are transparent


def test_frames_are_evenly_spaced_and_large_ones_scaled_down():
    frames = np.arange(0, 250, 10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 270, 480, 3), np.uint8)
    picture = picture_of(frames, frames)
    width = (picture.shape[1] // FRAMES) - GAP
    assert width <= 192 and picture.shape[0] == 3 * (round(270 * width / 480) + GAP)
    assert picture[0, :: width + GAP, 0].tolist() == np.linspace(0, 240, FRAMES).tolist()


def test_every_clip_is_in_the_file_once_in_lines_of_bounded_width(tmp_path):
    pictures = [
        picture_of(clip(n, h, w, n), clip(n, h, w)) for n, h, w in ((1, 24, 24), (9, 24, 32), (5, 32, 24), (9, 70, 96))
    ]
    write_pictures(tmp_path, 7, pictures)
    sheet = np.asarray(Image.open(tmp_path / "reconstructions" / "step-00000007.png"))
    assert np.array_equal(sheet, arrange(pictures)) and sheet.shape[1] <= MAX_LINE + GAP
    assert sorted(sheet[sheet[..., 3] > 0].ravel()) == sorted(
        np.concatenate([p[p[..., 3] > 0] for p in pictures]).ravel()
    )

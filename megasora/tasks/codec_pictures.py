"""Pictures of a validation: for each of a few clips a row of originals, one of reconstructions, one of differences.

Gaps are transparent: on the page of the report they have its colour.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from megasora.files import atomic_writer

PICTURED_CLIPS = 8
FOLDER = "reconstructions"  # of a run
FRAMES = 5  # of a clip, evenly spaced
MAX_SIDE, MIN_SIDE = 192, 64  # pixels of a frame in a picture
GAP, GREY, OPAQUE = 4, 128, 255
MAX_LINE = 1280  # pixels: clips are beside each other up to this width
GAIN = 4  # of differences, which are grey where there is none


def picture_of(original_FHWC: np.ndarray, reconstruction_FHWC: np.ndarray) -> np.ndarray:
    """uint8 [F, H, W, 3] twice -> uint8 [height, width, 4]: three rows of evenly spaced frames."""
    count = len(original_FHWC)
    index = np.unique(np.linspace(0, count - 1, min(FRAMES, count)).round().astype(int))
    original, reconstruction = original_FHWC[index], reconstruction_FHWC[index]
    difference = GREY + GAIN * (reconstruction.astype(np.int16) - original)
    rows = [original, reconstruction, difference.clip(0, 255).astype(np.uint8)]
    return np.concatenate([tiles(row) for row in rows])


def tiles(frames_FHWC: np.ndarray) -> np.ndarray:
    """Frames side by side with an alpha channel, each with a gap below and to its right."""
    opaque = [np.pad(fitted(f), ((0, 0), (0, 0), (0, 1)), constant_values=OPAQUE) for f in frames_FHWC]
    return np.concatenate([padded(f, f.shape[0] + GAP, f.shape[1] + GAP) for f in opaque], axis=1)


def fitted(frame_HWC: np.ndarray) -> np.ndarray:
    """A frame whose longer side is at most MAX_SIDE, and at least MIN_SIDE by repeating pixels."""
    from PIL import Image

    side = max(frame_HWC.shape[:2])
    if side > MAX_SIDE:
        height, width = (max(1, round(n * MAX_SIDE / side)) for n in frame_HWC.shape[:2])
        return np.array(Image.fromarray(frame_HWC).resize((width, height), Image.Resampling.BOX))
    zoom = -(-MIN_SIDE // side)
    return frame_HWC.repeat(zoom, 0).repeat(zoom, 1)


def arrange(pictures: list[np.ndarray]) -> np.ndarray:
    """[height, width, 4] each -> one picture: they are beside each other, in lines of at most MAX_LINE if they fit.

    They are sorted by height, so that the rows of a line are at one height.
    """
    lines: list[list[np.ndarray]] = []
    for picture in sorted(pictures, key=len):
        if not lines or sum(p.shape[1] + GAP for p in lines[-1]) + picture.shape[1] > MAX_LINE:
            lines.append([])
        lines[-1].append(picture)
    rows = []
    for line in lines:
        height = max(picture.shape[0] for picture in line)
        rows.append(np.concatenate([padded(p, height + GAP, p.shape[1] + GAP) for p in line], axis=1))
    width = max(row.shape[1] for row in rows)
    return np.concatenate([padded(row, row.shape[0], width) for row in rows])


def padded(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Transparent below and to the right."""
    return np.pad(picture, ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)))


def write_pictures(run_dir: Path, step: int, pictures: list[np.ndarray]) -> None:
    """Writes RUN/reconstructions/step-XXXXXXXX.png atomically: the pictures in lines."""
    from PIL import Image

    data, folder = io.BytesIO(), run_dir / FOLDER
    Image.fromarray(arrange(pictures)).save(data, "PNG")
    folder.mkdir(exist_ok=True)
    with atomic_writer(folder / f"step-{step:08d}.png") as file:
        file.write(data.getvalue())
